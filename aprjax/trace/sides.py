"""`open_side`: anything that yields a trace, from the text that names it on the command line.

| text | what runs |
|---|---|
| a `.gguf`, `.apr` or safetensors checkpoint | aprjax, under an arithmetic |
| a `.safetensors` file that holds a saved trace | nothing: it is read |
| an APRT folder | nothing: it is read |
| `llama.cpp:FILE.gguf` | llama.cpp, live |
| `llama.cpp[kv=f16,flash-attention,tiled,repack,threads=4,step=1,library=DIR]:FILE.gguf` | with other options |
| `hf:DIR` | transformers, live |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from aprjax.checkpoint.open import open_checkpoint
from aprjax.checkpoint.types import Checkpoint, CheckpointError, ModelConfig
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.trace.aprt import is_aprt_folder, open_aprt
from aprjax.trace.llama_cpp import LlamaOptions, run_llama_cpp
from aprjax.trace.memory import AnyTrace, MemoryTrace
from aprjax.trace.trace import SCHEMA, Trace

Kind = Literal["checkpoint", "trace", "aprt", "llama.cpp", "hf"]
# Far more than the header of a trace of 100 layers takes, and than a checkpoint's.
_MOST_HEADER = 1 << 26


class NoTokens(CheckpointError):
    """A side that runs a model was given nothing to run it on."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        kind: what yields the trace.
        text: what named it.
        path: the file or folder.
        checkpoint: the model that runs; None where a trace was recorded.
        recorded: the recorded trace; None where a model runs.
        options: llama.cpp's, for that kind.
    """

    kind: Kind
    text: str
    path: Path
    checkpoint: Checkpoint | None = None
    recorded: AnyTrace | None = None
    options: LlamaOptions = field(default_factory=LlamaOptions)

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens that a recorded trace was made of; None where any may be fed."""
        return None if self.recorded is None else self.recorded.info.tokens

    def require(self, tokens: list[int] | None) -> list[int]:
        """The tokens; NoTokens where there are none."""
        if tokens is None:
            raise NoTokens("this side runs a model: give --prompt or --tokens", file=self.path)
        return tokens

    def trace(
        self, tokens: list[int] | None = None, *, arithmetic: Arithmetic | None = None, raw: tuple[str, ...] = ()
    ) -> AnyTrace:
        """The side's values for these tokens.

        Args:
            tokens: token ids; a recorded side takes none, or its own.
            arithmetic: how a checkpoint is computed; the other kinds compute their own way.
            raw: llama.cpp's own nodes to keep, too; see `run_llama_cpp`.

        Raises:
            NoTokens: no tokens for a side that runs a model.
            CheckpointError: a recorded side was made of other tokens; an arithmetic for a side that has its
                own; the engine failed.
        """
        if arithmetic is not None and self.kind != "checkpoint":
            raise CheckpointError(
                f"an arithmetic is for checkpoints that aprjax runs: {self.text} has its own",
                file=self.path,
                fix="leave --arithmetic out for this side",
            )
        if self.recorded is not None:
            if tokens is not None and tuple(tokens) != self.recorded.info.tokens:
                raise CheckpointError(
                    f"the trace was made of the tokens {_shortened(self.recorded.info.tokens)}, "
                    f"and is to be compared on {_shortened(tokens)}",
                    file=self.path,
                    fix="give the trace's own tokens (--tokens), or trace the other prompt",
                )
            return self.recorded
        tokens = self.require(tokens)
        if self.kind == "llama.cpp":
            return run_llama_cpp(self.path, tokens, self.options, raw=raw)
        if self.kind == "hf":
            from aprjax.trace.hf import run_transformers

            return run_transformers(self.path, tokens)
        assert self.checkpoint is not None
        return run_checkpoint(self.checkpoint, tokens, arithmetic)


def run_checkpoint(checkpoint: Checkpoint, tokens: list[int], arithmetic: Arithmetic | None = None) -> MemoryTrace:
    """Runs a checkpoint by aprjax and returns every stage (by default under the arithmetic `llama.cpp`).

    One layer's weights are in memory at a time, and all values. `streamed.StreamedRun` also saves without holding them.

    Raises:
        CheckpointError: the file lacks what a forward pass needs, or the tokens are not the model's.
    """
    from aprjax.qwen2.arithmetic import PRESETS
    from aprjax.trace.streamed import StreamedRun

    return StreamedRun(checkpoint, tokens, arithmetic or PRESETS["llama.cpp"]).collect()


