"""Files: what a container says, and what a conversion keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.names import gguf_to_hf, hf_to_gguf
from aprjax.checkpoint.types import Checkpoint, canonical_tensor_shapes, file_sha256
from aprjax.contracts.check.measurement import Asked, Measurement, measures


def no_files(asked: Asked) -> Measurement:
    """Raises what keeps a file from being at hand."""
    for name in ("model", "ref"):
        asked.bench.checkpoint(name)
    return Measurement(unmeasured="the files of both sides are not at hand")


@measures("APRJAX-FORMAT-001")
def same_values(asked: Asked) -> Measurement:
    """Every tensor of the reference is in the model, with the same values."""
    files = asked.bench.files
    if files is None:
        return no_files(asked)
    asked.bench.keep("files.json", files.to_json())
    differing = files.differing
    first = f"; first {differing[0].name}: {differing[0].explanation}" if differing else ""
    return Measurement(
        {"differing_tensors": len(differing), "tensors": files.compared, "identical_bytes": files.identical_bytes},
        f"{files.compared} tensors{first}",
        artifacts=("files.json",),
    )


@measures("APRJAX-FORMAT-002")
def same_config(asked: Asked) -> Measurement:
    """Every key of the config that a forward pass reads is the same."""
    files = asked.bench.files
    if files is None:
        return no_files(asked)
    found = {**files.dimensions, **files.active_config}
    text = ", ".join(f"{key} is {a} and {b}" for key, (a, b) in found.items())
    return Measurement({"differing_keys": len(found)}, text or "every key that a forward pass reads is equal")


@measures("APRJAX-FORMAT-003")
def sound_containers(asked: Asked) -> Measurement:
    """Reading the model's file meets no deviation that changes what a reader makes of it, and no value is no number."""
    file = asked.bench.checkpoint("model")

    def findings() -> Any:
        from aprjax.checkpoint.inspect import inspect

        return inspect(file.path).findings

    found = asked.bench.once("inspected", findings)
    errors = [finding for finding in found if finding.severity == "error"]
    warnings = [finding for finding in found if finding.severity == "warning"]
    text = "; ".join(f"{finding.id}: {finding.message}" for finding in [*errors, *warnings][:3])
    return Measurement({"errors": len(errors), "warnings": len(warnings)}, text or "no deviation")


@measures("APRJAX-FORMAT-004")
def complete(asked: Asked) -> Measurement:
    """Every tensor that the config implies is there with its shape."""
    file = asked.bench.checkpoint("model")
    optional = {"lm_head.weight"}
    absent, wrong = [], []
    for name, shape in canonical_tensor_shapes(file.config).items():
        tensor = file.tensors.get(name)
        if tensor is None:
            absent += [] if name in optional else [name]
        elif tuple(tensor.shape) != shape:
            wrong.append(name)
    first = f"; first {(absent + wrong)[0]}" if absent or wrong else ""
    return Measurement({"missing": len(absent), "wrong_shapes": len(wrong)}, f"{len(file.tensors)} tensors{first}")


def _exported(asked: Asked) -> Checkpoint:
    return asked.bench.once("exported file", lambda: open_checkpoint(asked.bench.exported()))


def _differing_bytes(before: Checkpoint, after: Checkpoint) -> list[str]:
    names = dict.fromkeys([*before.tensors, *after.tensors])
    return [
        name
        for name in names
        if (name not in after.tensors and name != "lm_head.weight")
        or (name in before.tensors and name in after.tensors and not _same_tensor(before, after, name))
    ]


def _same_tensor(before: Checkpoint, after: Checkpoint, name: str) -> bool:
    a, b = before.tensors[name], after.tensors[name]
    if tuple(a.shape) != tuple(b.shape):
        return False
    if a.block_type == b.block_type and a.row_padded == b.row_padded:
        return np.array_equal(a.data, b.data)
    return np.array_equal(a.decode(), b.decode(), equal_nan=True)


@measures("FALSIFY-FP-004")
def round_trip(asked: Asked) -> Measurement:
    """The model's file, written as GGUF with its blocks kept and read again, holds the same tensors."""
    before, after = asked.bench.checkpoint("model"), _exported(asked)
    differing = _differing_bytes(before, after)
    first = f"; first {differing[0]}" if differing else ""
    same_vocabulary = (
        before.vocabulary is None
        or after.vocabulary is None
        or (tuple(after.vocabulary.tokens[: len(before.vocabulary.tokens)]) == tuple(before.vocabulary.tokens))
    )
    return Measurement(
        {
            "differing_tensors": len(differing),
            "same_config": before.config == after.config,
            "same_vocabulary": same_vocabulary,
        },
        f"{len(after.tensors)} tensors, {before.format} → gguf{first}",
    )


