"""What `explain` reports: the faults found, one after the other, and what none of the hypotheses explains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aprjax.bisect.confidence import Confidence
from aprjax.bisect.explain.hypothesis import Kind, Node, Parameter
from aprjax.bisect.replay.report import place
from aprjax.bisect.report import SidedFinding, Verdict

SCHEMA = "aprjax.explain/1"


def node_json(node: Node) -> dict[str, Any]:
    """A node as plain JSON values."""
    return {"layer": node[0], "stage": str(node[1])}


@dataclass(frozen=True)
class Tried:
    """A hypothesis at a node, or a rival of an explanation.

    Attributes:
        id: the hypothesis's.
        residual: what it leaves: largest relative L2 of any position.
        sentence: what it would say.
    """

    id: str
    residual: float
    sentence: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {"id": self.id, "residual": self.residual, "sentence": self.sentence}


@dataclass(frozen=True)
class Explanation:
    """One fault that was found.

    Attributes:
        id: the hypothesis's.
        kind: what is wrong: a config key, the computation, or the weights.
        sentence: in words, without a full stop.
        next_step: what to do about it.
        parameters: its numbers: fitted ones with how far off they may be.
        nodes: the nodes that it explains, in execution order.
        everywhere: whether it holds at all nodes where it could show.
        before: largest relative L2 of any position of these nodes, without it.
        residual: the same with it.
        tolerance: what rounding explains at the node where `residual` is.
        confidence: how sure that is, and what it rests on.
        rivals: other hypotheses that explain the same nodes, or come nearest to it.
        complete: whether the residual lies within rounding.
    """

    id: str
    kind: Kind
    sentence: str
    next_step: str
    parameters: dict[str, Any]
    nodes: tuple[Node, ...]
    everywhere: bool
    before: float
    residual: float
    tolerance: float
    confidence: Confidence
    rivals: tuple[Tried, ...] = ()
    complete: bool = True

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it shows in."""
        return tuple(sorted({layer for layer, _ in self.nodes}))

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        parameters = {k: v.to_json() if isinstance(v, Parameter) else v for k, v in self.parameters.items()}
        return {
            "id": self.id,
            "kind": self.kind,
            "sentence": self.sentence,
            "next_step": self.next_step,
            "parameters": parameters,
            "everywhere": self.everywhere,
            "layers": list(self.layers),
            "stages": list(dict.fromkeys(str(stage) for _, stage in self.nodes)),
            "nodes": [node_json(node) for node in self.nodes],
            "before": self.before,
            "residual": self.residual,
            "tolerance": self.tolerance,
            "complete": self.complete,
            "confidence": self.confidence.to_json(),
            "rivals": [rival.to_json() for rival in self.rivals],
        }


@dataclass(frozen=True)
class Unexplained:
    """A node that no hypothesis explains.

    Attributes:
        node: its layer and stage.
        reason: what is wrong with it, in words (`replay`).
        before: largest relative L2 of any position; None where it is not finite.
        tolerance: what rounding explains.
        excluded: what was tried, the nearest first; empty where `like` says which node stands for it.
        like: the node that was looked at in its place: the same stage of an earlier layer.
    """

    node: Node
    reason: str
    before: float | None
    tolerance: float | None
    excluded: tuple[Tried, ...] = ()
    like: Node | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            **node_json(self.node),
            "reason": self.reason,
            "before": self.before,
            "tolerance": self.tolerance,
            "excluded": [tried.to_json() for tried in self.excluded],
            "like": None if self.like is None else node_json(self.like),
        }


@dataclass(frozen=True)
class ExplainReport:
    """Why a trace is not what its file gives.

    Attributes:
        verdict: agree (the file explains the trace as it is), divergence, or unmeasured.
        reason: one sentence.
        trace: what the trace is of: path, sha256, arithmetic.
        file: what it was judged by.
        arithmetic: the preset that the file was run by.
        tokens: how many positions the trace has.
        identity: what is wrong with the trace as a record (JSON of `IdentityFinding`s): before any number is compared.
        explanations: the faults, in the order in which they were found.
        unexplained: the nodes that are left.
        counts: how many nodes `replay` found exact, within rounding, unexplained and unmeasured.
        findings: what was met on the way.
        seconds: how long it took.
    """

    verdict: Verdict
    reason: str
    trace: dict[str, Any]
    file: dict[str, Any]
    arithmetic: str
    tokens: int
    identity: tuple[dict[str, Any], ...] = ()
    explanations: tuple[Explanation, ...] = ()
    unexplained: tuple[Unexplained, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    findings: tuple[SidedFinding, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def explained(self) -> bool:
        """Whether nothing is left unexplained."""
        return self.verdict is not Verdict.UNMEASURED and not self.unexplained

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.explain/1`."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "explained": self.explained,
            "trace": self.trace,
            "file": self.file,
            "arithmetic": self.arithmetic,
            "tokens": self.tokens,
            "identity": list(self.identity),
            "explanations": [explanation.to_json() for explanation in self.explanations],
            "unexplained": [node.to_json() for node in self.unexplained],
            "counts": self.counts,
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per explanation, then one per unexplained node."""
        rows: list[dict[str, Any]] = []
        for index, found in enumerate(self.explanations, 1):
            where = place(*found.nodes[0]) if found.nodes else ""
            rows.append(
                {
                    "fault": index,
                    "id": found.id,
                    "sentence": found.sentence,
                    "first": where,
                    "nodes": len(found.nodes),
                    "before": found.before,
                    "residual": found.residual,
                    "confidence": str(found.confidence.level),
                }
            )
        for left in self.unexplained:
            near = left.excluded[0] if left.excluded else None
            rows.append(
                {
                    "fault": None,
                    "id": None,
                    "sentence": left.reason,
                    "first": place(*left.node),
                    "nodes": 1,
                    "before": left.before,
                    "residual": None if near is None else near.residual,
                    "confidence": None,
                }
            )
        return rows

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k rows that explain most nodes, and after them the unexplained ones that differ most."""

        def weight(row: dict[str, Any]) -> tuple[bool, int, float]:
            return row["fault"] is None, -row["nodes"], -(row["before"] or 0.0)

        return sorted(self.rows(), key=weight)[:k]

    def __repr__(self) -> str:
        return f"<ExplainReport: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: what each hypothesis leaves, against what rounding explains."""
        from aprjax.bisect.explain.plot import plot_residuals

        return plot_residuals(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.page import report_fragment

        return report_fragment(self.to_json())
