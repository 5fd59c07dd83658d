"""docs/contracts.md: a row for every test of every contract, as the YAML files have it; and every id of upstream's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from aprjax.contracts.load import Loaded, contract_files, load_contracts
from aprjax.contracts.types import FalsificationTest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")

# The ids of upstream's contracts around SHIP-TWO-001 (contracts.md 1.3), each of which has its row.
UPSTREAM = {
    **{f"FALSIFY-APR-GGUF-PARITY-{n:03}": 1 for n in range(1, 8)},
    **{f"FALSIFY-QW2E-{n:03}": 1 for n in range(1, 8)},
    **{f"FALSIFY-QW2E-SHIP-{n:03}": 1 for n in (1, 2, 3, 4, 5, 7, 23, 24)},
    **{f"FALSIFY-QA-{n:03}": 1 for n in range(1, 7)},
    **dict.fromkeys(("FALSIFY-QA-SHIP-006", "FALSIFY-EX-001", "FALSIFY-QA-PERFREG-748", "FALSIFY-QA-FMTPARITY-743"), 1),
    **{f"FALSIFY-CHAT-{n:03}": 1 for n in (1, 2, 3, 762, 763)},
    **dict.fromkeys(("NOTE-CHAT-BOS-FALSE-POSITIVE", "GATE-CHAT-SHIP-008"), 1),
    **{f"FALSIFY-GGUF-PROMPT-SENS-{n:03}": 1 for n in range(1, 4)},
    **{f"FALSIFY-CPU-GPU-{n:03}": 1 for n in range(1, 16)},
    **{f"PARITY-{n:03}": 1 for n in range(1, 5)},
    **{f"FALSIFY-SUB-FFN-{n:03}": 1 for n in range(1, 9)},
    **{f"FALSIFY-FFN-GGUF-{n:03}": 1 for n in range(1, 18)},
    **{f"FALSIFY-ATTN-SUB-{n:03}": 1 for n in range(1, 6)},
    **{f"FALSIFY-APR-TRACE-SAVE-{n:03}": 1 for n in range(1, 12)},
    **{f"FALSIFY-ALP-{n:03}": 1 for n in (1, 2)},
    **{f"FALSIFY-HEH-{n:03}": 1 for n in range(1, 6)},
    **{f"FALSIFY-PM-{n:03}": 1 for n in (7, 8, 9)},
    **dict.fromkeys(("FALSIFY-SHIP-009", "FALSIFY-SHIP-010"), 1),
}


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contracts_table", ROOT / "benchmarks" / "contracts_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_says_what_the_contracts_say(table: ModuleType) -> None:
    assert table.with_tables(TEXT, table.results_in(TEXT)) == TEXT, "run `python benchmarks/contracts_table.py`"


def test_every_test_has_a_row_with_a_result(table: ModuleType) -> None:
    rows = table.results_in(TEXT)
    ids = {t.id for one in load_contracts(contract_files()) if one.contract for t in one.contract.falsification_tests}
    assert set(rows) == ids
    for name, result in rows.items():
        assert re.match(r"\*\*(pass|fail|unmeasured)\*\*: \S|not about two sides: \S", result), (name, result)


def test_every_id_of_upstream_has_its_row(table: ModuleType) -> None:
    rows = table.results_in(TEXT)
    assert set(UPSTREAM) - set(rows) == set()
    # Each SHIP id leads to a test with a row, in the contract that is named.
    of_test = {t.id: one.contract.id for one in load_contracts(contract_files()) if one.contract for t in _tests(one)}
    for number in range(1, 11):
        found = re.search(rf"^\| SHIP-{number:03} \| `([^`]+)` in `([^`]+)` \|$", TEXT, re.MULTILINE)
        assert found is not None, number
        assert found[1] in rows
        assert found[1].endswith(f"SHIP-{number:03}")
        assert of_test[found[1]] == found[2]


def _tests(loaded: Loaded) -> tuple[FalsificationTest, ...]:
    return () if loaded.contract is None else loaded.contract.falsification_tests


def test_a_changed_bound_is_noticed(table: ModuleType) -> None:
    assert (
        table.with_tables(TEXT.replace("least_cosine ≥ 0.999", "least_cosine ≥ 0.9", 1), table.results_in(TEXT)) == TEXT
    )