def open_side(text: str, *, config: ModelConfig | None = None, tokens: list[int] | None = None) -> Side:
    """Opens what a text names; nothing runs yet.

    Args:
        text: see the table above. A path that begins like an engine's name is written with `./`.
        config: for an APRT folder without a sidecar: of the model that was run.
        tokens: for the same: what it was fed.

    Raises:
        CheckpointError: nothing of the kind is there, or it is damaged; unknown options.
    """
    engine = re.fullmatch(r"(llama\.cpp|hf)(?:\[([^\]]*)\])?:(.+)", text, flags=re.DOTALL)
    if engine is not None:
        return _open_engine(text, *engine.groups())
    path = Path(text)
    if path.is_dir() and is_aprt_folder(path):
        return Side("aprt", text, path, recorded=open_aprt(path, config=config, tokens=tokens))
    if path.is_file() and _claims_to_be_a_trace(path):
        return Side("trace", text, path, recorded=Trace.load(path))
    return Side("checkpoint", text, path, checkpoint=open_checkpoint(path))


def _open_engine(text: str, name: str, options: str | None, target: str) -> Side:
    path = Path(target)
    checkpoint = open_checkpoint(path)
    if name == "hf":
        if options or checkpoint.format != "safetensors":
            raise CheckpointError(
                f"expected hf:DIR with a Hugging Face folder, found {text!r} ({checkpoint.format})",
                file=path,
                fix="convert the model first: `python -m aprjax convert IN DIR`",
            )
        return Side("hf", text, path, checkpoint=checkpoint)
    if checkpoint.format != "gguf":
        raise CheckpointError(
            f"expected llama.cpp:FILE.gguf, found a file of the format {checkpoint.format}",
            file=path,
            fix="convert the model first: `python -m aprjax convert IN OUT.gguf`",
        )
    return Side("llama.cpp", text, path, checkpoint=checkpoint, options=_llama_options(options or "", path))


_SWITCHES: dict[str, Callable[[LlamaOptions], LlamaOptions]] = {
    "kv=f16": lambda o: replace(o, type_k="f16", type_v="f16"),
    "kv=f32": lambda o: replace(o, type_k="f32", type_v="f32"),
    "flash-attention": lambda o: replace(o, flash_attention=True),
    "tiled": lambda o: replace(o, tiled=True),
    "repack": lambda o: replace(o, repack=True),
}


def _llama_options(text: str, path: Path) -> LlamaOptions:
    options = LlamaOptions()
    for word in filter(None, text.split(",")):
        key, _, value = word.partition("=")
        if word in _SWITCHES:
            options = _SWITCHES[word](options)
        elif key in ("threads", "step") and re.fullmatch(r"[1-9]\d{0,3}", value):
            options = replace(options, **{key: int(value)})
        elif key == "library" and value:
            options = replace(options, library=value)
        else:
            raise CheckpointError(
                f"the option {word!r} is unknown",
                file=path,
                fix=f"known for llama.cpp: {', '.join(_SWITCHES)}, threads=N, step=N, library=DIR",
            )
    return options


def _claims_to_be_a_trace(path: Path) -> bool:
    """Whether a safetensors header says so; damage beyond that is `Trace.load`'s to report."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 2 <= size <= _MOST_HEADER:
            return False
        head = stream.read(size)
    if not head.startswith(b"{"):
        return False
    try:
        metadata = json.loads(head).get("__metadata__", {})
        return str(metadata.get("schema", "")).startswith(SCHEMA.partition("/")[0])
    except (ValueError, AttributeError, RecursionError):
        # Cut off or garbled; the schema may still be there to be read.
        return SCHEMA.encode() in head


def _shortened(tokens: list[int] | tuple[int, ...]) -> str:
    shown = ",".join(str(token) for token in tokens[:6])
    return shown + (f",… ({len(tokens)} in all)" if len(tokens) > 6 else "")
