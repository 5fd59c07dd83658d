"""Conformance cases 26 to 35 of apr-format.md 10: the model as a whole."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from apr_drafts import TINY, WIDE, Draft, Part, draft, f32, finding_ids, random_blocks

from aprjax.checkpoint.apr_format import align
from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.names import hf_to_gguf
from aprjax.checkpoint.types import CheckpointError
from aprjax.checkpoint.values import scan_values

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def layer(number: int, leaf: str) -> str:
    return f"model.layers.{number}.{leaf}"


def test_case_26_tied_heads(tmp_path: Path) -> None:
    tied = draft()
    tied.tensors[HEAD] = Part(0, tied.tensors[EMBEDDING].shape, tied.tensors[EMBEDDING].data)
    tied.metadata["tied_embeddings"] = True
    checkpoint = tied.read(tmp_path / "tied.apr")
    assert finding_ids(checkpoint) == set()
    assert checkpoint.tied_head()
    untrue = draft()
    untrue.metadata["tied_embeddings"] = True
    checkpoint = untrue.read(tmp_path / "untrue.apr")
    assert finding_ids(checkpoint) == {"apr-head-not-tied"}
    assert not checkpoint.tied_head()
    absent = draft()
    del absent.tensors[HEAD]
    checkpoint = absent.read(tmp_path / "absent.apr")
    assert finding_ids(checkpoint) == {"apr-head-absent"}
    assert checkpoint.tied_head()


def test_case_26_zero_head(tmp_path: Path) -> None:
    zero = draft()
    zero.tensors[HEAD] = Part(0, zero.tensors[HEAD].shape, bytes(len(zero.tensors[HEAD].data)))
    assert finding_ids(zero.read(tmp_path / "zero.apr")) == {"apr-head-zero"}
    one = bytearray(len(zero.tensors[HEAD].data))
    one[5] = 1
    zero.tensors[HEAD].data = bytes(one)
    assert finding_ids(zero.read(tmp_path / "one.apr")) == set()


@pytest.mark.parametrize("missing", [("k",), ("q", "v"), ("q", "k", "v")])
def test_case_27_missing_biases_of_one_layer(tmp_path: Path, missing: tuple[str, ...]) -> None:
    changed = draft()
    for projection in missing:
        del changed.tensors[layer(1, f"self_attn.{projection}_proj.bias")]
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"missing-bias"}
    (finding,) = checkpoint.findings
    assert ("drops the others" in finding.message) == (len(missing) < 3)


def test_case_27_all_biases_missing(tmp_path: Path) -> None:
    changed = draft()
    changed.tensors = {name: part for name, part in changed.tensors.items() if not name.endswith(".bias")}
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"missing-bias"}
    assert checkpoint.findings[0].message.startswith("none of the 6")


@pytest.mark.parametrize("name", [layer(0, "self_attn.v_proj.weight"), "model.norm.weight", EMBEDDING])
def test_case_27_missing_weights(tmp_path: Path, name: str) -> None:
    changed = draft()
    del changed.tensors[name]
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"missing-tensor"}
    assert checkpoint.findings[0].tensor == name


def test_case_27_missing_layers_are_told_in_one_finding(tmp_path: Path) -> None:
    changed = draft()
    changed.metadata["num_layers"] = 100
    checkpoint = changed.read(tmp_path / "a.apr")
    assert [finding.id for finding in checkpoint.findings].count("missing-tensor") == 1
    assert checkpoint.config.num_layers == 100


def test_case_28_gguf_names(tmp_path: Path) -> None:
    changed, sound = draft(), draft().read(tmp_path / "sound.apr")
    changed.rename(hf_to_gguf)
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"apr-gguf-names"}
    assert set(checkpoint.tensors) == set(sound.tensors)
    assert checkpoint.tensors[layer(1, "mlp.up_proj.weight")].stored_name == "blk.1.ffn_up.weight"


def test_case_28_mixed_names_and_both_spellings(tmp_path: Path) -> None:
    changed = draft()
    changed.rename(lambda name: hf_to_gguf(name) if ".1." in name else name)
    assert finding_ids(changed.read(tmp_path / "a.apr")) == {"apr-gguf-names"}
    both = draft()
    both.tensors["output_norm.weight"] = Part(0, (8,), f32(np.full(8, 9.0)))
    checkpoint = both.read(tmp_path / "b.apr")
    assert finding_ids(checkpoint) == {"apr-gguf-names", "apr-two-spellings"}
    assert checkpoint.tensors["model.norm.weight"].data.tobytes() == both.tensors["model.norm.weight"].data


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.layers.", "").replace("self_attn.", "").replace("mlp.", ""),
    ],
)
def test_case_28_bare_names(tmp_path: Path, rename: object) -> None:
    changed = draft()
    changed.rename(rename)  # type: ignore[arg-type]
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"apr-bare-names"}
    assert set(checkpoint.tensors) == set(draft().tensors)


def fuse(changed: Draft, number: int, name: str) -> dict[str, bytes]:
    """Put q, k and v of a layer into one tensor; returns their bytes."""
    taken = {}
    for kind in ("weight", "bias"):
        parts = [changed.tensors.pop(layer(number, f"self_attn.{p}_proj.{kind}")) for p in "qkv"]
        rows = sum(part.shape[0] for part in parts)
        data = b"".join(part.data for part in parts)
        changed.tensors[name.format(number, kind)] = Part(parts[0].dtype, (rows, *parts[0].shape[1:]), data)
        taken |= {layer(number, f"self_attn.{p}_proj.{kind}"): part.data for p, part in zip("qkv", parts, strict=True)}
    return taken


@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.qkv_proj.{}", "blk.{}.attn_qkv.{}"])
def test_case_28_fused_qkv(tmp_path: Path, name: str) -> None:
    changed = draft()
    taken = fuse(changed, 0, name)
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) - {"apr-gguf-names"} == {"apr-qkv-fused"}
    for piece, data in taken.items():
        tensor = checkpoint.tensors[piece]
        assert tensor.data.tobytes() == data
        start = tensor.offset
        assert (tmp_path / "a.apr").read_bytes()[start : start + len(data)] == data


def test_case_28_fused_qkv_of_blocks(tmp_path: Path) -> None:
    changed = draft(WIDE)
    for projection in "qkv":
        part = changed.tensors[layer(0, f"self_attn.{projection}_proj.weight")]
        part.dtype, part.data = 12, random_blocks("Q4_K", part.shape[0], seed=ord(projection))
    taken = fuse(changed, 0, "model.layers.{}.self_attn.qkv_proj.{}")
    checkpoint = changed.read(tmp_path / "a.apr")
    assert all(checkpoint.tensors[name].data.tobytes() == data for name, data in taken.items())


def test_case_28_fused_qkv_that_cannot_be_split(tmp_path: Path) -> None:
    changed = draft()
    fuse(changed, 0, "model.layers.{}.self_attn.qkv_proj.{}")
    fused = changed.tensors[layer(0, "self_attn.qkv_proj.weight")]
    # AprQ4 blocks of 32 values run across rows of 8.
    fused.dtype, fused.data = 128, bytes(-(-16 * 8 // 32) * 18)
    fused.shape = (16, 8)
    with pytest.raises(CheckpointError, match="cannot be split"):
        changed.read(tmp_path / "a.apr")


def test_case_29_shapes_in_gguf_order(tmp_path: Path) -> None:
    changed = draft()
    for name, part in changed.tensors.items():
        changed.tensors[name] = Part(part.dtype, part.shape[::-1], part.data)
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"apr-shapes-reversed"}
    assert checkpoint.config == TINY
    for name, part in draft().tensors.items():
        assert checkpoint.tensors[name].shape == part.shape
        assert checkpoint.tensors[name].data.tobytes() == part.data


def test_case_29_reversed_shapes_of_blocks(tmp_path: Path) -> None:
    # Only the corrected shape has rows of whole blocks: the order decides before the encoding does.
    changed = draft(WIDE)
    changed.tensors[EMBEDDING] = Part(12, (256, 20), random_blocks("Q4_K", 20))
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"apr-shapes-reversed"}
    assert checkpoint.tensors[EMBEDDING].shape == (20, 256)


def test_case_29_transposed_bytes_are_read_as_they_lie(tmp_path: Path) -> None:
    # Nothing in the file tells bytes of W from bytes of its transpose: that takes a second file to compare with.
    changed = draft()
    name = layer(0, "mlp.up_proj.weight")
    values = np.frombuffer(changed.tensors[name].data, "<f4").reshape(12, 8)
    changed.tensors[name].data = f32(values.T)
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == set()
    np.testing.assert_array_equal(checkpoint.tensors[name].decode(), np.ascontiguousarray(values.T).reshape(12, 8))


def test_case_30_vocabulary_padding_rows(tmp_path: Path) -> None:
    changed = draft()
    rows = np.frombuffer(changed.tensors[EMBEDDING].data, "<f4").reshape(20, 8).copy()
    rows[16:] = 0
    changed.tensors[EMBEDDING].data = f32(rows)
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == set()
    (finding,) = scan_values(checkpoint)
    assert finding.id == "values-padding-rows"
    assert finding.severity == "info"


def test_case_31_entrenar_checkpoint(tmp_path: Path) -> None:
    changed = draft()
    changed.metadata |= {"format": "entrenar-checkpoint", "model_config": "{}"}
    checkpoint = changed.read(tmp_path / "a.apr")
    assert finding_ids(checkpoint) == {"apr-entrenar-transposed"}


def test_case_34_side_spellings(tmp_path: Path) -> None:
    # The keys of realizar's side formats F and G, in a file of container G.
    changed = draft()
    for key, spelling in {
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "eps",
        "intermediate_size": "intermediate_dim",
    }.items():
        changed.metadata[spelling] = changed.metadata.pop(key)
    changed.rename(hf_to_gguf)
    checkpoint = changed.read(tmp_path / "g.apr", sort=False, header_checksum=0, flags=0, footer=False, data_shift=4)
    assert checkpoint.config == TINY
    assert finding_ids(checkpoint) == {
        "apr-metadata-side-spelling",
        "apr-header-crc-zero",
        "apr-layout-flag-absent",
        "apr-index-unsorted",
        "apr-data-unaligned",
        "apr-footer-missing",
        "apr-gguf-names",
    }


def test_case_35_offsets_above_four_gib(tmp_path: Path) -> None:
    # A sparse file: the last tensor is moved 5 GiB away, and the hole takes no room on the disk.
    sound = draft()
    path = sound.write(tmp_path / "large.apr")
    data = bytearray(path.read_bytes())
    (index_at, data_at) = struct.unpack_from("<QQ", data, 24)
    name = b"model.norm.weight"
    entry = data.index(struct.pack("<H", len(name)) + name, index_at)
    at = entry + 2 + len(name) + 2 + 8
    moved = 5 << 30
    struct.pack_into("<Q", data, at, moved)
    path.write_bytes(data)
    with path.open("r+b") as stream:
        stream.seek(data_at + moved)
        stream.write(sound.tensors["model.norm.weight"].data)
        stream.truncate(data_at + moved + align(32))
    if os.stat(path).st_blocks * 512 > 1 << 30:
        pytest.skip("the file system has no sparse files")
    checkpoint = read_apr(path)
    assert finding_ids(checkpoint) == {"apr-footer-missing"}
    tensor = checkpoint.tensors["model.norm.weight"]
    assert tensor.offset == data_at + moved
    assert tensor.data.tobytes() == sound.tensors["model.norm.weight"].data


def test_case_32_blocks_that_apr_cannot_hold_are_widened(tmp_path: Path) -> None:
    from tiny_gguf import TINY as GGUF_MODEL
    from tiny_gguf import tiny_tensors, write_tiny_gguf

    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.convert import convert

    types = {layer(0, "self_attn.q_proj.weight"): "Q5_0", layer(1, "mlp.down_proj.weight"): "Q8_0"}
    source = write_tiny_gguf(tmp_path / "a.gguf", tiny_tensors(GGUF_MODEL, types=types, matrix="Q4_K", seed=3))
    for keep_blocks in (False, True):
        target = tmp_path / "a.apr"
        convert(source, target, keep_blocks=keep_blocks)
        before, after = open_checkpoint(source), read_apr(target, verify=True)
        # `apr import` turns the whole model to F32 for one such tensor; `keep_blocks` widens those alone.
        kept = {name for name, tensor in after.tensors.items() if tensor.block_type == "Q4_K"}
        assert bool(kept) == keep_blocks
        assert not kept & set(types)
        assert finding_ids(after) == set()
        for name, tensor in before.tensors.items():
            np.testing.assert_array_equal(after.tensors[name].decode(), tensor.decode())


def test_case_33_apr_to_gguf_to_apr(tmp_path: Path) -> None:
    from tiny_gguf import TINY as GGUF_MODEL
    from tiny_gguf import tiny_tensors, write_tiny_gguf

    from aprjax.checkpoint.convert import convert

    types = {
        layer(0, "self_attn.q_proj.weight"): "Q4_K",
        layer(0, "mlp.up_proj.weight"): "Q6_K",
        layer(1, "mlp.up_proj.weight"): "F32",
    }
    write_tiny_gguf(tmp_path / "a.gguf", tiny_tensors(GGUF_MODEL, types=types, matrix="F16"))
    convert(tmp_path / "a.gguf", tmp_path / "a.apr")
    convert(tmp_path / "a.apr", tmp_path / "b.gguf")
    convert(tmp_path / "b.gguf", tmp_path / "b.apr")
    first, second = read_apr(tmp_path / "a.apr"), read_apr(tmp_path / "b.apr")
    assert {tensor.block_type for tensor in first.tensors.values()} == {"F32", "F16", "Q4_K", "Q6_K"}
    for name, tensor in first.tensors.items():
        other = second.tensors[name]
        assert (other.shape, other.block_type, other.data.tobytes()) == (
            tensor.shape,
            tensor.block_type,
            tensor.data.tobytes(),
        )
    assert second.config == first.config
    assert second.vocabulary == first.vocabulary
    assert second.chat_template == first.chat_template
