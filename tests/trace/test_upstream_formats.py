"""Upstream's formats around stage files: their bytes, their arithmetic, their arguments."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_aprt import CONFIG, aprt_bytes, upstream_folder
from tiny import tiny_checkpoint, write_tiny
from trace_samples import TOKENS, same_bits, sample

from aprjax.checkpoint.types import CheckpointError
from aprjax.cli import main
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import save
from aprjax.trace.aprt import WHOLE_MODEL, open_aprt
from aprjax.trace.aprt_writer import write_aprt
from aprjax.trace.oracle import find_model, run_oracle
from aprjax.trace.provenance import NAME, Provenance, parse_provenance
from aprjax.trace.serde import serde_pretty
from aprjax.trace.stage_diff import diff_files, diff_folders, diff_traces, diff_values, parse_stage_diff

# What the later of upstream's two scripts writes (contracts.md 2.4: model, prompt, tokens, dtype, device, layers, …).
SCRIPTS = """\
# SHIP-007 HF FP16 reference stages
model:                 Qwen/Qwen2.5-Coder-7B-Instruct
prompt:                'What is  2+2?'
tokens:                [3, 1, 4, 1, 5]
dtype:                 torch.float16
device:                cuda
layers_captured:       [0, 1]
stages_per_layer:      ['embedding', 'attn_norm']
stages_whole_model:    [final_norm, lm_head]
with_attn_substages:   True
vocab_size:            11
argmax_token:          7
argmax_text:           ' \\n'
git_sha:               <git rev-parse failed: no>
transformers_version:  5.3.0
torch_version:         2.11.0+cu130
generated_utc:         2026-05-03T12:00:00.000001+00:00
"""


def test_a_provenance_comes_back_byte_for_byte() -> None:
    found = parse_provenance(SCRIPTS)
    assert found.text() == SCRIPTS
    assert found.rest == ""
    assert (found.tokens, found.layers, found.prompt) == (TOKENS, (0, 1), "What is  2+2?")
    assert found.by_heads
    older = "".join(line for line in SCRIPTS.splitlines(keepends=True) if "with_attn" not in line)
    assert parse_provenance(older).text() == older
    assert not parse_provenance(older).by_heads


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert parse_provenance(text).text() == text
    assert parse_provenance(SCRIPTS + text).text() == SCRIPTS + text


@pytest.mark.parametrize("value", ["[1, True]", "[-1]", "(1, 2)", "[1", "__import__('os')", "1" * 5000, "[" * 500])
def test_tokens_that_are_none(value: str) -> None:
    assert Provenance("", {"tokens": value}).tokens is None


def oracle_folder(folder: Path) -> dict[tuple[int, Stage], np.ndarray]:
    """What upstream's oracle script leaves for CONFIG's model: its places, and its heads one after the other."""
    values = upstream_folder(folder, head_rows=len(TOKENS))
    count = len(TOKENS)
    (folder / "embedding.bin").unlink()
    (folder / "layer-0" / "embedding.bin").write_bytes(aprt_bytes(0, values[OUTSIDE, Stage.EMBEDDING]))
    (folder / "lm_head.bin").write_bytes(aprt_bytes(-1, values[OUTSIDE, Stage.LM_HEAD][-1:]))
    for layer in (0, 1):
        for stage, heads in (
            (Stage.Q_POST_ROPE, 2),
            (Stage.K_POST_ROPE, 1),
            (Stage.ATTN_SCORES, 2),
            (Stage.ATTN_SOFTMAX, 2),
        ):
            by_head = np.stack(np.split(values[layer, stage], heads, axis=1))
            assert by_head.shape[:2] == (heads, count)
            (folder / f"layer-{layer}" / f"{stage}.bin").write_bytes(aprt_bytes(layer, by_head))
    (folder / NAME).write_text(SCRIPTS, encoding="utf-8")
    return values


def test_an_oracles_folder_says_its_tokens_and_its_layout(tmp_path: Path) -> None:
    values = oracle_folder(tmp_path)
    trace = open_aprt(tmp_path, config=CONFIG)
    assert trace.info.tokens == TOKENS
    assert set(trace) == set(values)
    for key in trace:
        expected = values[key][-1:] if key[1] in (Stage.FINAL_NORM, Stage.LM_HEAD) else values[key]
        assert same_bits(trace[key], expected), key
    with pytest.raises(CheckpointError, match=r"_PROVENANCE\.txt says that the tokens \[3, 1, 4, 1, 5\] were fed"):
        open_aprt(tmp_path, config=CONFIG, tokens=[1, 2])


def test_attention_maps_lie_head_by_head(tmp_path: Path) -> None:
    trace = sample()
    maps = np.arange(5 * 10, dtype=np.float32).reshape(5, 10)
    trace = replace(trace, values={**trace.values, (1, Stage.ATTN_SOFTMAX): maps})
    write_aprt(trace, tmp_path / "aprt")
    # Two heads of five tokens: all rows of the first head come first.
    expected = np.stack([maps[:, :5], maps[:, 5:]])
    assert (tmp_path / "aprt/layer-1/attn_softmax.bin").read_bytes() == aprt_bytes(1, expected)
    assert same_bits(open_aprt(tmp_path / "aprt")[1, Stage.ATTN_SOFTMAX], maps)
    sidecar = json.loads((tmp_path / "aprt/_aprjax.json").read_text())
    entry = next(e for e in sidecar["files"] if (e["layer"], e["stage"]) == (1, "attn_softmax"))
    assert entry["heads"] == 2
    entry["heads"] = 3
    (tmp_path / "aprt/_aprjax.json").write_text(json.dumps(sidecar))
    with pytest.raises(CheckpointError, match="3 heads, which do not share a width of 10"):
        open_aprt(tmp_path / "aprt")


# Upstream's own unit tests of its statistics, as facts: inputs and what they come to.
def test_upstreams_statistics() -> None:
    a, b = np.array([1, 2, 3, 4], np.float32), np.array([1, 2.5, 3, 4], np.float32)
    found = diff_values(a, b, paths=("a.bin", "b.bin"), layer=0, limit=5)
    assert (found.max_abs, found.max_index, found.rms) == (0.5, 1, 0.25)
    assert [row[0] for row in found.top] == [1, 0, 2, 3]
    zero = diff_values(
        np.zeros(5, np.float32), np.array([0.1, 0.5, -0.3, 0.05, 0.2], np.float32), paths=("a", "b"), layer=0, limit=3
    )
    assert [row[0] for row in zero.top] == [1, 2, 4]
    assert zero.cosine == 0.0
    same = diff_values(a, a, paths=("a", "b"), layer=0)
    assert same.identical
    assert same.cosine == pytest.approx(1, abs=1e-12)


def by_a_loop(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """rms and cosine as a loop computes them, an element after the other."""
    squares = dot = left = right = 0.0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        difference = float(np.abs(np.float32(x) - np.float32(y)))
        squares += difference * difference
        dot, left, right = dot + x * y, left + x * x, right + y * y
    cosine = dot / (left**0.5 * right**0.5) if left > 0 and right > 0 else 0.0
    return float(np.float32((squares / len(a)) ** 0.5)), cosine


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_sums_are_a_loops_to_the_last_bit(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    a = (generator.normal(size=count) * 10 ** generator.uniform(-3, 3, count)).astype(np.float32)
    b = (a * (1 + generator.normal(size=count) * 1e-3)).astype(np.float32)
    found = diff_values(a, b, paths=("a", "b"), layer=3)
    assert (found.rms, found.cosine) == by_a_loop(a, b)
    assert parse_stage_diff(json.loads(found.to_text())) == found


def test_the_printed_document(tmp_path: Path) -> None:
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(aprt_bytes(-1, np.array([1, 2e-5, -3], np.float32)))
    second.write_bytes(aprt_bytes(-1, np.array([1, 1e-5, -3], np.float32)))
    found = diff_files(first, second, limit=1)
    step = float(np.float32(2e-5) - np.float32(1e-5))
    cosine = repr(found.cosine)
    rms = repr(found.rms).replace("e-0", "e-")
    assert found.to_text() == (
        "{\n"
        '  "schema": "apr-stage-diff-v1",\n'
        f'  "path_a": "{first}",\n'
        f'  "path_b": "{second}",\n'
        '  "layer": "whole-model",\n'
        '  "dim_product": 3,\n'
        f'  "max_abs_diff": {serde_pretty(step)},\n'
        '  "max_abs_diff_index": 1,\n'
        f'  "rms_diff": {rms},\n'
        f'  "cosine_sim": {cosine},\n'
        '  "top_diffs": [\n'
        "    {\n"
        '      "index": 1,\n'
        f'      "a": {serde_pretty(float(np.float32(2e-5)))},\n'
        f'      "b": {serde_pretty(float(np.float32(1e-5)))},\n'
        f'      "abs_diff": {serde_pretty(step)}\n'
        "    }\n"
        "  ]\n"
        "}\n"
    )


# Python's form on the left, Rust's on the right (ryu's: exponents from 1e16 on and below 1e-5).
NUMBERS = [
    (339.0, "339.0"),
    (9.244493748411102, "9.244493748411102"),
    (1e15, "1000000000000000.0"),
    (1e16, "1e16"),
    (1.2345678901234568e17, "1.2345678901234568e17"),
    (1e-5, "0.00001"),
    (-1.3277331549664009e-05, "-0.000013277331549664009"),
    (9.9e-06, "9.9e-6"),
    (5e-324, "5e-324"),
    (0.0, "0.0"),
    (-0.0, "-0.0"),
    (float("nan"), "null"),
    (float("inf"), "null"),
]


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers_as_rust_writes_them(value: float, text: str) -> None:
    assert serde_pretty(value) == text
    assert serde_pretty({"é": [value, {}, []]}) == f'{{\n  "é": [\n    {text},\n    {{}},\n    []\n  ]\n}}'


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_comes_back(value: float) -> None:
    assert struct.pack("<d", json.loads(serde_pretty(value))) == struct.pack("<d", value)


def test_what_upstream_refuses_is_refused(tmp_path: Path) -> None:
    files = {"a": (0, 2), "longer": (0, 3), "deeper": (7, 2)}
    for name, (layer, count) in files.items():
        (tmp_path / name).write_bytes(aprt_bytes(layer, np.ones(count, np.float32)))
    with pytest.raises(CheckpointError, match=r"2 elements, and .*longer has 3"):
        diff_files(tmp_path / "a", tmp_path / "longer")
    with pytest.raises(CheckpointError, match="layer 0 against layer 7"):
        diff_files(tmp_path / "a", tmp_path / "deeper")
    (tmp_path / "gguf").write_bytes(b"GGUF" + bytes(8))
    (tmp_path / "short").write_bytes(b"AP")
    for name in ("gguf", "short", "none"):
        assert main(["diff", str(tmp_path / "a"), str(tmp_path / name)]) == 4


def test_folders_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_aprt(sample(), one)
    write_aprt(sample(), two)
    found = diff_folders(one, two)
    # NaN differs from itself in no element that upstream would count, and its rms is none.
    assert {diff.path_a.rpartition("/")[2] for diff in found.diffs[:2]} == {"embedding.bin", "attn_norm.bin"}
    assert found.diffs[-1].layer == WHOLE_MODEL
    (two / "layer-1" / "ffn_up.bin").unlink()
    (two / "layer-0" / "ffn_up.bin").write_bytes(aprt_bytes(0, np.ones(3, np.float32)))
    assert main(["diff", str(one), str(two), "--json", "-"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert set(document["unmeasured"]) == {"layer 0 ffn_up", "layer 1 ffn_up"}
    assert all(diff["schema"] == "apr-stage-diff-v1" for diff in document["diffs"])
    assert main(["diff", str(one), str(two / "lm_head.bin")]) == 2
    assert main(["diff", str(one), str(two)]) == 1
    assert "unmeasured: layer 1 ffn_up" in capsys.readouterr().out


def test_folders_that_agree_or_lack_a_stage(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "layer-0").mkdir(parents=True)
        (tmp_path / name / "layer-0" / "ffn_up.bin").write_bytes(aprt_bytes(0, np.ones(3, np.float32)))
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    (tmp_path / "one" / "lm_head.bin").write_bytes(aprt_bytes(-1, np.ones(3, np.float32)))
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 3


def test_saved_traces_are_compared_like_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save(sample(), one)
    less = {key: value for key, value in sample().values.items() if key != (1, Stage.FFN_UP)}
    save(replace(sample(), values=less), two)
    found = diff_traces(sample(), replace(sample(), values=less))
    assert (len(found.diffs), set(found.unmeasured)) == (len(sample()) - 1, {"layer 1 ffn_up"})
    assert found.diffs[0].path_a == "model.gguf/layer-0/embedding.bin"
    assert "layer 1 ffn_up" in found._repr_html_()
    assert main(["diff", str(one), str(two), "--json", "-"]) == 1
    assert len(json.loads(capsys.readouterr().out)["diffs"]) == len(found.diffs)
    other = replace(sample(), info=replace(sample().info, tokens=(3, 1, 4, 1, 6)))
    with pytest.raises(CheckpointError, match="tokens differ"):
        diff_traces(sample(), other)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "v2"},
        {"layer": -1},
        {"dim_product": "3"},
        {"rms_diff": True},
        {"top_diffs": [{}]},
        {"cosine_sim": "1"},
    ],
)
def test_a_document_that_is_none(change: dict[str, object]) -> None:
    document = diff_values(np.ones(2, np.float32), np.ones(2, np.float32), paths=("a", "b"), layer=0).to_json()
    with pytest.raises(ValueError, match=r".+"):
        parse_stage_diff(document | change)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.apr", tiny_checkpoint()).path


def test_a_models_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        find_model("Qwen/Qwen2.5-Coder-7B-Instruct")
    snapshot = tmp_path / "models--Qwen--Qwen2.5-Coder-7B-Instruct" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", encoding="ascii")
    assert find_model("Qwen/Qwen2.5-Coder-7B-Instruct") == str(snapshot)
    assert find_model("llama.cpp:a/b.gguf") == "llama.cpp:a/b.gguf"


def test_the_oracle_refuses_what_it_cannot_compute(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="computed by transformers"):
        run_oracle(str(model), tmp_path / "o", dtype="float16", prompt="a")
    with pytest.raises(CheckpointError, match="expected layers from 0 to"):
        run_oracle(str(model), tmp_path / "o", layers=(99,), prompt="a")
    with pytest.raises(CheckpointError, match="jax has no device"):
        run_oracle(str(model), tmp_path / "o", device="abacus", prompt="a")
    assert main(["oracle", "--model", str(model), "--output", str(tmp_path / "o"), "--layers", "x"]) == 2
    assert not (tmp_path / "o").exists()


def test_the_oracles_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "oracle"
    asked = ["oracle", "--model", str(model), "--prompt", "ab", "--output", str(out), "--layers", "1", "--json", "-"]
    assert main(asked) == 0
    summary = json.loads(capsys.readouterr().out)
    told = parse_provenance((out / NAME).read_text(encoding="utf-8"))
    assert (told.prompt, told.layers, told.by_heads) == ("ab", (1,), True)
    assert told.tokens == tuple(summary["tokens"])
    names = [file["path"] for file in summary["files"]]
    # The script's places: the embedding among layer 0's stages whatever the layers, both heads beside the layers.
    assert names[0] == "layer-0/embedding.bin"
    assert names[-2:] == ["final_norm.bin", "lm_head.bin"]
    assert {name.split("/")[0] for name in names[1:-2]} == {"layer-1"}
    assert (out / "layer-0/embedding.bin").read_bytes()[:8] == b"APRT" + struct.pack("<I", 0)
    logits = np.frombuffer((out / "lm_head.bin").read_bytes()[12:], "<f4")
    assert int(logits.argmax()) == summary["argmax_token"] == int(told.entries["argmax_token"])
    # Read back with its sidecar, and without one by the provenance and the model's config alone.
    vouched = open_aprt(out)
    (out / "_aprjax.json").unlink()
    found = open_aprt(out, config=tiny_checkpoint().config)
    assert set(found) == set(vouched)
    for key in found:
        assert same_bits(found[key], vouched[key]), key
    assert (1, Stage.ATTN_SCORES) in set(found)
    # Post-rope queries lie head by head.
    queries = np.frombuffer((out / "layer-1/q_post_rope.bin").read_bytes()[12:], "<f4")
    heads = tiny_checkpoint().config.num_heads
    by_head = queries.reshape(heads, len(found.info.tokens), -1)
    assert same_bits(found[1, Stage.Q_POST_ROPE][:, : by_head.shape[2]].copy(), by_head[0].copy())