@measures("FALSIFY-FP-001", "FALSIFY-FP-002", "FALSIFY-FP-003")
def shapes_across_formats(asked: Asked) -> Measurement:
    """Shapes in both containers: element counts, one-dimensional tensors, and the exchange of a matrix's sides."""
    model, ref = (asked.bench.checkpoint(name) for name in ("model", "ref"))
    common = [name for name in model.tensors if name in ref.tensors]
    shapes = [(tuple(model.tensors[name].shape), tuple(ref.tensors[name].shape)) for name in common]
    if not shapes:
        return Measurement(unmeasured="the two files have no tensor in common")
    return Measurement(
        {
            "other_shapes": sum(a != b for a, b in shapes),
            "other_counts": sum(int(np.prod(a)) != int(np.prod(b)) for a, b in shapes),
            "other_vectors": sum(a != b for a, b in shapes if min(len(a), len(b)) == 1),
            "not_involutions": sum(a[::-1][::-1] != a for a, _ in shapes),
            "tensors": len(shapes),
        },
        f"{len(shapes)} tensors that both files hold",
    )


@measures("APRJAX-FORMAT-005")
def names_are_one_to_one(asked: Asked) -> Measurement:
    """Every tensor's name has one counterpart in the other container, and comes back from it."""
    names = list(asked.bench.checkpoint("model").tensors)
    lost = [name for name in names if gguf_to_hf(hf_to_gguf(name)) != name]
    doubled = len(names) - len({hf_to_gguf(name) for name in names})
    return Measurement({"lost_names": len(lost), "doubled_names": doubled}, f"{len(names)} names")


@measures("FALSIFY-QW2E-001")
def parameter_count(asked: Asked) -> Measurement:
    """The weights of the file are as many as the config implies."""
    file = asked.bench.checkpoint("model")
    expected = sum(int(np.prod(shape)) for shape in canonical_tensor_shapes(file.config).values())
    found = sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
    tied = 0 if "lm_head.weight" in file.tensors else file.config.vocab_size * file.config.hidden_size
    return Measurement({"surplus": found + tied - expected, "parameters": found}, f"{found} weights")


@measures("FALSIFY-QW2E-003")
def memory_ordering(asked: Asked) -> Measurement:
    """The model's matrices take more bytes from Q4_K over Q6_K and F16 to F32."""
    from aprjax.blocks import byte_size

    file = asked.bench.checkpoint("model")
    shapes = [tensor.shape for tensor in file.tensors.values() if len(tensor.shape) == 2 and not tensor.shape[1] % 256]
    if not shapes:
        return Measurement(unmeasured="no matrix of the model has rows of whole blocks of 256")
    sizes = [sum(byte_size(kind, shape) for shape in shapes) for kind in ("Q4_K", "Q6_K", "F16", "F32")]
    return Measurement({"ordered": sizes == sorted(set(sizes))}, f"{sizes} bytes over {len(shapes)} matrices")


@measures("FALSIFY-QW2E-006", "FALSIFY-QW2E-007")
def shapes_of_the_stream(asked: Asked) -> Measurement:
    """Every layer keeps the shape of the residual stream, and tokens become a row of logits each."""
    one = asked.bench.traced("direct")
    config = asked.bench.checkpoint("model").config
    positions = len(one.report.prompt.positions)
    outputs = {
        layer: spread.counts[0]
        for (layer, slot, chosen), spread in one.spreads.items()
        if (slot, chosen) == ("output", "all")
    }
    wrong = sum(count != positions * config.hidden_size for count in outputs.values())
    return Measurement(
        {
            "wrong_layers": wrong,
            "layers_missing": config.num_layers - len(outputs),
            "rows_of_logits_missing": positions - len(one.report.margins),
        },
        f"{len(outputs)} layers, {positions} positions",
        artifacts=(one.artifact,),
    )


@measures("FALSIFY-QA-001")
def check_is_read_only(asked: Asked) -> Measurement:
    """The files are, after all other tests, the bytes that they were."""
    changed = []
    for name in ("model", "ref"):
        file = asked.bench.checkpoint(name)
        if file.path.is_file() and len(file.files or (file.path,)) == 1 and file_sha256(file.path) != file.sha256():
            changed.append(name)
    return Measurement({"changed_files": len(changed)}, "digests before and after")
