"""Traces as files: APRT folders are determined, say what they hold, and keep every bit."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.contracts.check.measurement import Asked, Measurement, measures
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import MemoryTrace, TraceInfo
from aprjax.trace.aprt_writer import file_name, write_aprt
from aprjax.trace.trace import this_platform

# A trace that is small enough to be written twice: two layers of the first tokens.
TOKENS = 4
_WANTED = (Stage.EMBEDDING, Stage.FFN_GATE, Stage.FFN_SWIGL, Stage.LM_HEAD)
_WHOLE_MODEL = 0xFFFFFFFF


def _folders(asked: Asked) -> tuple[Path, Path, dict[tuple[int, Stage], np.ndarray]]:
    """Two APRT folders of two runs of the model on the same tokens, and the values of the first."""

    def make() -> tuple[Path, Path, dict[tuple[int, Stage], np.ndarray]]:
        file = asked.bench.checkpoint("model")
        tokens = list(asked.bench.prompt("direct").ids[:TOKENS])
        folder, model = asked.bench.keep_folder(), asked.bench.loaded("model")
        values: list[dict[tuple[int, Stage], np.ndarray]] = []
        for number in (1, 2):
            logits, captured = model.run_with_cache(tokens)
            captured = {**captured, (OUTSIDE, Stage.LM_HEAD): logits}
            kept = {
                (layer, stage): np.asarray(value, np.float32)
                for (layer, stage), value in captured.items()
                if stage in _WANTED and layer < 2
            }
            values.append(kept)
            info = TraceInfo(
                path=str(file.path),
                sha256=file.sha256(),
                format=file.format,
                arithmetic=model.arithmetic.name,
                tokens=tuple(tokens),
                positions=tuple(range(len(tokens))),
                head_positions=tuple(range(len(tokens))),
                platform=this_platform(),
            )
            write_aprt(MemoryTrace(info, kept), folder / str(number))
        return folder / "1", folder / "2", values[0]

    return asked.bench.once("aprt", make)


@measures("FALSIFY-APR-TRACE-SAVE-002")
def determined(asked: Asked) -> Measurement:
    """Two runs give the same bytes."""
    one, other, _ = _folders(asked)
    files = sorted(path.relative_to(one) for path in one.rglob("*.bin"))
    differing = sum((one / name).read_bytes() != (other / name).read_bytes() for name in files)
    return Measurement({"differing_files": differing, "files": len(files)}, f"{TOKENS} tokens, two runs")


@measures("FALSIFY-APR-TRACE-SAVE-004", "FALSIFY-APR-TRACE-SAVE-005", "FALSIFY-APR-TRACE-SAVE-010")
def self_describing(asked: Asked) -> Measurement:
    """Every file has its header: magic, layer, number of elements, and the values of the run behind it."""
    folder, _, values = _folders(asked)
    wrong = missing = altered = 0
    for (layer, stage), value in values.items():
        path = folder / file_name(layer, stage)
        if not path.is_file():
            missing += 1
            continue
        raw = path.read_bytes()
        expected = value[-1:] if stage is Stage.LM_HEAD else value
        # Upstream files the embedding among layer 0's stages.
        number = _WHOLE_MODEL if layer == OUTSIDE and stage is not Stage.EMBEDDING else max(layer, 0)
        wrong += raw[:12] != b"APRT" + struct.pack("<II", number, expected.size)
        altered += raw[12:] != expected.astype("<f4").tobytes()
    return Measurement(
        {"wrong_headers": wrong, "missing_files": missing, "altered_values": altered},
        f"{len(values)} files; the head's file holds the last token's logits",
    )


@measures("FALSIFY-APR-TRACE-SAVE-006")
def keeps_nan(asked: Asked) -> Measurement:
    """A NaN of a run is that NaN in the file: its bits are kept."""
    _, _, values = _folders(asked)
    key = next(iter(values))
    planted = values[key].copy()
    bits: Any = planted.reshape(-1).view(np.uint32)
    bits[0] = 0x7FC0_0123
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        info = asked.bench.once("aprt info", lambda: _info(asked, planted))
        target = Path(folder) / "trace"
        write_aprt(MemoryTrace(info, {key: planted}), target)
        raw = next(iter(target.rglob("*.bin"))).read_bytes()
    kept = struct.unpack("<I", raw[12:16])[0] == 0x7FC0_0123
    return Measurement({"bits_kept": kept}, "0x7FC00123 in the first element")


def _info(asked: Asked, value: np.ndarray) -> TraceInfo:
    file = asked.bench.checkpoint("model")
    tokens = asked.bench.prompt("direct").ids[: len(value)]
    positions = tuple(range(len(value)))
    return TraceInfo(
        path=str(file.path),
        sha256=file.sha256(),
        format=file.format,
        arithmetic="llama.cpp",
        tokens=tuple(tokens),
        positions=positions,
        head_positions=positions,
        platform=this_platform(),
    )


@measures("FALSIFY-FFN-GGUF-002", "FALSIFY-ATTN-SUB-005")
def capturing_changes_nothing(asked: Asked) -> Measurement:
    """Logits with every stage captured are the logits without, to the bit."""

    def make() -> tuple[np.ndarray, np.ndarray]:
        model = asked.bench.loaded("model")
        tokens = list(asked.bench.prompt("direct").ids[:TOKENS])
        return np.asarray(model(tokens)), np.asarray(model.run_with_cache(tokens)[0])

    plain, traced = asked.bench.once("captured", make)
    return Measurement(
        {
            "differing_logits": int(np.count_nonzero(plain != traced)),
            "largest_difference": float(np.abs(plain.astype(np.float64) - traced.astype(np.float64)).max()),
        },
        f"{plain.size} logits of {TOKENS} tokens",
    )
