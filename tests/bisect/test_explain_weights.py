"""Hypotheses about weights on tiny models: accidents of the tensor that ran are named from its products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bisect_traces import TOKENS, faulty_trace, sound_trace, tiny_file, trace_info
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprjax.bisect.confidence import Level
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Candidate, Parameter
from aprjax.bisect.explain.report import Explanation
from aprjax.bisect.explain.run import explain
from aprjax.bisect.explain.weights import WEIGHTS
from aprjax.bisect.replay.judge import replay
from aprjax.blocks import dequantize, encode
from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.qwen2 import PRESETS, Stage
from aprjax.qwen2.model import Qwen2
from aprjax.trace import MemoryTrace

LLAMA = PRESETS["llama.cpp"]
LAYER, HEAD = "model.layers.1.", 64
Tensors = dict[str, EncodedTensor]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_file(tmp_path_factory.mktemp("weights"))


def name_of(leaf: str) -> str:
    part = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"{LAYER}{part}.{leaf}.weight"


def again(file: Checkpoint, name: str, values: np.ndarray, kind: str | None = None) -> Tensors:
    """Other values under a name, encoded as they were: what a faulty converter leaves."""
    kind = kind or file.tensors[name].block_type
    values = np.ascontiguousarray(values, np.float32)
    return {name: EncodedTensor(name, values.shape, kind, encode(kind, values))}


def valued(leaf: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Checkpoint], Tensors]:
    return lambda file: again(file, name_of(leaf), change(file.tensors[name_of(leaf)].decode()))


def blocks_changed(leaf: str, size: int, change: Callable[[np.ndarray], None]) -> Callable[[Checkpoint], Tensors]:
    def changed(file: Checkpoint) -> Tensors:
        tensor = file.tensors[name_of(leaf)]
        blocks = tensor.data.reshape(-1, size).copy()
        change(blocks)
        return {tensor.name: replace(tensor, data=blocks.reshape(-1))}

    return changed


def exchanged(first: str, second: str) -> Callable[[Checkpoint], Tensors]:
    a, b = name_of(first), name_of(second)
    return lambda file: {a: replace(file.tensors[b], name=a), b: replace(file.tensors[a], name=b)}


def row_bytes_rolled(name: str) -> Callable[[Checkpoint], Tensors]:
    def rolled(file: Checkpoint) -> Tensors:
        tensor = file.tensors[name]
        return {name: replace(tensor, data=np.roll(tensor.data.reshape(tensor.shape[0], -1), 1, axis=0).reshape(-1))}

    return rolled


def interleave_nibbles(blocks: np.ndarray) -> None:
    quants = blocks[:, 16:].reshape(-1, 4, 32)
    order = np.concatenate([quants & 15, quants >> 4], axis=2).reshape(len(blocks), 256)
    blocks[:, 16:] = order[:, 0::2] | (order[:, 1::2] << 4)


def clear_scale_bits(blocks: np.ndarray) -> None:
    blocks[:, 4:12] &= 0x3F


def clear_high_bits(blocks: np.ndarray) -> None:
    blocks[:, 128:192] = 0


def by_head(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, HEAD, values.shape[1])


def zero_head(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[:HEAD] = 0
    return values


def copied_row(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[7] = values[100]
    return values


def half_of_a_head(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[:, HEAD : 2 * HEAD] *= np.float32(0.5)
    return values


def through_q4_0(values: np.ndarray) -> np.ndarray:
    return dequantize("Q4_0", encode("Q4_0", np.ascontiguousarray(values)), values.shape)


ORDER = np.random.default_rng(4).permutation(512)
# What is done to the file that ran; the hypothesis; and words of its sentence.
ACCIDENTS: dict[str, tuple[Callable[[Checkpoint], Tensors], str, str]] = {
    "transposed": (valued("o_proj", lambda w: w.T), "transposed", "o_proj is transposed"),
    "dimensions": (valued("gate_proj", lambda w: w.T.reshape(w.shape)), "dimensions-exchanged", "gate_proj"),
    "read as transposed": (
        valued("gate_proj", lambda w: w.reshape(w.shape[::-1]).T),
        "dimensions-exchanged",
        "read as transposed",
    ),
    "gate and up": (exchanged("gate_proj", "up_proj"), "another-tensor", "gate_proj and up_proj are exchanged"),
    "k and v": (exchanged("k_proj", "v_proj"), "another-tensor", "k_proj and v_proj are exchanged"),
    "another layer": (
        lambda f: {
            name_of("q_proj"): replace(f.tensors["model.layers.0.self_attn.q_proj.weight"], name=name_of("q_proj"))
        },
        "another-tensor",
        "q_proj of layer 0",
    ),
    "rows rolled": (row_bytes_rolled(name_of("gate_proj")), "rows-shifted", "down by one row"),
    "head's rows rolled": (row_bytes_rolled("lm_head.weight"), "rows-shifted", "lm_head"),
    "rows reversed": (valued("up_proj", lambda w: w[::-1]), "reversed", "rows of up_proj are in reverse"),
    "columns reversed": (valued("up_proj", lambda w: w[:, ::-1]), "reversed", "every row of up_proj"),
    "rows permuted": (valued("gate_proj", lambda w: w[ORDER]), "rows-permuted", "in another order"),
    "row copied": (valued("gate_proj", copied_row), "rows-copied", "row 7 of gate_proj holds its row 100"),
    "heads permuted": (
        valued("q_proj", lambda w: by_head(w)[[1, 0, 2, 3]].reshape(w.shape)),
        "heads-permuted",
        "0 holds 1, 1 holds 0",
    ),
    "columns of heads": (
        valued("o_proj", lambda w: w.reshape(-1, 4, HEAD)[:, [2, 1, 0, 3]].reshape(w.shape)),
        "heads-permuted",
        "0 holds 2, 2 holds 0",
    ),
    "rotary": (
        valued("q_proj", lambda w: w.reshape(-1, 2, 32, 256).transpose(0, 2, 1, 3).reshape(w.shape)),
        "rotary-interleaved",
        "interleaved",
    ),
    "head zero": (valued("q_proj", zero_head), "zeroed", "rows 0 to 63 (head 0) of q_proj are zero"),
    "scaled": (valued("down_proj", lambda w: w * np.float32(1.5)), "scaled", "down_proj is multiplied by 1.5"),
    "a head's columns scaled": (valued("o_proj", half_of_a_head), "scaled", "head 1 by 0.5"),
    "nibbles": (blocks_changed("gate_proj", 144, interleave_nibbles), "nibbles-reordered", "neighbours share a byte"),
    "scale bits": (blocks_changed("up_proj", 144, clear_scale_bits), "scale-bits-dropped", "groups 4 to 7"),
    "high bits": (blocks_changed("down_proj", 210, clear_high_bits), "high-bits-dropped", "Q6_K"),
    "twice": (valued("gate_proj", through_q4_0), "double-quantized", "went through Q4_0 and back to Q4_K"),
    "offset": (
        lambda f: {
            name_of("gate_proj"): replace(
                f.tensors[name_of("gate_proj")],
                data=np.append(f.tensors[name_of("gate_proj")].data[144:], np.zeros(144, np.uint8)),
            )
        },
        "bytes-shifted",
        "144 bytes behind",
    ),
}


def ran(file: Checkpoint, tensors: Tensors) -> MemoryTrace:
    """The trace of another file, said to be of this one."""
    other = replace(file, tensors={**file.tensors, **tensors})
    _, values = Qwen2(other, LLAMA).run_with_cache(list(TOKENS))
    return MemoryTrace(trace_info(file, LLAMA.name), {key: np.asarray(value) for key, value in values.items()})


def explained(file: Checkpoint, tensors: Tensors) -> Explanation:
    report = explain(ran(file, tensors), file, LLAMA, hypotheses=WEIGHTS, identity=())
    assert report.unexplained == ()
    (found,) = report.explanations
    assert found.kind == "weights"
    assert found.layers in ((1,), (-1,))
    return found


def some_thorough(names: Iterable[str], quick: set[str]) -> list[Any]:
    """Parameters, all but a few of them for `make test-real`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in names]


