"""`identify` on tiny models: dumps that are not what their labels say are recognised, sound and faulty runs are not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bisect_traces import LAYERS, TOKENS, Fault, faulty_trace, sound_trace, tiny_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprjax.bisect.confidence import Level
from aprjax.bisect.explain.identity import identify
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.checkpoint.types import Checkpoint
from aprjax.cli import main
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Stage
from aprjax.text import Tokenizer
from aprjax.text import wrap as wrap_chat
from aprjax.trace import MemoryTrace
from aprjax.trace.aprt_writer import write_aprt

LLAMA = PRESETS["llama.cpp"]
COUNT, HEADS, HEAD = len(TOKENS), 4, 64
Values = dict[tuple[int, Stage], np.ndarray]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_file(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def sound(file: Checkpoint) -> MemoryTrace:
    return sound_trace(file, LLAMA)


def upstream_folder(folder: Path, values: Values) -> Path:
    """What `apr trace --save-tensor` leaves: bare numbers, written by the format's own words."""
    for (layer, stage), value in values.items():
        target = folder / (f"{stage}.bin" if layer < 0 else f"layer-{layer}/{stage}.bin")
        target.parent.mkdir(parents=True, exist_ok=True)
        if stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX) and value.ndim == 2:
            lying = value.reshape(len(value), HEADS, -1).transpose(1, 0, 2)  # head by head, as upstream has them
        else:
            lying = value
        body = np.ascontiguousarray(lying, "<f4").tobytes()
        header = b"APRT" + struct.pack("<II", 0xFFFFFFFF if layer < 0 else layer, len(body) // 4)
        target.write_bytes(header + body)
    return folder


def altered(trace: MemoryTrace, changes: Values) -> MemoryTrace:
    return replace(trace, values={**trace.values, **changes})


def by_id(findings: tuple[IdentityFinding, ...]) -> dict[str, IdentityFinding]:
    return {finding.id: finding for finding in findings}


def test_a_sound_trace_is_what_it_says(file: Checkpoint, sound: MemoryTrace, tmp_path: Path) -> None:
    assert identify(sound, file) == ()
    # Another arithmetic drifts, and is no mistake of labels.
    assert identify(sound, file, arithmetic=PRESETS["float32"]) == ()
    assert identify(upstream_folder(tmp_path / "aprt", dict(sound.values)), file, tokens=TOKENS, arithmetic=LLAMA) == ()
    write_aprt(sound, tmp_path / "vouched")
    from aprjax.trace.aprt import open_aprt

    assert identify(open_aprt(tmp_path / "vouched"), file) == ()


def masked(value: np.ndarray) -> np.ndarray:
    by_head = value.reshape(COUNT, HEADS, COUNT).copy()
    by_head[~np.broadcast_to(np.tri(COUNT, dtype=bool)[:, None], by_head.shape)] = -np.inf
    return by_head.reshape(COUNT, -1)


# What a stage's file holds in place of its value, by the trace's own values; and what must be said.
CAPTURED: dict[str, tuple[Stage, Callable[[Values, int], np.ndarray], str]] = {
    "before the bias": (Stage.QKV_BIAS, lambda v, n: v[n, Stage.QKV_MATMUL], "qkv_matmul"),
    "after the bias": (Stage.QKV_MATMUL, lambda v, n: v[n, Stage.QKV_BIAS], "qkv_bias"),
    "before the rotation": (Stage.K_POST_ROPE, lambda v, n: v[n, Stage.QKV_BIAS][:, 256:384], "before the rotation"),
    "before bias and rotation": (
        Stage.Q_POST_ROPE,
        lambda v, n: v[n, Stage.QKV_MATMUL][:, :256],
        "before rotation and bias",
    ),
    "before the add": (Stage.POST_ATTN_RESIDUAL, lambda v, n: v[n, Stage.ATTN_OUT], "attn_out"),
    "the branch not added": (
        Stage.POST_ATTN_RESIDUAL,
        lambda v, n: v[n - 1, Stage.POST_FFN_RESIDUAL] if n else v[OUTSIDE, Stage.EMBEDDING],
        "",
    ),
    "not scaled": (Stage.ATTN_SCORES, lambda v, n: v[n, Stage.ATTN_SCORES] * 8, "before the scale"),
    "after the mask": (Stage.ATTN_SCORES, lambda v, n: masked(v[n, Stage.ATTN_SCORES]), "after the mask"),
    "softmax for scores": (Stage.ATTN_SCORES, lambda v, n: v[n, Stage.ATTN_SOFTMAX], "attn_softmax"),
    "gate for silu": (Stage.FFN_SILU, lambda v, n: v[n, Stage.FFN_GATE], "ffn_gate"),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_value_taken_elsewhere_is_named(file: Checkpoint, sound: MemoryTrace, tmp_path: Path, name: str) -> None:
    stage, make, words = CAPTURED[name]
    values = dict(sound.values)
    throughout = {(layer, stage): make(values, layer) for layer in range(LAYERS)}
    one = {(1, stage): make(values, 1)}
    for changes, layers in ((throughout, (0, 1)), (one, (1,))):
        (finding, *others) = identify(altered(sound, changes), file)
        assert finding.id == "capture-point"
        assert finding.severity == "error"
        assert finding.stages == (stage,)
        # In layer 0 the residual before the add is the embedding: another place, another finding.
        assert (finding.layers == layers and not others) or name == "the branch not added"
        assert words in finding.sentence
        assert finding.confidence.level is Level.STRONG
    folder = upstream_folder(tmp_path / "aprt", values | throughout)
    assert {f.id for f in identify(folder, file, tokens=TOKENS, arithmetic=LLAMA)} == {"capture-point"}


def test_a_norm_taken_before_its_weight(file: Checkpoint, sound: MemoryTrace) -> None:
    weight = file.tensors["model.layers.1.post_attention_layernorm.weight"].decode()
    (finding,) = identify(altered(sound, {(1, Stage.FFN_NORM): sound[1, Stage.FFN_NORM] / weight}), file)
    assert finding.id == "capture-point"
    assert "before the weight" in finding.sentence


def test_the_labels_of_layers(file: Checkpoint, sound: MemoryTrace) -> None:
    one = altered(sound, {(1, Stage.POST_FFN_RESIDUAL): sound[0, Stage.POST_FFN_RESIDUAL]})
    (finding,) = identify(one, file)
    assert finding.id == "layer-shifted"
    assert "layer before" in finding.sentence
    exchanged = {key if key[0] < 0 else (1 - key[0], key[1]): value for key, value in sound.values.items()}
    found = identify(replace(sound, values=exchanged), file)
    assert [(f.id, f.layers, len(f.stages)) for f in found] == [("layer-shifted", (n,), 17) for n in (0, 1)]
    assert "every stage of layer 0" in found[0].sentence


# Rows of a file of upstream's that are not all positions in order.
ROWS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, str]] = {
    "last": (lambda v: v[-1:], "token-selection", f"position {COUNT - 1} alone, the last of {COUNT}"),
    "first": (lambda v: v[:1], "token-selection", "position 0 alone, the first"),
    "another": (lambda v: v[4:5], "token-selection", "position 4 alone"),
    "some": (lambda v: v[3:7], "token-selection", "positions 3 to 6"),
    "mean": (lambda v: v.mean(axis=0)[None], "rows-averaged", "the mean over all"),
    "repeated": (lambda v: np.repeat(v[-1:], COUNT, axis=0), "token-selection", "position 10 in every row"),
    "reversed": (lambda v: v[::-1], "rows-reordered", "reverse order"),
    "shifted": (lambda v: np.roll(v, 1, axis=0), "rows-reordered", "shifted by -1"),
    "permuted": (lambda v: v[[1, 0, *range(2, COUNT)]], "rows-reordered", "the positions 1, 0, 2"),
    "padded": (lambda v: np.pad(v, ((0, 5), (0, 0))), "rows-padded", "5 rows of zeros"),
    "transposed": (lambda v: v.T, "layout", "[width, position]"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_other_positions(file: Checkpoint, sound: MemoryTrace, tmp_path: Path, name: str) -> None:
    change, kind, words = ROWS[name]
    stages = (Stage.FFN_GATE, Stage.FFN_UP, Stage.FFN_SWIGL)
    changes = {(layer, stage): change(sound[layer, stage]) for layer in range(LAYERS) for stage in stages}
    (finding,) = identify(
        upstream_folder(tmp_path, dict(sound.values) | changes), file, tokens=TOKENS, arithmetic=LLAMA
    )
    assert (finding.id, finding.stages, finding.layers) == (kind, stages, (0, 1))
    assert words in finding.sentence


def test_the_story_of_upstream(file: Checkpoint, sound: MemoryTrace, tmp_path: Path) -> None:
    """All tokens on one side, the last on the other, and qkv before and after the bias (contracts.md 2.1 and 2.2)."""
    other = {key: value[-1:] for key, value in sound.values.items() if key[0] >= 0}
    other |= {(layer, Stage.QKV_BIAS): sound[layer, Stage.QKV_MATMUL][-1:] for layer in range(LAYERS)}
    found = by_id(
        identify(upstream_folder(tmp_path, dict(sound.values) | other), file, tokens=TOKENS, arithmetic=LLAMA)
    )
    assert set(found) == {"capture-point", "token-selection"}
    assert "qkv_bias of layers 0 to 1" in found["capture-point"].sentence
    selection = found["token-selection"]
    assert selection.evidence["rows"] == [COUNT - 1]
    told = selection.evidence["standard_deviation"]
    # The ratio that a comparison would have reported is the file's own: nothing differs but the tokens.
    value = sound[told["layer"], Stage(told["stage"])].astype(np.float64)
    assert told["ratio"] == pytest.approx(value.std(ddof=1) / value[-1].std(ddof=1), rel=0.05)
    json.dumps([finding.to_json() for finding in found.values()], allow_nan=False)
    assert "token-selection" in selection._repr_html_()


def test_a_trimmed_last_layer_loses_nothing(file: Checkpoint, sound: MemoryTrace, tmp_path: Path) -> None:
    behind = LAYER_STAGES[LAYER_STAGES.index(Stage.ATTN_OUT) :]
    trimmed = {(1, stage): sound[1, stage][-1:] for stage in behind}
    (finding,) = identify(
        upstream_folder(tmp_path, dict(sound.values) | trimmed), file, tokens=TOKENS, arithmetic=LLAMA
    )
    assert (finding.id, finding.severity, finding.layers) == ("rows-trimmed", "info", (1,))


def test_orders_of_axes(file: Checkpoint, sound: MemoryTrace, tmp_path: Path) -> None:
    by_head = sound[1, Stage.ATTENTION].reshape(COUNT, HEADS, HEAD).transpose(1, 0, 2)
    scores = {(1, s): sound[1, s].reshape(COUNT, HEADS, COUNT) for s in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX)}
    scores[1, Stage.ATTN_SOFTMAX] = scores[1, Stage.ATTN_SOFTMAX].transpose(1, 2, 0)
    changes = scores | {(1, Stage.ATTENTION): by_head}
    q, k, v = np.split(sound[0, Stage.QKV_BIAS], (256, 384), axis=1)
    changes[0, Stage.QKV_BIAS] = np.concatenate([k, q, v], axis=1)
    found = identify(upstream_folder(tmp_path, dict(sound.values) | changes), file, tokens=TOKENS, arithmetic=LLAMA)
    assert {f.id for f in found} == {"layout"}
    said = " ".join(f.sentence for f in found)
    for words in ("position by position", "[head, key, query]", "[head, position, channel]", "the order k, q, v"):
        assert words in said


def test_half_precision(file: Checkpoint, sound: MemoryTrace) -> None:
    for name, through in (("float16", np.float16), ("bfloat16", None)):
        values = {
            key: value.astype(through).astype(np.float32)
            if through
            else (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            for key, value in sound.values.items()
        }
        (finding,) = identify(replace(sound, values=values), file)
        # One stage alone is what an engine rounds.
        key = (1, Stage.ATTN_SOFTMAX)
        assert identify(altered(sound, {key: values[key]}), file) == ()
        assert finding.id == "half-precision"
        assert f"dumped as {name}" in finding.sentence


def test_not_a_number_is_named_with_its_first_place(file: Checkpoint, sound: MemoryTrace) -> None:
    value = sound[1, Stage.FFN_OUT].copy()
    value[3, 7] = np.nan
    last = np.full_like(sound[OUTSIDE, Stage.LM_HEAD], np.nan)
    broken = altered(sound, {(1, Stage.FFN_OUT): value, (OUTSIDE, Stage.LM_HEAD): last})
    (finding,) = identify(broken, file)
    assert finding.id == "not-finite"
    assert "layer 1, ffn_out holds nan at position 3, channel 7" in finding.sentence
    assert finding.evidence["inherited"] is False
    without = replace(broken, values={k: v for k, v in broken.values.items() if k != (1, Stage.FFN_SWIGL)})
    assert "may come from there" in identify(without, file)[0].sentence


# Tokens that are claimed of a trace of TOKENS, and what must be said of them.
CLAIMED: dict[str, tuple[Callable[[Checkpoint], tuple[int, ...]], str]] = {
    "the first left out": (lambda f: (f.vocabulary.bos_token_id, *TOKENS), "bos-missing"),  # type: ignore[union-attr]
    "shifted": (lambda f: (1, *TOKENS[:-1]), "tokens-shifted"),
    "reversed": (lambda f: TOKENS[::-1], "tokens-reordered"),
    "permuted": (lambda f: (*TOKENS[:4], TOKENS[5], TOKENS[4], *TOKENS[6:]), "tokens-reordered"),
    "every id one less": (lambda f: tuple(t - 1 for t in TOKENS), "tokens-offset"),
    "one more before": (lambda f: TOKENS[1:], "tokens-shifted"),
    "two more": (lambda f: TOKENS[1:-1], "tokens-added"),
    "others": (lambda f: (*TOKENS[:4], 77, *TOKENS[5:]), "tokens-differ"),
}


@pytest.mark.parametrize("name", CLAIMED)
def test_the_tokens_that_were_run(file: Checkpoint, sound: MemoryTrace, tmp_path: Path, name: str) -> None:
    claim, kind = CLAIMED[name]
    folder = upstream_folder(tmp_path, {k: v for k, v in sound.values.items() if k[1] is not Stage.LM_HEAD})
    found = by_id(identify(folder, file, tokens=claim(file), arithmetic=LLAMA))
    assert set(found) == {kind}
    assert found[kind].evidence["run"] == list(TOKENS)


def test_tokens_that_nobody_says(file: Checkpoint, sound: MemoryTrace, tmp_path: Path) -> None:
    (finding,) = identify(upstream_folder(tmp_path / "a", dict(sound.values)), file)
    assert finding.id == "tokens-recovered"
    assert finding.evidence["run"] == list(TOKENS)
    assert finding.confidence.level is Level.CERTAIN
    # Without the embedding the directions of the first norm say it.
    values = {key: value for key, value in sound.values.items() if key[1] is not Stage.EMBEDDING}
    (finding,) = identify(upstream_folder(tmp_path / "b", values), file)
    assert finding.evidence["run"] == list(TOKENS)


TEXT = "if a\n\n<"
TEXTS = {
    "bos-prepended": (lambda f, ids: [f.vocabulary.bos_token_id, *ids], "none"),
    "template-added": (lambda f, ids: Tokenizer.from_checkpoint(f).encode(wrap_chat(TEXT, "once")), "none"),
    "template-wrapped-twice": (
        lambda f, ids: Tokenizer.from_checkpoint(f).encode(wrap_chat(TEXT, "twice")),
        "once",
    ),
    "template-missing": (lambda f, ids: ids, "once"),
    "other-tokenization": (lambda f, ids: [f.vocabulary.tokens.index(c) for c in "ifĠaĊĊ<"], "none"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_the_tokens_say(file: Checkpoint, kind: str) -> None:
    make, times = TEXTS[kind]
    ids = Tokenizer.from_checkpoint(file).encode(TEXT)
    run = make(file, ids)
    embedding = file.tensors["model.embed_tokens.weight"].decode()[run]
    trace = run_trace(file, run, {(OUTSIDE, Stage.EMBEDDING): embedding})
    claimed = tuple(Tokenizer.from_checkpoint(file).encode(wrap_chat(TEXT, times)))
    found = by_id(identify(replace(trace, info=replace(trace.info, tokens=claimed)), file))
    assert kind in found, found
    assert found[kind].evidence["text"] == Tokenizer.from_checkpoint(file).decode(run)


def run_trace(file: Checkpoint, run: list[int], values: Values) -> MemoryTrace:
    everyone = tuple(range(len(run)))
    from bisect_traces import trace_info

    info = replace(trace_info(file, "float32"), tokens=tuple(run), positions=everyone, head_positions=everyone)
    return MemoryTrace(info, values)


def test_a_scaled_embedding_is_no_matter_of_tokens(file: Checkpoint, sound: MemoryTrace) -> None:
    assert identify(altered(sound, {(OUTSIDE, Stage.EMBEDDING): 16 * sound[OUTSIDE, Stage.EMBEDDING]}), file) == ()


def test_another_model_is_refused(file: Checkpoint, sound: MemoryTrace, tmp_path: Path) -> None:
    wider = dict(sound.values) | {(0, Stage.FFN_GATE): np.ones((COUNT, 500), np.float32)}
    (finding,) = identify(upstream_folder(tmp_path / "a", wider), file, tokens=TOKENS, arithmetic=LLAMA)
    assert finding.id == "other-model"
    assert "ffn_gate is 500 wide, the file's 512" in finding.sentence
    deeper = dict(sound.values) | {(LAYERS, Stage.FFN_GATE): sound[1, Stage.FFN_GATE]}
    (finding,) = identify(upstream_folder(tmp_path / "b", deeper), file, tokens=TOKENS, arithmetic=LLAMA)
    assert finding.evidence["layers"] == {"at least": 3, "file": 2}
    padded = dict(sound.values) | {(OUTSIDE, Stage.LM_HEAD): np.ones(640, np.float32)}
    (finding,) = identify(upstream_folder(tmp_path / "c", padded), file, tokens=TOKENS, arithmetic=LLAMA)
    assert finding.id == "other-vocabulary"


def gate_up_exchanged(file: Checkpoint) -> dict[tuple[int, Stage], Fault]:
    w = {n: file.tensors[f"model.layers.1.mlp.{n}_proj.weight"].decode() for n in ("gate", "up")}
    return {
        (1, Stage.FFN_GATE): lambda v, here: here[Stage.FFN_NORM] @ w["up"].T,
        (1, Stage.FFN_UP): lambda v, here: here[Stage.FFN_NORM] @ w["gate"].T,
    }


ENGINE_FAULTS: dict[str, Callable[[Checkpoint], dict[tuple[int, Stage], Fault]]] = {
    "bias left out": lambda f: {(0, Stage.QKV_BIAS): lambda v, here: here[Stage.QKV_MATMUL]},
    "no rotation": lambda f: {(1, Stage.Q_POST_ROPE): lambda v, here: here[Stage.QKV_BIAS][:, :256]},
    "no scale": lambda f: {(1, Stage.ATTN_SCORES): lambda v, here: v * 8},
    "no activation": lambda f: {(0, Stage.FFN_SILU): lambda v, here: here[Stage.FFN_GATE]},
    "attention not added": lambda f: {(1, Stage.POST_ATTN_RESIDUAL): lambda v, here: v - here[Stage.ATTN_OUT]},
    "rows rolled": lambda f: {(1, Stage.FFN_OUT): lambda v, here: np.roll(v, 1, axis=0)},
    "gate and up exchanged": gate_up_exchanged,
}


@pytest.mark.parametrize("name", ENGINE_FAULTS)
def test_an_engine_s_fault_is_no_label_s(file: Checkpoint, name: str) -> None:
    trace = faulty_trace(file, LLAMA, ENGINE_FAULTS[name](file))
    assert identify(trace, file) == ()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT, unique=True))
def test_any_selection_of_rows_is_read(file: Checkpoint, sound: MemoryTrace, rows: list[int]) -> None:
    from aprjax.bisect.explain.identity_match import nearest_rows

    value = sound[1, Stage.POST_FFN_RESIDUAL]
    noise = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
    found, distance = nearest_rows((value + 0.02 * value.std() * noise)[rows], value)
    # Equal tokens at other positions are told apart behind the first layer.
    assert found == tuple(rows)
    assert distance < 0.1


@pytest.fixture
def told(file: Checkpoint, sound: MemoryTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with both mistakes of the story, and what the command line says of it."""
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    changes = {(1, Stage.QKV_BIAS): sound[1, Stage.QKV_MATMUL], (0, Stage.FFN_SWIGL): sound[0, Stage.FFN_SWIGL][-1:]}
    folder = str(upstream_folder(tmp_path / "aprt", dict(sound.values) | changes))
    return [folder, "--file", str(file.path), "--tokens", ",".join(map(str, TOKENS))]


def shown(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_trace_says_what_a_folder_is(told: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["trace", *told]) == 0
    text = shown(capsys)
    assert "position 10 alone" in text
    assert "qkv_bias of layer 1 is not what the name says" in text


@pytest.mark.thorough
def test_replay_and_layers_say_it_before_any_number(
    file: Checkpoint,
    told: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # in a narrow terminal a heading takes two lines
    main(["replay", *told, "--force-file", "--arithmetic", "llama.cpp"])
    text = shown(capsys)
    for words in ("(trace-capture-point)", "(trace-token-selection)"):
        assert text.index(words) < text.index("worst row")
    # Tokens that nobody gives are read from the embedding's rows.
    main(["replay", *told[:3], "--force-file", "--arithmetic", "llama.cpp"])
    assert f"rows are those of {','.join(map(str, TOKENS))}" in shown(capsys)
    # What was vouched for on a command line is looked at by `layers`, too.
    target = str(tmp_path / "vouched.safetensors")
    assert main(["trace", *told, "--save", target]) == 0
    capsys.readouterr()
    main(["layers", "--model", target, "--ref", str(file.path), "--arithmetic", "llama.cpp"])
    text = shown(capsys)
    assert text.index("trace-capture-point") < text.index("rel")
