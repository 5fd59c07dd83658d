"""A part of the fault bench: planted faults are found at their place and named, and clean pairs are clean."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "faults"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-faults.json"))
GATE, OUTPUT = "mlp.gate_proj.weight", "self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of the bench, which import each other by their bare names."""
    sys.path.insert(0, str(FOLDER))
    names = ("cases", "tensor_faults", "judging", "judging_pairs", "judging_traces", "engine_faults", "bench", "table")
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def shop(bench: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = bench.bench.workshop("tiny", tmp_path_factory.mktemp("bench"))
    # One arithmetic for files and traces alike: compiling the programs of another costs more than all cases.
    made.arithmetic = bench.judging_traces.FLOAT32
    return made


@pytest.fixture(scope="module")
def studio(bench: SimpleNamespace, shop: Any) -> Any:
    return bench.judging_traces.Studio("tiny", shop.ref, shop.folder, shop.tokens)


def file_case(
    bench: SimpleNamespace, fault: str, layer: int, leaf: str, strength: float | None = None, **more: Any
) -> Any:
    name = bench.cases.in_layer(layer, leaf)
    return bench.cases.Case("tiny", "file", fault, layer, name, strength=strength, **more)


QUICK = [
    ("transposed", 1, OUTPUT, None),
    ("dims-reversed", 2, GATE, None),
    ("heads-permuted", 0, "self_attn.q_proj.bias", None),
    ("nibbles-interleaved", 2, GATE, None),
    ("rows-shifted", 1, "self_attn.k_proj.weight", -1.0),
    ("scaled", 0, "mlp.down_proj.weight", 1.001),
    ("scaled", 2, "post_attention_layernorm.weight", 1.01),
    ("zeroed", 1, "self_attn.k_proj.bias", None),
    ("double-quantized", 0, "mlp.up_proj.weight", None),
    ("bytes-shifted", 1, GATE, 32.0),
    ("nan", 2, "mlp.up_proj.weight", None),
    ("left-out", 1, "mlp.up_proj.weight", None),
    ("control-noise", 1, GATE, 0.5),
]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_a_fault_of_a_file_is_found_and_named(
    bench: SimpleNamespace, shop: Any, case: tuple[str, int, str, float | None]
) -> None:
    result = bench.judging.judge_file(shop, file_case(bench, *case))
    assert (result.localised, result.explained, result.wrong_blame) == (True, True, False), result.reason


def test_two_faults_are_both_found(bench: SimpleNamespace, shop: Any) -> None:
    parts = (file_case(bench, "zeroed", 1, "self_attn.k_proj.bias"), file_case(bench, "rows-shifted", 2, GATE, 1.0))
    pair = bench.cases.Case("tiny", "pair", "file pair", parts=parts)
    result = bench.judging_pairs.judge_pair(shop, pair, by_locate=False)
    assert result.both, result.reason


def test_a_clean_pair_raises_no_alarm(bench: SimpleNamespace, shop: Any) -> None:
    case = bench.cases.Case("tiny", "clean", "float32, 11 tokens")
    result = bench.judging_pairs.judge_clean(shop, case, {"11 tokens": shop.tokens})
    assert not result.false_alarm, result.reason


def test_the_bench_does_not_praise_what_is_wrong(bench: SimpleNamespace, shop: Any) -> None:
    """A bench that could not fail would show nothing: a planted fault judged as another is a miss."""
    case = file_case(bench, "zeroed", 1, GATE)
    judging = bench.judging
    with shop.model((case,)) as (model, (planted,)):
        files = judging.compare_files(model, shop.ref)
        other = file_case(bench, "transposed", 1, GATE)
        problems, blamed = judging.explanation_problems(other, shop, planted, files)
    assert blamed
    assert "zeroed" in problems[0]


COMPUTATIONS = [("bias-missing", 1, None), ("attn-scale-missing", None, None), ("activation-relu", 2, None)]


def test_faults_of_a_computation_are_found_and_named(bench: SimpleNamespace, studio: Any) -> None:
    judging = bench.judging_traces
    cases = [
        bench.cases.Case("tiny", "computation", fault, layer, strength=strength)
        for fault, layer, strength in COMPUTATIONS
    ]
    sound = bench.cases.Case("tiny", "clean", "trace of a sound engine")
    clean, *values = studio.run([sound, *cases])
    assert not judging.judge_engine(studio, sound, clean).false_alarm
    for case, faulty in zip(cases, values, strict=True):
        result = judging.judge_engine(studio, case, faulty)
        assert (result.localised, result.explained, result.wrong_blame) == (True, True, False), result.reason
    for fault in ("captured-after-bias", "last-token-only"):
        case = bench.cases.Case("tiny", "trace", fault, 1)
        result = judging.judge_trace(studio, case, clean)
        assert (result.localised, result.explained, result.wrong_blame) == (True, True, False), result.reason


@pytest.mark.thorough
def test_more_of_the_bench(bench: SimpleNamespace, shop: Any, studio: Any) -> None:
    """Every eighth case of the small model's files, computations and dumps: what the issue asks, on a sample."""
    cases = [case for case in bench.bench.all_cases(shop, few=True) if case.group in ("file", "computation", "trace")]
    found = [result for _, result in bench.bench.results(shop, cases[::8]) if result is not None]
    singles = [result for result in found if result.case["group"] != "clean"]
    right = [r for r in singles if r.localised is not False and r.explained is not False]
    assert len(singles) > 20
    assert len(right) >= 0.95 * len(singles), [r.reason for r in singles if r not in right]
    assert not any(result.false_alarm for result in found)


def test_there_is_a_table() -> None:
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_is_made_of_its_json(bench: SimpleNamespace, path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == bench.table.markdown(document)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_bench_meets_the_acceptance(bench: SimpleNamespace, path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    table = bench.table
    keys = [row["case"]["key"] for row in rows]
    assert len(keys) == len(set(keys))
    singles = [row for row in rows if row["case"]["group"] in table.SINGLE]
    assert sum(map(table.right, singles)) >= 0.95 * len(singles)
    clean = [row for row in rows if row["case"]["group"] == "clean"]
    assert clean
    assert not any(row.get("false_alarm") for row in clean)
    pairs = [row["both"] for row in rows if row["case"]["group"] == "pair"]
    assert sum(pairs) >= 0.8 * len(pairs) > 0
    # Every registered fault is in it, of files and of computations.
    planted = {row["case"]["fault"] for row in singles}
    assert planted >= {*bench.tensor_faults.TENSOR_FAULTS, *bench.judging_traces.ALL_ENGINE_FAULTS}
