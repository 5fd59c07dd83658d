"""From what names two sides to what `layers` compares: files that run here, and traces."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from aprjax.bisect.files import FilesReport
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.traced import Side, Traced, arithmetic_of, llama_preset
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint, CheckpointError, ModelConfig
from aprjax.qwen2.arithmetic import Arithmetic, preset
from aprjax.trace import AnyTrace, Trace
from aprjax.trace import sides as trace_sides

# What may be given as a side: a text of `open_side`'s table, a path, or what such a text would have opened.
SideLike = str | Path | Checkpoint | AnyTrace


@dataclass(frozen=True)
class Opened:
    """A side before it has run.

    Attributes:
        side: what was named or given.
        checkpoint: the file that runs, or that a recorded trace was made from; None where that is not at hand.
    """

    side: trace_sides.Side
    checkpoint: Checkpoint | None

    @property
    def runs_here(self) -> bool:
        """Whether aprjax runs it, so that it can be run from another side's inputs."""
        return self.side.kind == "checkpoint"

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens of a recorded trace."""
        return self.side.tokens


def opened_side(
    given: SideLike, *, config: ModelConfig | None = None, tokens: list[int] | None = None
) -> trace_sides.Side:
    """A side from its name, or from the checkpoint or trace itself.

    Args:
        given: the side.
        config: for an APRT folder without a sidecar, see `aprjax.trace.sides.open_side`.
        tokens: for the same.

    Raises:
        CheckpointError: a side that is named cannot be read.
    """
    if isinstance(given, str | Path):
        return trace_sides.open_side(str(given), config=config, tokens=tokens)
    if isinstance(given, Checkpoint):
        return trace_sides.Side("checkpoint", str(given.path), given.path, checkpoint=given)
    return trace_sides.Side("trace", given.info.path, Path(given.info.path), recorded=given)


def opened_file(given: str | Path | Checkpoint) -> Checkpoint:
    """A checkpoint from its path, or as it is.

    Raises:
        CheckpointError: it cannot be read.
    """
    return given if isinstance(given, Checkpoint) else open_checkpoint(given)


def open_two(model: SideLike, ref: SideLike) -> tuple[Opened, Opened]:
    """Opens both sides; a recorded trace is given its file where the digest proves that it is the one.

    Raises:
        CheckpointError: a side cannot be read.
    """
    first, second = opened_side(model), opened_side(ref)
    return _with_file(first, second.checkpoint), _with_file(second, first.checkpoint)


def _with_file(side: trace_sides.Side, other: Checkpoint | None) -> Opened:
    if side.checkpoint is not None:
        return Opened(side, side.checkpoint)
    assert side.recorded is not None
    return Opened(side, file_of(side.recorded, other))


def file_of(trace: AnyTrace, other: Checkpoint | None = None) -> Checkpoint | None:
    """The file that a trace was made from: `other` or what lies at the recorded path, if the SHA-256 is the trace's."""
    wanted = trace.info.sha256
    if other is not None and other.sha256() == wanted:
        return other
    path = Path(trace.info.path)
    if not wanted or not path.exists():
        return None
    try:
        found = open_checkpoint(path)
        return found if found.sha256() == wanted else None
    except (CheckpointError, OSError):
        return None


def arithmetics(
    sides: tuple[Opened, Opened],
    files: FilesReport | None,
    *,
    both: str | Arithmetic | None,
    model: str | Arithmetic | None,
    ref: str | Arithmetic | None,
) -> tuple[Arithmetic | None, Arithmetic | None]:
    """The asked arithmetics; unasked, that of a recorded trace or an engine, or llama.cpp's.

    Engines multiply another block type by another kernel. Where two files hold the same weights as Q5_0 and
    as F32, only decoded arithmetic compares the files and nothing else: then float32 is the default.
    """
    asked = [preset(name) if isinstance(name, str) else name for name in (model or both, ref or both)]
    own = [_own_arithmetic(side) for side in sides]
    if all(side.runs_here for side in sides):
        mixed = files is not None and any(len(set(t.block_types)) > 1 for t in files.tensors)
        default = preset("float32" if mixed else "llama.cpp")
    else:
        default = next((a for a in own if a is not None), None)
    chosen = [a or b or default for a, b in zip(asked, own, strict=True)]
    return chosen[0], chosen[1]


def _own_arithmetic(opened: Opened) -> Arithmetic | None:
    side = opened.side
    if side.recorded is not None:
        return arithmetic_of(side.recorded)
    if side.kind == "llama.cpp":
        from aprjax.trace.llama_cpp import engine_facts

        options = {key: str(value) for key, value in asdict(side.options).items() if value is not None}
        return llama_preset({**options, **engine_facts(side.options)})
    return preset("float32") if side.kind == "hf" else None


def run_side(opened: Opened, tokens: tuple[int, ...], arithmetic: Arithmetic | None, stack: ExitStack) -> Side:
    """What `layers` compares; engines run now, their traces lie in a folder that goes with `stack`.

    Raises:
        CheckpointError: the engine failed; nothing is known of how a trace was computed.
    """
    side = opened.side
    if side.kind == "checkpoint" and side.checkpoint is not None:
        return Runner(side.checkpoint, arithmetic or preset("llama.cpp"))
    if arithmetic is None:
        raise CheckpointError(
            "nothing is known of how the trace was computed",
            file=side.path,
            fix="say it: --arithmetic llama.cpp, float32, …",
        )
    if side.recorded is not None:
        return Traced(side.recorded, opened.checkpoint, arithmetic)
    return Traced(live_trace(side, list(tokens), stack), opened.checkpoint, arithmetic)


def live_trace(side: trace_sides.Side, tokens: list[int] | None, stack: ExitStack) -> AnyTrace:
    """A side's trace; llama.cpp's lies in a folder that goes with `stack`.

    Raises:
        CheckpointError: see `aprjax.trace.sides.Side.trace`.
    """
    if side.kind != "llama.cpp" or tokens is None:
        return side.trace(tokens)
    from aprjax.trace.llama_cpp import save_llama_cpp

    # On disk: a trace of some hundred tokens takes gigabytes, of which one layer is looked at at a time.
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aprjax-")))
    saved: Trace = save_llama_cpp(side.path, tokens, folder / "trace.safetensors", side.options)
    return saved