QUICK = {"transposed", "rows rolled", "columns of heads", "nibbles", "twice"}
QUICK_VECTORS = {"norm scaled", "an element of a norm", "a bias of v"}


@pytest.mark.parametrize("name", some_thorough(ACCIDENTS, QUICK))
def test_an_accident_of_a_matrix_is_named(file: Checkpoint, name: str) -> None:
    make, slug, words = ACCIDENTS[name]
    found = explained(file, make(file))
    assert found.id == f"weights-{slug}"
    assert words in found.sentence
    assert found.residual <= found.tolerance < found.before
    assert found.confidence.level is Level.CERTAIN
    assert found.next_step


@pytest.mark.thorough
def test_numbers_are_fitted(file: Checkpoint) -> None:
    found = explained(file, valued("down_proj", lambda w: w * np.float32(1.25))(file))
    factor = found.parameters["factor"]
    assert isinstance(factor, Parameter)
    assert factor.value == pytest.approx(1.25, rel=1e-6)
    assert factor.error is not None
    added = again(file, name_of("k_proj"), file.tensors[name_of("k_proj")].decode() + np.float32(0.05), "F32")
    assert explained(file, added).parameters["constant"].value == pytest.approx(0.05, rel=1e-6)


def vector(file: Checkpoint, leaf: str) -> np.ndarray:
    return file.tensors[LAYER + leaf].decode()


