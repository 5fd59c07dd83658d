"""K-quants on a model's own blocks: a sound file keeps every rule, and each kind of damage breaks one."""

from __future__ import annotations

import numpy as np
import pytest
from contract_sides import K_QUANTS, MadeUpBench, outcome, statuses
from tiny import CONFIG, tiny_checkpoint

from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.contracts.check import rules_kernels
from aprjax.contracts.types import Status
from aprjax.qwen2.arithmetic import preset

IDS = (*(f"FALSIFY-QS-00{number}" for number in range(1, 8)), *(f"APRJAX-Q8K-00{number}" for number in (1, 2, 3)))
FIRST = "model.layers.0.self_attn.q_proj.weight"  # what the rules look at of Q4_K


def bench(model: Checkpoint) -> MadeUpBench:
    arithmetic = preset("llama.cpp")
    return MadeUpBench(files_by_side={"model": model, "ref": model}, run_by=(arithmetic, arithmetic))


def model_of_k_quants() -> Checkpoint:
    return tiny_checkpoint(CONFIG, types=K_QUANTS)


@pytest.mark.thorough
def test_blocks_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_k_quants()
    assert set(statuses(bench(model), *IDS).values()) == {"pass"}
    # A NaN scale in one block.
    data = model.tensors[FIRST].data.copy()
    data[:2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    old = model.tensors[FIRST]
    damaged = {**model.tensors, FIRST: EncodedTensor(FIRST, old.shape, "Q4_K", data)}
    broken = bench(Checkpoint(model.path, "gguf", model.config, damaged, None, None, {}))
    found = statuses(broken, "FALSIFY-QS-003", "APRJAX-Q8K-002")
    assert set(found.values()) == {"fail"}
    # A quantizer that truncates instead of rounding.
    sound = rules_kernels.quantize_q8_k

    def truncating(x: np.ndarray) -> object:
        blocks = sound(x)
        return blocks._replace(codes=(blocks.codes - 1).clip(-127, 127).astype(np.int8))

    monkeypatch.setattr(rules_kernels, "quantize_q8_k", truncating)
    found = statuses(bench(model), "FALSIFY-QS-005", "APRJAX-Q8K-001", "APRJAX-Q8K-002")
    assert set(found.values()) == {"fail"}


def test_a_decoder_that_reads_in_another_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    model = model_of_k_quants()
    right = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda *given: np.roll(right(*given), 1, axis=-1))
    assert outcome(bench(model), "FALSIFY-QS-007").status is Status.FAIL


def test_a_file_without_k_quants_is_unmeasured() -> None:
    assert statuses(
        bench(tiny_checkpoint(CONFIG)), "FALSIFY-QS-001", "FALSIFY-QS-007", "APRJAX-Q8K-002"
    ) == dict.fromkeys(("FALSIFY-QS-001", "FALSIFY-QS-007", "APRJAX-Q8K-002"), "unmeasured")


@pytest.mark.thorough
def test_floats_stay_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    from aprjax.qwen2 import modules

    name = "FALSIFY-APR-GGUF-PARITY-005"
    assert statuses(bench(model_of_k_quants()), name) == {name: "pass"}
    right = modules.multiply

    def rounding(weight: object, x: object, arithmetic: object) -> object:
        return right(weight, np.round(np.asarray(x) * 100) / 100, arithmetic)  # type: ignore[arg-type]

    monkeypatch.setattr(modules, "multiply", rounding)
    assert statuses(bench(model_of_k_quants()), name) == {name: "fail"}
