"""The fault planter: each fault changes what it names and nothing else, and the file stays sound."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from apr_drafts import WIDE, Part, draft, finding_ids, random_blocks

from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.names import hf_to_gguf
from aprjax.checkpoint.types import Checkpoint
from aprjax.checkpoint.values import scan_values

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "faults" / "plant.py"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def planter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plant", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plant"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One layer with Q4_K and Q6_K matrices of 256 columns."""
    model = draft(WIDE)
    for name, part in model.tensors.items():
        if name.endswith("_proj.weight"):
            kind = ("Q6_K", 14) if "down" in name else ("Q4_K", 12)
            blocks = random_blocks(kind[0], part.shape[0] * part.shape[1] // 256, seed=len(name))
            model.tensors[name] = Part(kind[1], part.shape, blocks)
    return model.write(tmp_path / "source.apr")


def planted(planter: ModuleType, source: Path, fault: str, **request: Any) -> tuple[Checkpoint, Checkpoint, dict]:
    target = source.with_name("planted.apr")
    report = planter.plant(source, target, fault, planter.Request(**request))
    return read_apr(source, verify=True), read_apr(target, verify=True), report


def layer(leaf: str) -> str:
    return f"model.layers.0.{leaf}"


def changed_tensors(before: Checkpoint, after: Checkpoint) -> set[str]:
    names = set(before.tensors) | set(after.tensors)
    return {
        name
        for name in names
        if name not in before.tensors
        or name not in after.tensors
        or not np.array_equal(before.tensors[name].data, after.tensors[name].data)
    }


def changed_keys(before: Checkpoint, after: Checkpoint) -> set[str]:
    keys = set(before.metadata) | set(after.metadata)
    return {key for key in keys if before.metadata.get(key) != after.metadata.get(key)}


def test_a_file_without_a_fault_is_copied_byte_for_byte(planter: ModuleType, source: Path) -> None:
    target = source.with_name("copy.apr")
    sys.modules["container"].AprFile.read(source).write(target)
    assert target.read_bytes() == source.read_bytes()


# fault, what is asked for, changed keys, changed tensors, expected site or finding, findings of the reader
FAULTS = [
    ("rope-theta", {}, {"rope_theta"}, set(), (0, "q_post_rope"), {"apr-rope-theta-unusual"}),
    ("rope-type", {}, {"rope_type"}, set(), (0, "q_post_rope"), {"apr-rope-type-wrong"}),
    ("rms-eps", {}, {"rms_norm_eps"}, set(), (0, "attn_norm"), {"apr-eps-unusual"}),
    ("k-bias-zero", {"layer": 0}, set(), {layer("self_attn.k_proj.bias")}, (0, "qkv_bias"), set()),
    (
        "gate-up-swapped",
        {"layer": 0},
        set(),
        {layer("mlp.gate_proj.weight"), layer("mlp.up_proj.weight")},
        (0, "ffn_gate"),
        set(),
    ),
    ("o-proj-transposed", {"layer": 0}, set(), {layer("self_attn.o_proj.weight")}, (0, "attn_out"), set()),
    ("nibbles-interleaved", {"layer": 0}, set(), {layer("mlp.gate_proj.weight")}, (0, "ffn_gate"), set()),
    (
        "scale-bits-dropped",
        {},
        set(),
        {layer(f"self_attn.{p}_proj.weight") for p in "qkvo"} | {layer(f"mlp.{p}_proj.weight") for p in ("gate", "up")},
        (0, "qkv_matmul"),
        set(),
    ),
    (
        "scale-bits-dropped",
        {"tensor": layer("mlp.up_proj.weight")},
        set(),
        {layer("mlp.up_proj.weight")},
        (0, "ffn_up"),
        set(),
    ),
    ("head-rows-shifted", {}, set(), {"lm_head.weight"}, (-1, "lm_head"), set()),
    ("token-row-overwritten", {}, set(), {EMBEDDING}, (-1, "embedding"), set()),
    ("nan-weight", {"layer": 0}, set(), {layer("post_attention_layernorm.weight")}, (0, "ffn_norm"), set()),
    (
        "nan-weight",
        {"tensor": layer("mlp.down_proj.weight")},
        set(),
        {layer("mlp.down_proj.weight")},
        (0, "ffn_out"),
        set(),
    ),
    ("norm-scaled", {"layer": 0}, set(), {layer("input_layernorm.weight")}, (0, "attn_norm"), set()),
    ("norm-scaled", {"tensor": "model.norm.weight"}, set(), {"model.norm.weight"}, (-1, "final_norm"), set()),
    ("tensor-missing", {"layer": 0}, set(), {layer("mlp.up_proj.weight")}, "missing-tensor", {"missing-tensor"}),
    (
        "tensor-missing",
        {"tensor": layer("self_attn.v_proj.bias")},
        set(),
        {layer("self_attn.v_proj.bias")},
        "missing-bias",
        {"missing-bias"},
    ),
    ("tensor-missing", {"tensor": "lm_head.weight"}, set(), {"lm_head.weight"}, "apr-head-absent", {"apr-head-absent"}),
    ("header-crc", {}, set(), set(), "apr-header-crc-wrong", {"apr-header-crc-wrong"}),
]


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case[0])
def test_each_fault_changes_what_it_names(planter: ModuleType, source: Path, case: tuple) -> None:
    fault, request, keys, tensors, expected, findings = case
    before, after, report = planted(planter, source, fault, **request)
    assert changed_keys(before, after) == keys == set(report["keys"])
    assert changed_tensors(before, after) == tensors == set(report["tensors"])
    site = {"finding": expected} if isinstance(expected, str) else {"layer": expected[0], "stage": expected[1]}
    assert report["expected"] == site
    assert finding_ids(after) - finding_ids(before) == findings


