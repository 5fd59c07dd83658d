"""`explain`: what the trace is, what its file does not explain of it, and which faults do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.bisect.confidence import Confidence, Level, by_residual
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Hypothesis, Node, Scored
from aprjax.bisect.explain.identity import identify
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.bisect.explain.report import ExplainReport, Explanation, Tried, Unexplained
from aprjax.bisect.explain.search import Accepted, Search
from aprjax.bisect.replay.judge import replay
from aprjax.bisect.replay.report import ReplayReport, place
from aprjax.bisect.report import Verdict
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace import AnyTrace

Progress = Callable[[str, int, int], None]

MAX_FAULTS = 8
# Rivals and excluded hypotheses that a report lists: the nearest.
_LISTED = 6
# The embedding's rows are no token's: perhaps no other tokens, but another embedding. The search decides.
_UNKNOWN_TOKENS = "tokens-unknown"
_OTHER_MODEL = "other-model"
# What the report calls not finite stays a value of the trace: nothing else stands in its place.
_NOT_FINITE = "not-finite"


def explain(
    trace: AnyTrace,
    checkpoint: Checkpoint,
    arithmetic: Arithmetic | Sequence[Arithmetic],
    *,
    hypotheses: Sequence[Hypothesis] | None = None,
    max_faults: int = MAX_FAULTS,
    force_file: bool = False,
    folder: Path | None = None,
    identity: Sequence[IdentityFinding] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> ExplainReport:
    """Says why a trace is not what its file gives.

    Args:
        trace: of any engine.
        checkpoint: the file that should have produced it.
        arithmetic: how the engine computes; of several, the one that explains most nodes is taken.
        hypotheses: in the order of simplicity; by default all that are known.
        max_faults: no more are looked for.
        force_file: go on where the trace's SHA-256 is not the file's.
        folder: the APRT folder that the trace was read from, whose other files identity looks at, too.
        identity: what is known of the trace's identity; by default it is looked into.
        progress: told what is being done, and how far it is.

    Raises:
        CheckpointError: the trace is of another file, of other shapes, or lacks positions.
    """
    start = time.perf_counter()
    arithmetics = (arithmetic,) if isinstance(arithmetic, Arithmetic) else tuple(arithmetic)
    if identity is None:
        known = arithmetics[0] if len(arithmetics) == 1 else None
        identity = identify(folder or trace, checkpoint, tokens=trace.info.tokens, arithmetic=known, progress=progress)
    identified = time.perf_counter()
    wrong = [finding for finding in identity if finding.severity == "error" and finding.id != _UNKNOWN_TOKENS]
    other = next((finding for finding in wrong if finding.id == _OTHER_MODEL), None)
    if other is not None:
        raise CheckpointError(other.sentence, file=trace.info.path, fix=other.next_step)
    refused = [finding for finding in wrong if not finding.stages]
    if refused:
        return refused_report(trace, checkpoint, tuple(identity), identified - start)
    doubted = {
        (layer, stage)
        for finding in wrong
        if finding.id != _NOT_FINITE
        for layer in finding.layers
        for stage in finding.stages
    }
    if doubted:
        trace = Without(trace, frozenset(doubted))
    replayed = replay(trace, checkpoint, arithmetics, force_file=force_file, progress=progress)
    judged = time.perf_counter()
    evidence = Evidence(trace, checkpoint, _fitting(replayed, arithmetics), replayed)
    if hypotheses is None:
        from aprjax.bisect.explain.registry import HYPOTHESES

        hypotheses = HYPOTHESES
    search = Search(evidence, tuple(hypotheses), max_faults, progress)
    if replayed.verdict is Verdict.DIVERGENCE:
        search.run()
    explanations = tuple(_explanation(one) for one in search.accepted)
    if any((OUTSIDE, Stage.EMBEDDING) in found.nodes for found in explanations):
        identity = [finding for finding in identity if finding.id != _UNKNOWN_TOKENS]
    unexplained = _unexplained(search, replayed)
    verdict, reason = _verdict(replayed, explanations, unexplained, tuple(identity))
    return ExplainReport(
        verdict=verdict,
        reason=reason,
        trace=replayed.trace,
        file=replayed.file,
        arithmetic=evidence.arithmetic.name,
        tokens=replayed.tokens,
        identity=tuple(finding.to_json() for finding in identity),
        explanations=explanations,
        unexplained=unexplained,
        counts=replayed.counts(),
        findings=replayed.findings,
        seconds={
            "identity": identified - start,
            "replay": judged - identified,
            "search": time.perf_counter() - judged,
        },
    )


@dataclass(frozen=True)
class Without:
    """A trace without some of its values: those that are not what their labels say.

    Attributes:
        trace: the whole trace.
        doubted: what is left out.
    """

    trace: AnyTrace
    doubted: frozenset[Node]

    @property
    def info(self) -> Any:
        """The trace's."""
        return self.trace.info

    @property
    def extra(self) -> Any:
        """The trace's."""
        return self.trace.extra

    def __getitem__(self, key: Node) -> np.ndarray:
        """One value; KeyError where it is left out."""
        if key in self.doubted:
            raise KeyError(key)
        return self.trace[key]

    def __iter__(self) -> Any:
        return (key for key in self.trace if key not in self.doubted)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _fitting(replayed: ReplayReport, arithmetics: tuple[Arithmetic, ...]) -> Arithmetic:
    """The arithmetic that explains most nodes; of equals the first."""
    return max(arithmetics, key=lambda a: sum(a.name in node.explained_by for node in replayed.nodes))


