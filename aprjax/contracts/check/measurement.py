"""What a rule measures, how it becomes an outcome, and which function measures which test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aprjax.contracts.types import Contract, FalsificationTest, Measured, Status, TestOutcome, Threshold

if TYPE_CHECKING:
    from aprjax.contracts.check.bench import Bench


@dataclass(frozen=True)
class Asked:
    """One test that is to be measured: the two sides, the contract and the test in it."""

    bench: Bench
    contract: Contract
    test: FalsificationTest


@dataclass(frozen=True)
class Measurement:
    """What a rule found.

    Attributes:
        measured: numbers by name; the test's thresholds speak of these names.
        reason: what the numbers mean, or where the decisive one was found.
        unmeasured: why nothing can be said; empty where something was measured.
        failed: why the rule is broken without any number (the model's values are no numbers).
        artifacts: names of the raw outputs that the numbers were taken from.
    """

    measured: Measured = field(default_factory=dict)
    reason: str = ""
    unmeasured: str = ""
    failed: str = ""
    artifacts: tuple[str, ...] = ()


Rule = Callable[[Asked], Measurement]
RULES: dict[str, Rule] = {}


def measures(*test_ids: str) -> Callable[[Rule], Rule]:
    """Registers a function as what measures these tests."""

    def register(rule: Rule) -> Rule:
        for test_id in test_ids:
            assert test_id not in RULES, f"{test_id} is measured twice"
            RULES[test_id] = rule
        return rule

    return register


def judged(asked: Asked, found: Measurement, *, command: str = "", seconds: float = 0.0) -> TestOutcome:
    """The outcome: passed only if every threshold of the test was measured, and holds."""
    status, reason = _verdict(asked.test, found)
    return TestOutcome(
        contract_id=asked.contract.id,
        test_id=asked.test.id,
        status=status,
        reason=reason,
        rule=" ".join(asked.test.rule.split()),
        measured={name: _plain(value) for name, value in found.measured.items()},
        thresholds=asked.test.thresholds,
        command=command,
        seconds=seconds,
        artifacts=found.artifacts,
    )


def _verdict(test: FalsificationTest, found: Measurement) -> tuple[Status, str]:
    if found.unmeasured:
        return Status.UNMEASURED, found.unmeasured
    if found.failed:
        return Status.FAIL, found.failed
    absent = [threshold.measure for threshold in test.thresholds if threshold.measure not in found.measured]
    if absent or not test.thresholds:
        what = f"nothing measures {', '.join(absent)}" if absent else "the contract states no threshold"
        return Status.UNMEASURED, f"{what}: the contract and the rule do not fit together"
    broken = [t for t in test.thresholds if not t.holds(_plain(found.measured[t.measure]))]
    tail = f"; {found.reason}" if found.reason else ""
    if broken:
        return Status.FAIL, "; ".join(_broken(t, found.measured[t.measure]) for t in broken) + tail
    held = [_held(threshold, found.measured[threshold.measure]) for threshold in test.thresholds]
    # Of a rule with many bounds (the steps of a layer) the first few stand for all.
    shown = held if len(held) <= _SHOWN else [*held[:_SHOWN], f"{len(held) - _SHOWN} more bounds hold"]
    return Status.PASS, "; ".join(shown) + tail


_SHOWN = 4


def _held(threshold: Threshold, value: float | int | str | bool | None) -> str:
    return f"{threshold.measure} = {_shown(value)} ({_bound(threshold)})"


def _broken(threshold: Threshold, value: float | int | str | bool | None) -> str:
    if _plain(value) is None:
        return f"{threshold.measure} has no finite value, expected {_bound(threshold)}"
    return f"{threshold.measure} = {_shown(value)}, expected {_bound(threshold)}"


def _bound(threshold: Threshold) -> str:
    return str(threshold).replace(f"{threshold.measure} ", "", 1)


def _shown(value: float | int | str | bool | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: float | int | str | bool | None) -> float | int | str | bool | None:
    """A plain value; a number that is not finite is not there."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
