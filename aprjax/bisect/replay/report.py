"""What `replay` reports: one node per (layer, stage), and the first that the file does not explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from aprjax.bisect.report import SidedFinding, Verdict
from aprjax.qwen2.stages import OUTSIDE, Stage

SCHEMA = "aprjax.replay/1"


class NodeVerdict(StrEnum):
    """Whether a file explains a node's value, given the node's own inputs."""

    EXACT = "exact"
    ROUNDING = "within rounding"
    UNEXPLAINED = "unexplained"
    UNMEASURED = "unmeasured"

    @property
    def explained(self) -> bool:
        """Exact, or as near as rounding allows."""
        return self in (NodeVerdict.EXACT, NodeVerdict.ROUNDING)


def place(layer: int, stage: Stage) -> str:
    """A node's name in a sentence."""
    return str(stage) if layer == OUTSIDE else f"layer {layer}, {stage}"


@dataclass(frozen=True)
class NodeReport:
    """One node: the trace's value against the file's value from the trace's own inputs.

    Attributes:
        layer: -1 for the stages outside the layers.
        stage: the stage.
        verdict: see `NodeVerdict`.
        arithmetic: the preset that this is the verdict of: with several, the one that explains the node best.
        explained_by: every preset tried that explains it.
        count: elements compared (attention scores: those at visible keys).
        mismatches: elements that are not bit-equal (zeros of either sign are equal).
        norm: L2 norm of what the file gives.
        rel_l2: relative L2 of the trace's value from the file's.
        worst_row: the largest relative L2 of any single position: what the verdict goes by.
        tolerance: what rounding may add up to in one position; None where every element is equal.
        max_abs: the largest absolute difference.
        max_abs_at: its (position, channel).
        max_ulps: that difference in units of the last place of the larger of the two values.
        through: stages that the trace lacks (or that were not what the engine went on with), which were
            recomputed on the way to this node.
        reason: for an unexplained node, what is wrong with it; for an unmeasured one, why.
    """

    layer: int
    stage: Stage
    verdict: NodeVerdict
    arithmetic: str = ""
    explained_by: tuple[str, ...] = ()
    count: int = 0
    mismatches: int | None = None
    norm: float | None = None
    rel_l2: float | None = None
    worst_row: float | None = None
    tolerance: float | None = None
    max_abs: float | None = None
    max_abs_at: tuple[int, int] | None = None
    max_ulps: float | None = None
    through: tuple[str, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            **asdict(self),
            "stage": str(self.stage),
            "verdict": str(self.verdict),
            "explained_by": list(self.explained_by),
            "through": list(self.through),
            "max_abs_at": None if self.max_abs_at is None else list(self.max_abs_at),
        }


def of_all_rows(parts: Sequence[NodeReport]) -> NodeReport:
    """One node from the reports of some of its rows each, in order: the worst of them decides."""
    if len(parts) == 1:
        return parts[0]
    measured = [part for part in parts if part.verdict is not NodeVerdict.UNMEASURED]
    if not measured:
        return parts[0]
    # Of unexplained rows the first: it says what is wrong, as of a node's channels the first does.
    deciding = next(
        (part for part in measured if part.verdict is NodeVerdict.UNEXPLAINED),
        max(measured, key=lambda part: part.worst_row or 0.0),
    )
    largest = max(measured, key=lambda part: part.max_abs or 0.0)
    known = [part for part in measured if part.rel_l2 is not None and part.norm is not None]
    norm = math.hypot(*(part.norm or 0.0 for part in known))
    far = math.hypot(*((part.rel_l2 or 0.0) * (part.norm or 0.0) for part in known))
    return replace(
        deciding,
        count=sum(part.count for part in measured),
        mismatches=sum(part.mismatches or 0 for part in measured),
        norm=norm,
        rel_l2=far / norm if norm else None,
        max_abs=largest.max_abs,
        max_abs_at=deciding.max_abs_at if largest.max_abs is None else largest.max_abs_at,
        max_ulps=max((part.max_ulps for part in measured if part.max_ulps is not None), default=None),
    )


@dataclass(frozen=True)
class ReplayReport:
    """Which nodes of a trace a file explains.

    Attributes:
        verdict: agree, divergence (a node is unexplained) or unmeasured (nothing, or not all, could be compared).
        reason: one sentence.
        trace: what the trace is of: path, sha256, arithmetic.
        file: what it was judged by: path, sha256.
        arithmetics: the presets tried.
        tokens: how many positions the trace has.
        nodes: in execution order.
        explained: by stage, in words, which arithmetic explains it (only stages where it makes a difference).
        findings: what was met on the way.
        seconds: how long it took.
    """

    verdict: Verdict
    reason: str
    trace: dict[str, Any]
    file: dict[str, Any]
    arithmetics: tuple[str, ...]
    tokens: int
    nodes: tuple[NodeReport, ...]
    explained: dict[str, str] = field(default_factory=dict)
    findings: tuple[SidedFinding, ...] = ()
    seconds: float = 0.0

    @property
    def unexplained(self) -> tuple[NodeReport, ...]:
        """The nodes that the file does not explain, in execution order."""
        return tuple(node for node in self.nodes if node.verdict is NodeVerdict.UNEXPLAINED)

    @property
    def mismatches(self) -> int:
        """Elements that are not bit-equal, over all nodes that were measured."""
        return sum(node.mismatches or 0 for node in self.nodes)

    @property
    def explanation(self) -> str:
        """Such as "ffn_gate: integer dots per 256; ffn_out: float activations"; empty where nothing tells."""
        return "; ".join(f"{stage}: {words}" for stage, words in self.explained.items())

    def counts(self) -> dict[str, int]:
        """How many nodes have each verdict."""
        return {str(v): sum(node.verdict is v for node in self.nodes) for v in NodeVerdict}

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.replay/1`."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "trace": self.trace,
            "file": self.file,
            "arithmetics": list(self.arithmetics),
            "tokens": self.tokens,
            "counts": self.counts(),
            "mismatches": self.mismatches,
            "explained": self.explained,
            "unexplained": [node.to_json() for node in self.unexplained],
            "nodes": [node.to_json() for node in self.nodes],
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": round(self.seconds, 3),
        }

    def to_frame(self) -> Any:
        """One row per node, as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame([node.to_json() for node in self.nodes])

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k nodes farthest from what the file gives: by their worst position, unexplained ones first."""
        ordered = sorted(self.nodes, key=lambda n: (n.verdict is not NodeVerdict.UNEXPLAINED, -(n.worst_row or 0.0)))
        return [node.to_json() for node in ordered[:k]]

    def __repr__(self) -> str:
        return f"<ReplayReport: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: how far every node is from what the file gives."""
        from aprjax.bisect.replay.plot import plot_report

        return plot_report(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.page import report_fragment

        return report_fragment(self.to_json())