NORM, BIAS = "input_layernorm.weight", "self_attn.k_proj.bias"
VECTORS: dict[str, tuple[str, Callable[[Checkpoint], np.ndarray], str, str]] = {
    "norm scaled": (NORM, lambda f: vector(f, NORM) * 1.5, "scaled", "multiplied by 1.5"),
    "norm of another layer": (
        NORM,
        lambda f: f.tensors["model.layers.0.input_layernorm.weight"].decode(),
        "another-tensor",
        "model.layers.0.input_layernorm",
    ),
    "an element of a norm": (NORM, lambda f: np.where(np.arange(256) == 17, 3, vector(f, NORM)), "replaced", "17: 3"),
    "a bias of v": (BIAS, lambda f: vector(f, "self_attn.v_proj.bias"), "another-tensor", "v_proj.bias"),
    "a bias rolled": (BIAS, lambda f: np.roll(vector(f, BIAS), 1), "rows-shifted", "one element up"),
    "a bias reversed": (BIAS, lambda f: vector(f, BIAS)[::-1], "reversed", "reverse order"),
    "a bias sorted": (BIAS, lambda f: np.sort(vector(f, BIAS)), "rows-permuted", "another order"),
    "a bias shifted": (BIAS, lambda f: vector(f, BIAS) + np.float32(0.25), "shifted", "0.25"),
    "another bias": (BIAS, lambda f: np.cos(np.arange(128)), "replaced", "another vector at 128 of 128"),
}


@pytest.mark.parametrize("name", some_thorough(VECTORS, QUICK_VECTORS))
def test_an_accident_of_a_vector_is_named(file: Checkpoint, name: str) -> None:
    leaf, make, slug, words = VECTORS[name]
    found = explained(file, again(file, LAYER + leaf, make(file), "F32"))
    assert found.id == f"weights-{slug}"
    assert words in found.sentence


def test_the_embedding_s_rows(file: Checkpoint) -> None:
    name = "model.embed_tokens.weight"
    assert explained(file, row_bytes_rolled(name)(file)).id == "weights-rows-shifted"
    packed = file.tensors[name].packed().copy()
    packed[300] = packed[0]
    found = explained(file, {name: replace(file.tensors[name], data=packed.reshape(-1))})
    assert (found.id, found.parameters["rows"]) == ("weights-rows-copied", {"300": 0})
    quants = file.tensors[name].data.reshape(-1, 144).copy()
    interleave_nibbles(quants)
    found = explained(file, {name: replace(file.tensors[name], data=quants.reshape(-1))})
    assert found.id == "weights-nibbles-reordered"


def test_a_sound_trace_and_an_engine_s_fault_are_no_weights_fault(file: Checkpoint) -> None:
    assert explain(sound_trace(file, LLAMA), file, LLAMA, hypotheses=WEIGHTS, identity=()).explanations == ()
    # A kernel whose result hangs on the position: no matrix does that.
    ramp = np.linspace(0.5, 1.5, len(TOKENS), dtype=np.float32)[:, None]
    trace = faulty_trace(file, LLAMA, {(1, Stage.FFN_GATE): lambda value, here: value * ramp})
    report = explain(trace, file, LLAMA, hypotheses=WEIGHTS, identity=())
    assert report.explanations == ()
    assert [left.node for left in report.unexplained] == [(1, Stage.FFN_GATE)]


def test_stages_that_are_missing_or_not_finite_yield_nothing(file: Checkpoint) -> None:
    trace = ran(file, ACCIDENTS["transposed"][0](file))
    values = dict(trace.values)
    values[1, Stage.ATTN_OUT] = np.full_like(values[1, Stage.ATTN_OUT], np.nan)
    broken = replace(trace, values=values)
    evidence = Evidence(broken, file, LLAMA, replay(broken, file, LLAMA))
    proposals: list[Candidate] = []
    for hypothesis in WEIGHTS:
        for stage in Stage:
            proposals += hypothesis.test(evidence, (-1 if stage in OUTSIDE_STAGES else 1, stage))
    # The nodes before it are sound, and those behind it follow from its values.
    assert proposals == []


OUTSIDE_STAGES = (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)


@pytest.mark.thorough
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), kept=st.integers(0, 500))
def test_any_permutation_of_rows_is_found(file: Checkpoint, seed: int, kept: int) -> None:
    order = np.arange(512)
    order[kept:] = kept + np.random.default_rng(seed).permutation(512 - kept)
    tensor = file.tensors[name_of("gate_proj")]
    moved = replace(tensor, data=tensor.packed()[order].reshape(-1))
    found = explained(file, {tensor.name: moved})
    assert found.residual == 0.0
    assert found.id in {f"weights-{slug}" for slug in ("rows-permuted", "rows-shifted", "reversed")}
