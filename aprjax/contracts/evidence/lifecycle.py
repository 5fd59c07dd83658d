"""The statuses that upstream uses, in the order in which evidence moves them (contracts.md section 1.2)."""

from __future__ import annotations

from typing import get_args

from aprjax.contracts.types import ContractStatus, FalsificationTest, Status, TestStatus

# Evidence moves a status to the right, never to the left. BLOCKER_FIXTURE_ABSENT says that the test could not run: a
# run lifts it. DRAFT, IMPLEMENTED, FUNCTIONAL (of a contract) and demoted are a person's words: no run changes them.
TEST_LADDER: tuple[TestStatus, ...] = (
    "PROPOSED",
    "BLOCKER_FIXTURE_ABSENT",
    "PARTIAL_ALGORITHM_LEVEL",
    "ALGORITHM_LEVEL_DISCHARGED",
    "FUNCTIONAL",
    "DISCHARGED",
)
CONTRACT_LADDER: tuple[ContractStatus, ...] = ("PROPOSED", "ACTIVE_ALGORITHM_LEVEL", "ACTIVE_FUNCTIONAL", "ACTIVE")
TEST_STATUSES = frozenset(get_args(TestStatus))
CONTRACT_STATUSES = frozenset(get_args(ContractStatus))


def status_of(test: FalsificationTest) -> TestStatus:
    """Where a test stands; a test whose file says nothing is proposed."""
    return test.discharge_status or test.status or "PROPOSED"


def earned(test: FalsificationTest, outcome: str) -> TestStatus:
    """The status that a test has after a run: a pass lifts it, nothing else moves it.

    A test that names what its full discharge still waits for (`full_discharge_blocks_on`: the 7B teacher, a GPU) is
    functional by a pass, and not discharged.
    """
    before = status_of(test)
    if outcome != Status.PASS:
        return before
    reached: TestStatus = "FUNCTIONAL" if test.full_discharge_blocks_on else "DISCHARGED"
    return TEST_LADDER[max(TEST_LADDER.index(before), TEST_LADDER.index(reached))]


def contract_target(outcomes: list[str]) -> ContractStatus | None:
    """The status that a contract's outcomes carry: all pass, ACTIVE; some unmeasured, ACTIVE_FUNCTIONAL; else none."""
    if not outcomes or Status.FAIL in outcomes or Status.PASS not in outcomes:
        return None
    return "ACTIVE_FUNCTIONAL" if Status.UNMEASURED in outcomes else "ACTIVE"
