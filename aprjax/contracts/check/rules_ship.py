"""The SHIP criteria about files: loading, round trips, export, licence, digests; and what needs the teacher."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from typing import Any

from aprjax.checkpoint.fetch import known_models
from aprjax.checkpoint.types import Checkpoint
from aprjax.contracts.check.measurement import Asked, Measurement, measures
from aprjax.contracts.check.rules_files import no_files
from aprjax.trace.engine import EngineError

# The hidden size and layers of Qwen2.5-7B: what upstream's artifact criteria are about.
TEACHER = (3584, 28)


def is_teacher(file: Checkpoint) -> bool:
    """Whether a file has the dimensions of the 7B teacher."""
    return (file.config.hidden_size, file.config.num_layers) == TEACHER


def not_the_teacher(asked: Asked) -> str:
    """Why a criterion about the published artifact cannot be measured on this file."""
    config = asked.bench.checkpoint("model").config
    return (
        "the criterion is about the published 7B teacher (3584 channels, 28 layers); "
        f"this model has {config.hidden_size} channels and {config.num_layers} layers"
    )


@measures("FALSIFY-QW2E-SHIP-001")
def loads_from_safetensors(asked: Asked) -> Measurement:
    """A safetensors file: its header lies within it, begins with a brace, and the weights open."""
    file = next(
        (
            f
            for f in (asked.bench.side(name).checkpoint for name in ("model", "ref"))
            if f and f.format == "safetensors"
        ),
        None,
    )
    if file is None:
        return Measurement(
            unmeasured="neither side is a safetensors checkpoint; `python -m aprjax convert FILE FOLDER/` makes one"
        )
    bad = 0
    for path in file.files:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            bad += not (0 < header <= size - 8 and stream.read(1) == b"{")
    return Measurement({"bad_headers": bad, "tensors": len(file.tensors)}, f"{len(file.files)} files")


@measures("FALSIFY-QW2E-SHIP-003")
def every_tensor_close(asked: Asked) -> Measurement:
    """The cosine of every tensor of the model with the reference's."""
    files = asked.bench.files
    if files is None:
        return no_files(asked)
    cosines = [1.0 if tensor.same_values else tensor.cosine for tensor in files.tensors]
    absent = [tensor.name for tensor in files.tensors if None in tensor.block_types]
    if absent:
        return Measurement(failed=f"{len(absent)} tensors are on one side only; first {absent[0]}")
    least: float | None = 1.0
    for cosine in cosines:
        least = None if cosine is None or least is None else min(least, cosine)
    return Measurement(
        {"least_cosine": least, "tensors": files.compared},
        f"{files.compared} tensors, decoded; of the two files, not of an FP16 original, which is not here",
    )


@measures("FALSIFY-QW2E-SHIP-004")
def loads_in_llama_cpp(asked: Asked) -> Measurement:
    """The model's file, exported as GGUF: magic, version, and llama.cpp continues a prompt with it."""
    from aprjax.trace.llama_cpp_generate import generate_llama_cpp

    if importlib.util.find_spec("llama_cpp") is None:
        return Measurement(unmeasured="llama.cpp is not here: llama-cpp-python is not installed (`make peers`)")
    path = asked.bench.exported()
    with path.open("rb") as stream:
        magic, version = stream.read(4), int.from_bytes(stream.read(4), "little")
    measured: dict[str, Any] = {"magic": magic.decode("latin-1"), "version": version}
    try:
        tokens = asked.bench.prompt("direct").ids
        runs = generate_llama_cpp(path, [tokens], max_new_tokens=4)
    except EngineError as error:
        return Measurement({**measured, "continues": False}, str(error))
    return Measurement({**measured, "continues": len(runs.runs[0].tokens) > 0}, "4 tokens by llama.cpp")


@measures("FALSIFY-QW2E-SHIP-005", "FALSIFY-QW2E-SHIP-023")
def needs_humaneval(asked: Asked) -> Measurement:
    """HumanEval on the teacher: not on this machine."""
    return Measurement(unmeasured=f"{not_the_teacher(asked)}; and HumanEval's 164 problems are not part of aprjax")


@measures("FALSIFY-QW2E-SHIP-007")
def needs_the_card(asked: Asked) -> Measurement:
    """Throughput on one named card: not on this machine."""
    return Measurement(unmeasured=f"{not_the_teacher(asked)}; and the speed is defined on an RTX 4090")


@measures("FALSIFY-SHIP-009")
def licence_and_source(asked: Asked) -> Measurement:
    """Licence and source of the data stand in the model's metadata."""
    file = asked.bench.checkpoint("model")
    licence = _text(file, ("license", "general.license"))
    source = _text(file, ("data_source", "general.source.url", "general.base_model.0.repo_url"))
    measured = {"license": licence or "", "has_data_source": source is not None}
    if not is_teacher(file):
        said = f"license {licence!r}, data_source {source!r}"
        return Measurement(measured, unmeasured=f"{not_the_teacher(asked)}; its metadata say: {said}")
    return Measurement(measured, f"data source: {source}")


def _text(file: Checkpoint, keys: Iterable[str]) -> str | None:
    return next((value for key in keys if isinstance(value := file.metadata.get(key), str) and value.strip()), None)


@measures("FALSIFY-SHIP-010")
def published_digest(asked: Asked) -> Measurement:
    """The file's digest is the published one; whether the address answers is not asked here."""
    digests = {model.sha256: model for model in known_models().values()}
    found = asked.bench.checkpoint("ref").sha256()
    shape = bool(re.fullmatch("[0-9a-f]{64}", found))
    model = digests.get(found)
    what = f"the reference is {model.file} of {model.hub_repository}, to the byte" if model else "the digest is unknown"
    return Measurement(
        {"digest_is_sha256": shape, "digest_is_published": model is not None},
        unmeasured=f"the network is not asked whether the address answers; {what}",
    )


@measures("FALSIFY-PM-008", "FALSIFY-PM-009")
def magic_and_type(asked: Asked) -> Measurement:
    """An APR file begins with one of its magics; the block type that holds most bytes is the one that is claimed."""
    file = asked.bench.checkpoint("model")
    if asked.test.id.endswith("009"):
        if file.format != "apr":
            return Measurement(unmeasured=f"the model is a {file.format} file")
        with file.path.open("rb") as stream:
            magic = stream.read(4)
        return Measurement({"known_magic": magic in (b"APR\0", b"APRN", b"APR1", b"APR2")}, repr(magic))
    gguf = next((f for f in (file, asked.bench.checkpoint("ref")) if f.format == "gguf"), None)
    if gguf is None:
        return Measurement(unmeasured="neither side is a GGUF file")
    from gguf import LlamaFileType

    claimed = (
        LlamaFileType(int(gguf.metadata.get("general.file_type", -1))).name
        if "general.file_type" in gguf.metadata
        else ""
    )
    sizes: dict[str, int] = {}
    for tensor in gguf.tensors.values():
        sizes[tensor.block_type] = sizes.get(tensor.block_type, 0) + tensor.nbytes
    most = max(sizes, key=lambda kind: sizes[kind])
    return Measurement(
        {"claimed_type_is_predominant": most in claimed},
        f"{most} holds most bytes; file_type says {claimed or 'nothing'}",
    )