def test_every_fault_is_tested(planter: ModuleType) -> None:
    # Those of tokenizer and template are in tests/bisect/test_tokens_planted.py.
    assert {case[0] for case in FAULTS} == set(planter.FAULTS) - set(planter.TEXT_FAULTS)


def test_metadata_edits_leave_every_other_byte_of_the_text(planter: ModuleType, tmp_path: Path) -> None:
    # Another key whose text looks like the one that is edited, and odd spacing, which must survive.
    model = draft()
    model.metadata |= {"note": '"rope_type":2', "nested": {"rope_type": 2}}
    source = model.write(tmp_path / "source.apr")
    file = sys.modules["container"].AprFile.read(source)
    text = file.metadata_text
    file.set_key("rope_type", 0)
    differing = [i for i, (a, b) in enumerate(zip(text, file.metadata_text, strict=True)) if a != b]
    assert len(differing) == 1
    assert json.loads(file.metadata_text)["nested"] == {"rope_type": 2}
    with pytest.raises(sys.modules["container"].PlantError, match="no key"):
        file.set_key("absent", 1)


def test_the_transposed_projection_is_the_transpose(planter: ModuleType, source: Path) -> None:
    before, after, _ = planted(planter, source, "o-proj-transposed", layer=0)
    name = layer("self_attn.o_proj.weight")
    original, turned = before.tensors[name].decode(), after.tensors[name].decode()
    correlation = np.corrcoef(original.T.reshape(-1), turned.reshape(-1))[0, 1]
    # Q4_K is encoded a second time, which costs some precision but not the resemblance.
    assert correlation > 0.99
    assert abs(np.corrcoef(original.reshape(-1), turned.reshape(-1))[0, 1]) < 0.1


def test_interleaved_nibbles_hold_the_same_numbers(planter: ModuleType, source: Path) -> None:
    before, after, _ = planted(planter, source, "nibbles-interleaved", layer=0)
    name = layer("mlp.gate_proj.weight")
    old, new = (c.tensors[name].data.reshape(-1, 144) for c in (before, after))
    assert (old[:, :16] == new[:, :16]).all()
    first, second = old[0, 16:48] & 15, old[0, 16:48] >> 4
    in_order = np.concatenate([first, second])
    assert (new[0, 16:48] & 15 == in_order[0::2]).all()
    assert (new[0, 16:48] >> 4 == in_order[1::2]).all()


