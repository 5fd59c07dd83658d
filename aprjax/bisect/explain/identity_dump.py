"""A trace as bare numbers, with what is claimed of them: what `identify` looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.bisect.replay.layers import BY_KEY, stage_widths
from aprjax.checkpoint.types import Checkpoint, ModelConfig
from aprjax.qwen2.stages import Stage
from aprjax.trace import AnyTrace
from aprjax.trace.aprt import ATTENTION_MAPS, HEAD_STAGES, AprtTrace, raw_files
from aprjax.trace.provenance import parse_provenance, read_provenance

Key = tuple[int, Stage]


@dataclass(frozen=True)
class Dump:
    """Numbers by (layer, stage), and what is claimed of them.

    Attributes:
        path: where they come from.
        values: of any shape, float32; read one at a time.
        keys: in execution order.
        tokens: what was fed, as claimed; None where nobody says.
        positions: of the rows of every stage up to the last residual, where a sidecar or a trace vouches for them.
        head_positions: the same of final_norm and lm_head.
        by_heads: stages whose numbers lie head by head, as the format has it.
    """

    path: str
    values: Mapping[Key, np.ndarray] | AnyTrace
    keys: tuple[Key, ...]
    tokens: tuple[int, ...] | None
    positions: tuple[int, ...] | None = None
    head_positions: tuple[int, ...] | None = None
    by_heads: frozenset[Stage] = frozenset()

    def flat(self, key: Key) -> np.ndarray:
        """A stage's numbers in a row, `float32[elements]`."""
        return np.asarray(self.values[key], np.float32).reshape(-1)

    def claimed_rows(self, key: Key, elements: int, width: int) -> tuple[int, ...] | None:
        """The positions that a stage's rows are said, or have to be taken, to have; None where nothing says."""
        vouched = self.head_positions if key[1] in HEAD_STAGES else self.positions
        if vouched is not None:
            return vouched
        count = len(self.tokens or ())
        if elements == count * width:
            return tuple(range(count))
        # Upstream runs the head for the last token only; the format's reader takes it so, too.
        return (count - 1,) if elements == width and key[1] in HEAD_STAGES else None


def dump_of(trace: AnyTrace | str | Path, tokens: tuple[int, ...] | None) -> Dump:
    """A trace, or an APRT folder that nobody vouches for, as a `Dump`.

    Args:
        trace: of any engine, or the folder.
        tokens: what is claimed to have been fed; a trace's own by default.

    Raises:
        CheckpointError: the folder is damaged.
    """
    if isinstance(trace, str | Path):
        return _of_folder(Path(trace), tokens)
    info = trace.info
    if isinstance(trace, AprtTrace) and not trace.vouched:
        return _of_folder(trace.folder, tokens or info.tokens)
    return Dump(info.path, trace, tuple(trace), tokens or info.tokens, info.positions, info.head_positions)


def _of_folder(folder: Path, tokens: tuple[int, ...] | None) -> Dump:
    files = raw_files(folder)
    said = parse_provenance(read_provenance(folder))
    by_heads = {*ATTENTION_MAPS, *((Stage.Q_POST_ROPE, Stage.K_POST_ROPE) if said.by_heads else ())}
    return Dump(str(folder), files, tuple(files), tokens or said.tokens, by_heads=frozenset(by_heads))


def layer_widths(config: ModelConfig) -> dict[Stage, int]:
    """Elements per position of every stage but those with a column per key."""
    return {stage: width for stage, width in stage_widths(config, 0).items() if stage not in BY_KEY}


def other_model(dump: Dump, checkpoint: Checkpoint) -> IdentityFinding | None:
    """A refusal in words where the trace cannot be of this file: layers, widths or vocabulary differ.

    A size that is a multiple of the file's width proves nothing; one that is not, refutes the file.
    """
    config = checkpoint.config
    widths = layer_widths(config)
    count = len(dump.tokens or ())
    evidence: dict[str, Any] = {}
    words: list[str] = []
    top = max((layer for layer, _ in dump.keys), default=-1)
    if top >= config.num_layers:
        evidence["layers"] = {"at least": top + 1, "file": config.num_layers}
        words.append(f"it has a layer {top}, the file {config.num_layers} layers")
    for key in dump.keys:
        stage = key[1]
        if stage not in widths or str(stage) in evidence:
            continue
        size = dump.flat(key).size
        if size % widths[stage] == 0 and size:
            continue
        if size and count and size % count == 0:
            found = size // count
            evidence[str(stage)] = {"found": found, "file": widths[stage]}
            words.append(f"its {stage} is {found:,} wide, the file's {widths[stage]:,}")
        else:
            evidence[str(stage)] = {"elements": size, "file": widths[stage]}
            words.append(f"its {stage} has {size:,} elements, no multiple of the file's {widths[stage]:,}")
    if not words:
        return None
    named = ", ".join(words[:3]) + (f" and {len(words) - 3} more stages" if len(words) > 3 else "")
    vocabulary = "lm_head" in evidence and len(evidence) == 1
    return IdentityFinding(
        "other-vocabulary" if vocabulary else "other-model",
        f"the trace is not of {checkpoint.path.name}: {named}",
        "give the file that was run"
        + (" (a vocabulary may be padded: compare like with like)" if vocabulary else ", or trace this one"),
        Confidence(Level.CERTAIN, "sizes alone decide this"),
        evidence=evidence,
    )