def refused_report(
    source: AnyTrace | Path, checkpoint: Checkpoint, identity: tuple[IdentityFinding, ...], seconds: float = 0.0
) -> ExplainReport:
    """The report on what is not what it is taken for: no number of it means anything, and none was computed."""
    if isinstance(source, Path):
        trace = {"path": str(source), "sha256": "", "arithmetic": "unknown"}
    else:
        trace = {"path": source.info.path, "sha256": source.info.sha256, "arithmetic": source.info.arithmetic}
    first = min(identity, key=lambda finding: finding.severity != "error")
    return ExplainReport(
        verdict=Verdict.DIVERGENCE if first.severity == "error" else Verdict.UNMEASURED,
        reason=f"nothing was compared: {first.sentence}",
        trace=trace,
        file={"path": str(checkpoint.path), "sha256": checkpoint.sha256(), "format": checkpoint.format},
        arithmetic="",
        tokens=0 if isinstance(source, Path) else len(source.info.tokens),
        identity=tuple(finding.to_json() for finding in identity),
        seconds={"identity": seconds},
    )


def _explanation(one: Accepted) -> Explanation:
    scored, candidate = one.scored, one.scored.candidate
    hypothesis = scored.hypothesis
    nodes = tuple(one.after)
    # Of all nodes the one that is nearest to its tolerance.
    worst = max(nodes, key=lambda node: one.after[node] / one.tolerances[node])
    residual, tolerance = one.after[worst], one.tolerances[worst]
    rivals = tuple(
        Tried(h.id, residual, c.sentence) for h, c, residual in one.rivals[:_LISTED] if np.isfinite(residual)
    )
    step = candidate.next_step or hypothesis.next_step
    if not one.everywhere and hypothesis.kind == "config":
        step = hypothesis.local_step
    return Explanation(
        id=hypothesis.id,
        kind=hypothesis.kind,
        sentence=candidate.sentence,
        next_step=step,
        parameters=candidate.parameters,
        nodes=nodes,
        everywhere=one.everywhere,
        before=max(one.before.values()),
        residual=residual,
        tolerance=tolerance,
        confidence=_confidence(one, residual, tolerance, rivals),
        rivals=rivals,
        complete=one.complete,
    )


def _confidence(one: Accepted, residual: float, tolerance: float, rivals: Sequence[Tried]) -> Confidence:
    nodes = one.after
    layers = {layer for layer, _ in nodes if layer != OUTSIDE}
    where = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    if layers:
        where += f" in {len(layers)} layer{'s' if len(layers) > 1 else ''}"
    next_best = (rivals[0].id, rivals[0].residual) if rivals else None
    if one.partner is not None:
        text = f"explained together with {one.partner}: residual {residual:.2g} ({where})"
        return Confidence(Level.STRONG if residual <= tolerance else Level.WEAK, text)
    return by_residual(residual, tolerance, measured_on=where, next_best=next_best)


def _unexplained(search: Search, replayed: ReplayReport) -> tuple[Unexplained, ...]:
    found = []
    evidence = search.evidence
    for report in replayed.unexplained:
        node = (report.layer, report.stage)
        if node in search.left:
            tried = search.vain.get(node, ())
            like = None
            if node not in search.vain:
                like = next((other for other in search.vain if other[1] is node[1]), None)
            before = evidence.before(node)
            found.append(Unexplained(node, report.reason, before, evidence.tolerance(node), _excluded(tried), like))
        elif node not in evidence.finite:
            found.append(Unexplained(node, report.reason, None, report.tolerance))
    return tuple(found)


def _excluded(tried: Sequence[Scored]) -> tuple[Tried, ...]:
    best: dict[str, Tried] = {}
    for scored in tried:
        one = Tried(scored.hypothesis.id, scored.residual, scored.candidate.sentence)
        if np.isfinite(one.residual) and (one.id not in best or one.residual < best[one.id].residual):
            best[one.id] = one
    return tuple(sorted(best.values(), key=lambda tried: tried.residual))


def _verdict(
    replayed: ReplayReport,
    explanations: Sequence[Explanation],
    unexplained: Sequence[Unexplained],
    identity: tuple[IdentityFinding, ...],
) -> tuple[Verdict, str]:
    wrong = [finding for finding in identity if finding.severity == "error"]
    if replayed.verdict is not Verdict.DIVERGENCE:
        if wrong:
            return Verdict.DIVERGENCE, wrong[0].sentence
        return replayed.verdict, replayed.reason
    parts = [finding.sentence for finding in wrong]
    for found in explanations:
        words = "explained by" if found.complete else "for the most part explained by"
        parts.append(f"{words} {found.sentence} ({found.before:.1g} -> {found.residual:.1g})")
    if unexplained:
        first = unexplained[0]
        nearest = next((node.excluded[0] for node in unexplained if node.excluded), None)
        count = f"{len(unexplained)} nodes stay" if len(unexplained) > 1 else "one node stays"
        text = f"{count} unexplained, the first {place(*first.node)}: {first.reason}"
        if nearest is not None:
            text += f" (nearest hypothesis: {nearest.id}, which leaves {nearest.residual:.2g})"
        parts.append(text)
    return Verdict.DIVERGENCE, "; ".join(parts)
