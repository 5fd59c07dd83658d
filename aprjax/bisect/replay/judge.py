"""`replay`: which nodes of a trace does a file explain, given each node's own inputs? One trace is enough.

Nothing is inherited: a wrong value is charged to the node that made it, and the nodes after it, computed from
it, stay clean. Where a value in the dump is not what the engine itself went on with, the nodes after it
follow from the file's own value instead, and the report says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aprjax.bisect.cause import MATMUL_STAGES, tensors_of
from aprjax.bisect.noise.floor import FACTOR, SMALLEST, engine_floors
from aprjax.bisect.replay.layers import ReplayedLayer, replay_layers, require_comparable, visible_part
from aprjax.bisect.replay.patterns import describe_fault
from aprjax.bisect.replay.report import NodeReport, NodeVerdict, ReplayReport, of_all_rows, place
from aprjax.bisect.replay.words import explained_in_words
from aprjax.bisect.report import SidedFinding, Verdict
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
from aprjax.qwen2.loading import head_tensor, require_runnable
from aprjax.qwen2.stages import OUTSIDE, STAGE_INPUTS, Stage
from aprjax.trace import AnyTrace
from aprjax.trace.lacking import unmeasured_part

_RANK = {
    NodeVerdict.EXACT: 0,
    NodeVerdict.ROUNDING: 1,
    NodeVerdict.UNEXPLAINED: 2,
    NodeVerdict.UNMEASURED: 3,
}


def replay(
    trace: AnyTrace,
    checkpoint: Checkpoint,
    arithmetic: Arithmetic | Sequence[Arithmetic],
    *,
    force_file: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ReplayReport:
    """Recomputes every node of a trace from the trace's own inputs, by a file's weights.

    Args:
        trace: of any engine.
        checkpoint: the file that it claims to have run.
        arithmetic: how the engine computes; of several, each node is told which explains it best.
        force_file: go on where the trace's SHA-256 is not the file's; it becomes a finding.
        progress: told what is being done, and how far it is.

    Raises:
        CheckpointError: the trace is of another file, of other shapes, or lacks positions.
    """
    start = time.perf_counter()
    arithmetics = (arithmetic,) if isinstance(arithmetic, Arithmetic) else tuple(arithmetic)
    if not arithmetics:
        raise ValueError("no arithmetic to replay by")
    require_runnable(checkpoint)
    findings = _same_file(trace, checkpoint, force=force_file)
    require_comparable(trace, checkpoint)
    judge = _Judge(checkpoint, arithmetics, engine_floors(trace.info.engine, arithmetics, len(trace.info.tokens)))
    total = checkpoint.config.num_layers + 2
    # By node, the reports of some rows each (the head comes so), and in each one per arithmetic.
    parts: dict[tuple[int, Stage], list[list[NodeReport]]] = {}
    for done, replayed in enumerate(replay_layers(trace, checkpoint, arithmetics)):
        progress("replaying", min(done, total), total)
        for columns in judge.layer(replayed):
            parts.setdefault((columns[0].layer, columns[0].stage), []).append(columns)
    progress("replaying", total, total)
    tables = [[of_all_rows(column) for column in zip(*rows, strict=True)] for rows in parts.values()]
    nodes = tuple(_choose(tables, arithmetics))
    verdict, reason = _verdict(nodes)
    lacks = unmeasured_part(trace, checkpoint.config.num_layers, "the trace") if verdict is Verdict.AGREE else ""
    if lacks:
        verdict, reason = Verdict.UNMEASURED, f"{lacks}. Of what was measured, {reason}"
    info = trace.info
    return ReplayReport(
        verdict=verdict,
        reason=reason,
        trace={
            "path": info.path,
            "sha256": info.sha256,
            "arithmetic": info.arithmetic,
            "platform": info.platform,
            "engine": dict(info.engine),
        },
        file={"path": str(checkpoint.path), "sha256": checkpoint.sha256(), "format": checkpoint.format},
        arithmetics=tuple(a.name for a in arithmetics),
        tokens=len(info.tokens),
        nodes=nodes,
        explained=explained_in_words(nodes, arithmetics, checkpoint) if len(arithmetics) > 1 else {},
        findings=(*findings, *_missing(nodes)),
        seconds=time.perf_counter() - start,
    )


def _same_file(trace: AnyTrace, checkpoint: Checkpoint, *, force: bool) -> tuple[SidedFinding, ...]:
    claimed, found = trace.info.sha256, checkpoint.sha256()
    if claimed == found:
        return ()
    text = (
        f"the trace was made from a file with sha256 {claimed[:16] or 'unknown'}… ({trace.info.path}), "
        f"this file has {found[:16]}…"
    )
    if not force:
        raise CheckpointError(
            text, file=checkpoint.path, fix="give the file that was run, or --force-file to judge by this one"
        )
    return (SidedFinding("file-differs", "warning", text, side="trace"),)


def _missing(nodes: tuple[NodeReport, ...]) -> tuple[SidedFinding, ...]:
    """One finding for the stages that the trace lacks, whatever the layer."""
    lacking: dict[Stage, list[int]] = {}
    for node in nodes:
        if node.verdict is NodeVerdict.UNMEASURED:
            lacking.setdefault(node.stage, []).append(node.layer)
    if not lacking:
        return ()
    text = ", ".join(
        f"{stage} ({len(layers)} layers)" if layers[0] != OUTSIDE else str(stage) for stage, layers in lacking.items()
    )
    text = f"not measured: {text}; what follows such a stage is judged over both operations"
    return (SidedFinding("stages-unmeasured", "warning", text, side="trace"),)


def _verdict(nodes: tuple[NodeReport, ...]) -> tuple[Verdict, str]:
    measured = [node for node in nodes if node.verdict is not NodeVerdict.UNMEASURED]
    unexplained = [node for node in measured if node.verdict is NodeVerdict.UNEXPLAINED]
    if not measured:
        return Verdict.UNMEASURED, "the trace holds no value that could be compared"
    if unexplained:
        first = unexplained[0]
        share = f"{len(unexplained)} of {len(measured)} nodes are not explained by the file"
        return Verdict.DIVERGENCE, f"{share}; the first is {place(first.layer, first.stage)}: {first.reason}"
    exact = sum(node.verdict is NodeVerdict.EXACT for node in measured)
    missing = len(nodes) - len(measured)
    tail = f"; {missing} were not measured" if missing else ""
    if exact == len(measured):
        return Verdict.AGREE, f"all {exact} nodes are what the file gives, to the bit{tail}"
    worst = max(node.worst_row or 0.0 for node in measured)
    return Verdict.AGREE, (
        f"all {len(measured)} nodes are what the file gives: {exact} to the bit, the others within rounding "
        f"(at most {worst:.1e} of a position's norm){tail}"
    )


@dataclass
class _Judge:
    """Compares the values of a layer under every arithmetic."""

    checkpoint: Checkpoint
    arithmetics: tuple[Arithmetic, ...]
    # Floors that no run of the file shows.
    floors: dict[Stage, float]
    # Whether the layer before left an output that its own inputs do not explain, under each arithmetic.
    _doubtful: dict[int, bool] | None = None

    def layer(self, replayed: ReplayedLayer) -> list[list[NodeReport]]:
        """For every stage, in execution order, one report per arithmetic."""
        doubtful = self._doubtful or {}
        stages = [stage for stage in Stage if stage in replayed.through]
        columns = []
        for index in range(len(self.arithmetics)):
            nodes = {stage: self._node(replayed, stage, index, frozenset()) for stage in stages}
            without = _suspects(nodes, doubtful.get(index, False))
            if without:
                nodes.update(self._follow(replayed, nodes, index, without))
            columns.append(nodes)
        # The head has no such output: its rows all follow the last layer.
        last = next((s for s in (Stage.EMBEDDING, Stage.POST_FFN_RESIDUAL) if s in replayed.through), None)
        if last is not None:
            self._doubtful = {
                index: nodes[last].verdict is NodeVerdict.UNEXPLAINED for index, nodes in enumerate(columns)
            }
        return [[nodes[stage] for nodes in columns] for stage in stages]

    def _follow(
        self, replayed: ReplayedLayer, nodes: dict[Stage, NodeReport], index: int, without: frozenset[str]
    ) -> dict[Stage, NodeReport]:
        """Nodes that follow from the file's own value of the suspects, where the trace's explains nothing."""
        changed: dict[Stage, NodeReport] = {}
        causes: set[str] = set()
        for stage, node in nodes.items():
            inputs = {str(source) for source in STAGE_INPUTS[stage]} & without
            if node.verdict is not NodeVerdict.UNEXPLAINED or not inputs:
                continue
            again = self._node(replayed, stage, index, without)
            if again.verdict.explained:
                changed[stage] = replace(again, through=tuple(sorted({*again.through, *inputs})))
                causes |= inputs
        note = "; what follows was computed from the file's own value: the dump is wrong here, not the engine"
        for stage, node in nodes.items():
            if str(stage) in causes:
                changed[stage] = replace(node, reason=node.reason + note)
        return changed

    def _node(self, replayed: ReplayedLayer, stage: Stage, index: int, without: frozenset[str]) -> NodeReport:
        name = self.arithmetics[index].name
        report = NodeReport(
            replayed.layer, stage, NodeVerdict.UNMEASURED, arithmetic=name, through=replayed.through[stage]
        )
        value = replayed.traced.get(stage)
        if value is None:
            return replace(report, reason="the trace lacks this stage")
        if stage in replayed.spoiled:
            return replace(report, reason="its inputs in the trace are not finite")
        value = visible_part(stage, value)
        # In the precision that traces are kept in.
        expected = visible_part(stage, replayed.compute(index, without)[stage].astype(np.float32))
        mismatches = int(np.count_nonzero(~_equal(value, expected)))
        if mismatches == 0:
            return replace(
                report,
                verdict=NodeVerdict.EXACT,
                count=value.size,
                mismatches=0,
                norm=_norm(expected),
                rel_l2=0.0,
                worst_row=0.0,
                max_abs=0.0,
                max_ulps=0.0,
            )
        judged = visible_part(stage, replayed.judge(index, without)[stage])
        explain = self._explainer(replayed, stage)
        floor = max(SMALLEST, self.floors.get(stage, 0.0), float(row_distances(judged, expected).max()))
        return _measured(
            report, value, expected, tolerance=FACTOR * floor, explain=explain, positions=replayed.positions
        )

    def _explainer(self, replayed: ReplayedLayer, stage: Stage) -> Callable[[np.ndarray, np.ndarray, float], str]:
        source = STAGE_INPUTS[stage][0] if stage in MATMUL_STAGES else None
        inputs = None if source is None else replayed.traced.get(Stage(source))
        tensors = [
            self.checkpoint.tensors.get(name) or head_tensor(self.checkpoint)
            for name in (tensors_of(replayed.layer, stage) if inputs is not None else ())
        ]

        def explain(value: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
            return describe_fault(
                stage,
                value,
                expected,
                tolerance=tolerance,
                config=self.checkpoint.config,
                positions=replayed.positions,
                inputs=inputs,
                weights=tensors,
            )

        return explain


def _equal(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (value == expected) | (np.isnan(value) & np.isnan(expected))


def _measured(
    report: NodeReport,
    value: np.ndarray,
    expected: np.ndarray,
    *,
    tolerance: float,
    explain: Callable[[np.ndarray, np.ndarray, float], str],
    positions: tuple[int, ...],
) -> NodeReport:
    """The node's distances, and its verdict by what rounding may add up to in one position."""
    unequal = ~_equal(value, expected)
    report = replace(report, count=value.size, mismatches=int(np.count_nonzero(unequal)), tolerance=tolerance)
    bad = ~np.isfinite(value) & unequal
    if bad.any():
        row, channel = (int(i) for i in np.argwhere(bad)[0])
        text = f"its value is {value[row, channel]} at position {positions[row]}, channel {channel}"
        return replace(report, verdict=NodeVerdict.UNEXPLAINED, max_abs_at=(positions[row], channel), reason=text)
    if not np.isfinite(expected).all():
        return replace(report, reason="the file gives values that are not finite here", tolerance=None)
    rows = row_distances(value, expected)
    delta = np.abs(value.astype(np.float64) - expected)
    row, channel = (int(i) for i in np.unravel_index(int(delta.argmax()), delta.shape))
    larger = np.float32(max(abs(value[row, channel]), abs(expected[row, channel])))
    norm = _norm(expected) or 0.0
    worst = float(rows.max())
    explained = worst <= tolerance
    return replace(
        report,
        verdict=NodeVerdict.ROUNDING if explained else NodeVerdict.UNEXPLAINED,
        norm=norm,
        rel_l2=float(np.linalg.norm(delta)) / norm if norm else None,
        worst_row=worst if np.isfinite(worst) else None,
        max_abs=float(delta[row, channel]),
        max_abs_at=(positions[row], channel),
        max_ulps=float(delta[row, channel] / np.spacing(larger)),
        reason="" if explained else explain(value, expected, tolerance),
    )