def test_dropped_bits_lower_the_upper_scales_only(planter: ModuleType, source: Path) -> None:
    name = layer("mlp.up_proj.weight")
    before, after, _ = planted(planter, source, "scale-bits-dropped", tensor=name)
    kind = gguf.GGMLQuantizationType.Q4_K
    old, new = (
        gguf.quants.dequantize(c.tensors[name].data.reshape(-1, 144), kind).reshape(-1, 8, 32) for c in (before, after)
    )
    assert (old[:, :4] == new[:, :4]).all()
    assert (old[:, 4:] != new[:, 4:]).any()


def test_the_head_is_shifted_by_whole_rows(planter: ModuleType, source: Path) -> None:
    before, after, _ = planted(planter, source, "head-rows-shifted")
    head = before.tensors["lm_head.weight"].decode()
    np.testing.assert_array_equal(after.tensors["lm_head.weight"].decode(), np.roll(head, 1, axis=0))


def test_only_the_tokens_row_is_overwritten(planter: ModuleType, source: Path) -> None:
    before, after, _ = planted(planter, source, "token-row-overwritten")
    old, new = before.tensors[EMBEDDING].decode(), after.tensors[EMBEDDING].decode()
    assert before.vocabulary is not None
    row = before.vocabulary.tokens.index("<|im_start|>")
    assert (np.flatnonzero((old != new).any(axis=1)) == [row]).all()
    assert (new[row] == old[0]).all()


@pytest.mark.parametrize("name", [layer("post_attention_layernorm.weight"), layer("mlp.gate_proj.weight")])
def test_nan_is_found(planter: ModuleType, source: Path, name: str) -> None:
    _, after, _ = planted(planter, source, "nan-weight", tensor=name)
    assert [(f.id, f.tensor) for f in scan_values(after) if f.id == "values-not-finite"] == [
        ("values-not-finite", name)
    ]


def test_gguf_names_are_found(planter: ModuleType, tmp_path: Path) -> None:
    model = draft()
    model.rename(hf_to_gguf)
    before, after, report = planted(planter, model.write(tmp_path / "source.apr"), "k-bias-zero", layer=1)
    name = "model.layers.1.self_attn.k_proj.bias"
    assert changed_tensors(before, after) == {name}
    assert not after.tensors[name].decode().any()
    assert report["expected"] == {"layer": 1, "stage": "qkv_bias"}


@pytest.mark.parametrize(
    ("fault", "request_", "message"),
    [
        ("k-bias-zero", {}, "layer"),
        ("nibbles-interleaved", {"layer": 0}, "packing"),
        ("scale-bits-dropped", {}, "no Q4_K tensor"),
        ("token-row-overwritten", {"token": "nobody"}, "no token"),
    ],
)
def test_faults_that_cannot_be_planted(
    planter: ModuleType, tmp_path: Path, fault: str, request_: dict[str, Any], message: str
) -> None:
    source = draft().write(tmp_path / "source.apr")
    with pytest.raises(sys.modules["container"].PlantError, match=message):
        planter.plant(source, tmp_path / "planted.apr", fault, planter.Request(**request_))
    assert [path.name for path in tmp_path.iterdir()] == ["source.apr"]


def test_the_command(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "planted.apr"
    run = subprocess.run(
        [sys.executable, SCRIPT, source, target, "--fault", "rope-theta"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["expected"] == {"layer": 0, "stage": "q_post_rope"}
    assert read_apr(target).config.rope_theta == 10000
    listed = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True, check=True)
    assert "gate-up-swapped" in listed.stdout
    target.write_bytes(b"no model")
    refused = subprocess.run(
        [sys.executable, SCRIPT, target, tmp_path / "x.apr", "--fault", "rope-theta"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "no APR v2 file" in refused.stderr
    assert "Traceback" not in refused.stderr
