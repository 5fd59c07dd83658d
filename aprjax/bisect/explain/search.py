"""The search: which hypotheses explain the nodes that the file does not, one fault after the other.

The first node without an explanation is looked at: every hypothesis that changes something on the way to it proposes,
and the proposals that leave no more than rounding are held to every other node that they touch. The one that explains
most is accepted; of equals one that breaks no sound node, and of those the simplest. The search goes on with what is
left, as if the fault had been repaired. Where no hypothesis explains a node alone, pairs of them are tried on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from aprjax.bisect.explain.evaluation import Applied, Evaluation
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.fit import fit
from aprjax.bisect.explain.hypothesis import Candidate, Hypothesis, Node, Scored

# A fault that every layer shows needs no more than some of them to be fitted on.
_FITTED_NODES = 8
# Of the second faults of a pair: that many of the best first ones are gone on with, each of which removed a third.
_BEAM = 3
_WORTH_GOING_ON = 0.7
# A fault that removes nearly all of a node's difference, though more is left than rounding explains, is one of several.
_NEARLY_ALL = 0.05
# Nodes of one stage that are looked at in vain before the others are taken to be like them.
_VAIN = 2

# With as many free numbers as there are values it explains any vector or row: whatever else explains them goes first.
_LAST_RESORT = frozenset({"weights-replaced"})


@dataclass(frozen=True)
class Accepted:
    """A fault that was found, with what it was found by.

    Attributes:
        scored: the proposal at the node that was looked at.
        before: by node, the residual without it.
        after: by explained node, the residual with it.
        tolerances: by explained node, what rounding explains.
        rivals: other proposals, with what they leave at the same nodes, the nearest first.
        everywhere: whether it holds wherever it could show.
        complete: whether nothing beyond rounding is left.
        partner: of a pair that only together explains its nodes, the other's sentence.
    """

    scored: Scored
    before: dict[Node, float]
    after: dict[Node, float]
    tolerances: dict[Node, float]
    rivals: tuple[tuple[Hypothesis, Candidate, float], ...]
    everywhere: bool
    complete: bool = True
    partner: str | None = None


@dataclass(frozen=True)
class _Reach:
    """What a proposal does to all nodes that it touches."""

    scored: Scored
    after: dict[Node, float]
    broken: bool


@dataclass
class Search:
    """The state of a search.

    Attributes:
        evidence: the trace and the file.
        hypotheses: in the order of simplicity.
        max_faults: no more are looked for.
        progress: told what is being done.
        accepted: what was found.
        vain: the nodes that were looked at in vain, with everything that was tried.
    """

    evidence: Evidence
    hypotheses: tuple[Hypothesis, ...]
    max_faults: int
    progress: Callable[[str, int, int], None]
    accepted: list[Accepted] = field(default_factory=list)
    vain: dict[Node, tuple[Scored, ...]] = field(default_factory=dict)
    left: list[Node] = field(default_factory=list)

    def run(self) -> None:
        """Looks for faults until nothing is left, or nothing explains what is."""
        self.left = [node for node in self.evidence.unexplained if node in self.evidence.finite]
        total = len(self.left)
        while len(self.accepted) < self.max_faults:
            self.progress("explaining", total - len(self.left), total)
            focus = next((node for node in self.left if node not in self.vain and self._promising(node)), None)
            if focus is None:
                break
            tried = tuple(self._examine(focus))
            found = self._best(focus, tried) or self._pair(focus, tried) or self._most_of(focus, tried)
            if not found:
                self.vain[focus] = tried
            for one in found:
                self._accept(one)
        self.progress("explaining", total, total)

    def _promising(self, node: Node) -> bool:
        return sum(other[1] is node[1] for other in self.vain) < _VAIN

    def _examine(self, node: Node, *, dear: bool = True, beside: Scored | None = None) -> Iterator[Scored]:
        """Every proposal of every hypothesis that concerns the node."""
        behind = self.evidence.stages_behind(node)
        for hypothesis in self.hypotheses:
            if not hypothesis.stages & behind or not (dear or hypothesis.cheap):
                continue
            if beside is not None and hypothesis.id == beside.hypothesis.id:
                continue
            for candidate in hypothesis.test(self.evidence, node):
                yield self.evidence.score(hypothesis, candidate, node)

    def _best(self, focus: Node, tried: Sequence[Scored]) -> list[Accepted]:
        reaches = [self._reach(scored) for scored in tried if scored.explains]
        reaches = [reach for reach in reaches if focus in reach.after]
        if not reaches:
            return []
        # `min` takes the first of equals: the simplest.
        best = min(reaches, key=_rank)
        best = self._without_worse(self._fitted_again(best))
        return [self._as_accepted(best, reaches, tried)]

    def _as_accepted(self, best: _Reach, reaches: Sequence[_Reach], tried: Sequence[Scored]) -> Accepted:
        chosen = best.scored.hypothesis
        rivals: dict[str, tuple[Hypothesis, Candidate, float]] = {}
        for scored in tried:
            other = scored.hypothesis
            if other.id == chosen.id or chosen.id in other.generalises:
                continue
            reach = next((reach for reach in reaches if reach.scored is scored), None)
            residual = scored.residual
            if reach is not None:
                # What it explains at one node it must explain at all.
                trial = self._trial(reach.scored)
                residual = max(self.evidence.residual(node, trial) for node in best.after)
            if other.id not in rivals or residual < rivals[other.id][2]:
                rivals[other.id] = other, scored.candidate, residual
        nearest = tuple(sorted(rivals.values(), key=lambda rival: rival[2]))
        before = {node: self.evidence.before(node) for node in best.after}
        return Accepted(best.scored, before, best.after, self._tolerances(best.after), nearest, not best.broken)

    def _trial(self, scored: Scored) -> Evaluation:
        return self.evidence.base.with_change(applied(scored))

    def _reach(self, scored: Scored) -> _Reach:
        """Holds a proposal to every node that it touches; narrowed to those that it explains if it breaks others."""
        change, trial = applied(scored), self._trial(scored)
        after = self._explained_by(change, trial)
        broken = any(
            self.evidence.residual(node, trial) > self.evidence.tolerance(node) for node in self._sound(change)
        )
        if not broken:
            return _Reach(scored, after, False)
        steps = {step for node in after for step in self.evidence.chain(node) if change.touches(step)}
        steps -= {step for node in self._sound(change) for step in self.evidence.chain(node)}
        scored = replace(scored, candidate=replace(scored.candidate, scope=frozenset(steps)))
        return _Reach(scored, self._explained_by(applied(scored), self._trial(scored)) if steps else {}, True)

    def _explained_by(self, change: Applied, trial: Evaluation) -> dict[Node, float]:
        after = {}
        for node in self.left:
            if any(change.touches(step) for step in self.evidence.chain(node)):
                residual = self.evidence.residual(node, trial)
                if residual <= self.evidence.tolerance(node):
                    after[node] = residual
        return after

    def _sound(self, change: Applied) -> Iterator[Node]:
        """The measured nodes that are explained, and that a change touches."""
        left = set(self.evidence.unexplained) & set(self.left)
        for report in self.evidence.replay.nodes:
            node = (report.layer, report.stage)
            if node in left or self.evidence.value(node) is None or not self._was_sound(node):
                continue
            if any(change.touches(step) for step in self.evidence.chain(node)):
                yield node

    def _was_sound(self, node: Node) -> bool:
        report = self.evidence.report(node)
        explained = report is not None and report.verdict.explained
        return explained or any(node in one.after for one in self.accepted)

    def _fitted_again(self, reach: _Reach) -> _Reach:
        """The same with its parameter fitted to all nodes that it explains, if it still explains them.

        Where activations are quantized on the way, a number that is off in its fourth digit leaves other codes in
        other layers: the nodes that it touches and does not explain are fitted, too, and it is seen which does better.
        """
        explained = list(reach.after)
        change = applied(reach.scored)
        others = [
            node
            for node in self.left
            if node not in reach.after and any(change.touches(step) for step in self.evidence.chain(node))
        ]
        candidates = [self._with_all(reach, explained) if len(explained) > 1 else reach]
        if others and not reach.broken:
            candidates.append(self._with_all(reach, [*explained, *others]))
        return max(candidates, key=lambda found: len(found.after))

    def _without_worse(self, reach: _Reach) -> _Reach:
        """Narrowed to what it explains where another unexplained node gets no better: that has its own fault."""
        change, trial = applied(reach.scored), self._trial(reach.scored)
        others = (node for node in self.left if node not in reach.after)
        if not any(
            any(change.touches(step) for step in self.evidence.chain(node))
            and self.evidence.residual(node, trial) >= self.evidence.before(node)
            for node in others
        ):
            return reach
        steps = {step for node in reach.after for step in self.evidence.chain(node) if change.touches(step)}
        candidate = replace(reach.scored.candidate, scope=frozenset(steps))
        return replace(reach, scored=replace(reach.scored, candidate=candidate), broken=True)

    def _with_all(self, reach: _Reach, nodes: Sequence[Node]) -> _Reach:
        candidate = reach.scored.candidate
        if candidate.spec is None or candidate.value is None or candidate.rebuild is None:
            return reach
        chosen = [nodes[i] for i in np.unique(np.linspace(0, len(nodes) - 1, _FITTED_NODES).astype(int))]
        spec = replace(candidate.spec, scope=candidate.scope)
        found = fit(self.evidence, chosen, (spec,), (candidate.value,), settle=True)
        if found is None:
            return reach
        again = replace(candidate.rebuild(found.values[0], found.errors[0]), scope=candidate.scope)
        scored = self.evidence.score(reach.scored.hypothesis, again, nodes[0])
        after = self._explained_by(applied(scored), self._trial(scored))
        return replace(reach, scored=scored, after=after) if len(after) >= len(reach.after) else reach

    def _pair(self, focus: Node, tried: Sequence[Scored]) -> list[Accepted]:
        """Two faults of one node: the best first ones, each with every other on top."""
        order = sorted((s for s in tried if s.residual < _WORTH_GOING_ON * s.before), key=lambda s: s.residual)
        firsts: list[Scored] = []
        for scored in order:
            if scored.hypothesis.id not in {first.hypothesis.id for first in firsts}:
                firsts.append(scored)
        for first in firsts[:_BEAM]:
            with self.evidence.supposing(applied(first)):
                seconds = [s for s in self._examine(focus, dear=False, beside=first) if s.residual < first.residual]
            seconds.sort(key=lambda s: s.residual)
            for second in seconds[:_BEAM]:
                pair = self._jointly(focus, first, second)
                if pair is not None:
                    return self._accepted_pair(focus, pair)
        return []

    def _jointly(self, focus: Node, first: Scored, second: Scored) -> tuple[Scored, Scored] | None:
        """Both, their numbers fitted together; None where they leave more than rounding."""
        members = [first, second]
        free = [member for member in members if member.candidate.spec is not None]
        if len(free) == 2 or (free and free[0] is first):
            fixed = [applied(member) for member in members if member.candidate.spec is None]
            with self.evidence.supposing(*fixed):
                specs = [spec for member in free if (spec := member.candidate.spec) is not None]
                starts = [value for member in free if (value := member.candidate.value) is not None]
                found = fit(self.evidence, (focus,), specs, starts)
            if found is not None:
                for member, value, error in zip(free, found.values, found.errors, strict=True):
                    assert member.candidate.rebuild is not None
                    again = member.candidate.rebuild(value, error)
                    members[members.index(member)] = replace(member, candidate=again)
        with self.evidence.supposing(applied(members[0])):
            second = self.evidence.score(members[1].hypothesis, members[1].candidate, focus)
        if not second.explains:
            return None
        return self.evidence.score(members[0].hypothesis, members[0].candidate, focus), second

    def _accepted_pair(self, focus: Node, pair: tuple[Scored, Scored]) -> list[Accepted]:
        """Both faults, narrowed alike to the nodes that they explain together."""
        first, second = pair
        change = applied(first)
        with self.evidence.supposing(change):
            reach = self._reach(second)
        after = reach.after or {focus: second.residual}
        scope = reach.scored.candidate.scope
        if scope is not None:
            steps = {step for node in after for step in self.evidence.chain(node) if change.touches(step)}
            first = replace(first, candidate=replace(first.candidate, scope=frozenset(steps)))
        with self.evidence.supposing(applied(first)):
            between = {node: self.evidence.residual(node, self.evidence.base) for node in after}
        before = {node: self.evidence.before(node) for node in after}
        tolerances = self._tolerances(after)
        words = first.candidate.sentence, reach.scored.candidate.sentence
        everywhere = not reach.broken
        return [
            # What the first leaves by itself says nothing: the two are judged by what they leave together.
            Accepted(first, before, after, tolerances, (), everywhere, partner=words[1]),
            Accepted(reach.scored, between, after, tolerances, (), everywhere, partner=words[0]),
        ]

    def _tolerances(self, nodes: Iterable[Node]) -> dict[Node, float]:
        return {node: self.evidence.tolerance(node) for node in nodes}

    def _most_of(self, focus: Node, tried: Sequence[Scored]) -> list[Accepted]:
        """One that removes nearly all, where nothing removes all."""
        best = min((s for s in tried if not s.candidate.idle), key=lambda s: s.residual, default=None)
        if best is None or not best.residual <= _NEARLY_ALL * best.before or self._incomplete(focus):
            return []
        nodes = [
            node
            for node in self.left
            if any(applied(best).touches(step) for step in self.evidence.chain(node))
            and self.evidence.residual(node, self._trial(best)) <= _NEARLY_ALL * self.evidence.before(node)
        ]
        scope = frozenset(step for node in nodes for step in self.evidence.chain(node) if applied(best).touches(step))
        best = replace(best, candidate=replace(best.candidate, scope=scope))
        trial = self._trial(best)
        after = {node: self.evidence.residual(node, trial) for node in nodes}
        before = {node: self.evidence.before(node) for node in nodes}
        rivals = sorted(
            ((s.hypothesis, s.candidate, s.residual) for s in tried if s.hypothesis.id != best.hypothesis.id),
            key=lambda rival: rival[2],
        )
        return [Accepted(best, before, after, self._tolerances(nodes), tuple(rivals), False, complete=False)]

    def _incomplete(self, node: Node) -> bool:
        return any(node in one.after and not one.complete for one in self.accepted)

    def _accept(self, one: Accepted) -> None:
        self.accepted.append(one)
        change = applied(one.scored)
        self.evidence.accept(change)
        touched = [n for n in self.left if any(change.touches(step) for step in self.evidence.chain(n))]
        gone = {node for node in touched if self.evidence.before(node) <= self.evidence.tolerance(node)}
        self.left = [node for node in self.left if node not in gone]
        # What was tried in vain may be explained now that this fault is out of the way.
        self.vain = {node: scored for node, scored in self.vain.items() if node not in touched}


def applied(scored: Scored) -> Applied:
    """The change of a proposal."""
    return Applied(scored.candidate.change, scored.hypothesis.stages, scored.candidate.scope)


def _rank(reach: _Reach) -> tuple[bool, int, bool]:
    return reach.scored.hypothesis.id in _LAST_RESORT, -len(reach.after), reach.broken