def _norm(value: np.ndarray) -> float | None:
    norm = float(np.linalg.norm(value.astype(np.float64)))
    return norm if np.isfinite(norm) else None


def row_distances(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative L2 of every row, so that one position's massive values hide no fault in another's.

    A row of zeros allows no difference: any is infinitely far.
    """
    delta = np.linalg.norm(value.astype(np.float64) - expected, axis=1)
    norm = np.linalg.norm(expected.astype(np.float64), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(delta == 0, 0.0, delta / norm)


def _suspects(nodes: dict[Stage, NodeReport], doubtful: bool) -> frozenset[str]:
    """Unexplained nodes with an unexplained consumer: values that the engine may not have gone on with."""
    unexplained = {str(stage) for stage, node in nodes.items() if node.verdict is NodeVerdict.UNEXPLAINED}
    candidates = unexplained | ({"previous"} if doubtful else set())
    consumed = {str(source) for stage in nodes if str(stage) in unexplained for source in STAGE_INPUTS[stage]}
    return frozenset(candidates & consumed)


def _choose(tables: list[list[NodeReport]], arithmetics: tuple[Arithmetic, ...]) -> list[NodeReport]:
    """Of every node's reports the best; among equals that of the arithmetic which explains most nodes."""
    wins = [
        sum(2 if row[i].verdict is NodeVerdict.EXACT else row[i].verdict.explained for row in tables)
        for i in range(len(arithmetics))
    ]
    chosen = []
    for row in tables:
        best = min(range(len(row)), key=lambda i: _preference(row[i], wins[i]))
        names = tuple(node.arithmetic for node in row if node.verdict.explained)
        chosen.append(replace(row[best], explained_by=names))
    return chosen


def _preference(node: NodeReport, wins: int) -> tuple[float, float, float]:
    rank = _RANK[node.verdict]
    far = node.worst_row if node.worst_row is not None else np.inf
    # Within rounding, smaller is not better: which arithmetic it was is not to be read from noise.
    return (rank, far, -wins) if node.verdict is NodeVerdict.UNEXPLAINED else (rank, -wins, far)


def presets_to_try() -> tuple[Arithmetic, ...]:
    """Every preset: what `--arithmetic auto` stands for."""
    return tuple(PRESETS.values())
