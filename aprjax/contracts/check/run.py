"""All tests of the contracts on two sides: what is measured, in which order, and what an error means."""

from __future__ import annotations

import importlib
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from aprjax.bisect.metrics import ComparisonError
from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.check.bench import Bench
from aprjax.contracts.check.measurement import RULES, Asked, Measurement, judged
from aprjax.contracts.types import NOT_ABOUT, CheckReport, Contract, FalsificationTest, TestOutcome

_MODULES = ("files", "forward", "generation", "identity", "kernels", "layers", "output", "qa", "ship", "text", "trace")
# This one looks at what all others left behind.
_LAST = ("FALSIFY-QA-001",)
Progress = Callable[[str, int, int], None]


def load_rules() -> dict[str, object]:
    """Every rule, by the id of the test that it measures."""
    for name in _MODULES:
        importlib.import_module(f"aprjax.contracts.check.rules_{name}")
    return dict(RULES)


def check(
    contracts: Sequence[Contract],
    bench: Bench,
    *,
    only: Sequence[str] = (),
    allowed: Sequence[str] = (),
    command: str = "",
    progress: Progress = lambda what, done, total: None,
) -> CheckReport:
    """Measures every falsification test of the contracts.

    Args:
        contracts: what is promised.
        bench: the two sides.
        only: ids of the tests that are wanted; all, unless some are named.
        allowed: ids that may stay unmeasured.
        command: what repeats this check.
        progress: told which test is measured.
    """
    load_rules()
    start, began = time.perf_counter(), datetime.now(UTC)
    asked = [
        Asked(bench, contract, test)
        for contract in contracts
        for test in contract.falsification_tests
        if not only or test.id in only
    ]
    outcomes: dict[str, TestOutcome] = {}
    for done, one in enumerate(sorted(asked, key=lambda one: one.test.id in _LAST)):
        progress(one.test.id, done, len(asked))
        outcomes[one.test.id] = _outcome(one)
    return CheckReport(
        outcomes=tuple(outcomes[one.test.id] for one in asked),
        sides=bench.describe(),
        contracts=tuple(contracts),
        command=command,
        started=began.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
        artifacts=dict(bench.artifacts),
        allowed=tuple(allowed),
    )


def _outcome(asked: Asked) -> TestOutcome:
    start = time.perf_counter()
    found = _measured(asked)
    command = (
        f"python -m aprjax check {shlex.quote(asked.contract.id)} --test {asked.test.id} {asked.bench.side_options}"
    )
    return judged(asked, found, command=command, seconds=time.perf_counter() - start)


def _measured(asked: Asked) -> Measurement:
    test: FalsificationTest = asked.test
    if test.not_applicable:
        return Measurement(unmeasured=f"{NOT_ABOUT}{_line(test.na_reason)} ({_line(test.na_owner)})")
    rule = RULES.get(test.id)
    if rule is None:
        return Measurement(unmeasured="no rule of aprjax measures this test")
    try:
        return rule(asked)
    except (CheckpointError, ComparisonError) as error:
        return Measurement(unmeasured=_line(str(error)))


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
