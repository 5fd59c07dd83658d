"""`layers`: at which layer and stage do two sides part, and is it the file, the tokens or the arithmetic?

The order is that of cost: files, then tokens, then the embedding, then every stage in execution order.
A stage is guilty when it differs *from the reference's own inputs* by more than rounding explains; what
follows it is inherited. Nothing here prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from aprjax.bisect.cause import accuse
from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.files import FilesReport, compare_files
from aprjax.bisect.lockstep import LayerPair, WeightSource, run_final, run_layers
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS, margins
from aprjax.bisect.metrics import UNMEASURED, Sums, massive_channels, relative_l2, without_channels
from aprjax.bisect.noise.floor import NoiseFloor, engine_floors
from aprjax.bisect.report import (
    VALUES_LACKING,
    FirstDivergence,
    LayerReport,
    LayersReport,
    MarginReport,
    PromptInfo,
    SidedFinding,
    StageReport,
    Verdict,
    sided,
)
from aprjax.bisect.spread import SpreadSums
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side, Traced, side_info, traced_pairs
from aprjax.checkpoint.types import Finding, UnmeasurableError
from aprjax.qwen2.loading import require_runnable
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.lacking import unmeasured_part

_BEYOND = "the trace ends before this stage"


@dataclass
class _State:
    """What accumulates while the layers go by."""

    noise: NoiseFloor
    files: FilesReport | None
    model: Side
    ref: Side
    rows: list[int]
    positions: tuple[int, ...]
    layers: list[LayerReport] = field(default_factory=list)
    outside: dict[Stage, StageReport] = field(default_factory=dict)
    margins: list[MarginReport] = field(default_factory=list)
    first: FirstDivergence | None = None
    unmeasured: str | None = None


def layers(
    model: Side,
    ref: Side,
    *,
    tokens: TokensReport,
    positions: tuple[int, ...],
    files: FilesReport | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    observe: Callable[[LayerPair], None] = lambda pair: None,
) -> LayersReport:
    """Compares two models, or what is kept of them as traces, on the same tokens.

    Args:
        model: the side under suspicion.
        ref: the side it is judged by.
        tokens: what both are fed, and whether the two tokenizers agree on it.
        positions: the positions compared, the same on both sides.
        files: the files comparison, if it is at hand.
        progress: told what is being done, and how far it is.
        observe: given every pair of captured values, for saving traces.

    Raises:
        CheckpointError: a file lacks what a forward pass needs, or a trace is of other tokens, positions or shapes.
        ValueError: a position lies outside the tokens.
    """
    clock = {"start": time.perf_counter()}
    if not positions or min(positions) < 0 or max(positions) >= len(tokens.ids):
        raise ValueError(f"positions {positions} do not all lie within the {len(tokens.ids)} tokens")
    for side in (model, ref):
        _require_same_tokens(side, tokens, positions)
    if files is None and model.checkpoint is not None and ref.checkpoint is not None:
        files = compare_files(model.checkpoint, ref.checkpoint, progress=lambda d, t: progress("files", d, t))
    clock["files"] = time.perf_counter()
    run_by = (model.arithmetic, ref.arithmetic)
    floors = [
        engine_floors(side.trace.info.engine, run_by, len(tokens.ids))
        for side in (model, ref)
        if isinstance(side, Traced)
    ]
    noise = NoiseFloor({stage: floor for known in floors for stage, floor in known.items()})
    state = _State(noise, files, model, ref, list(positions), positions)
    findings = findings_of(model, ref, files, tokens)
    if files is not None and files.dimensions:
        keys = ", ".join(f"{k} ({a} and {b})" for k, (a, b) in files.dimensions.items())
        state.unmeasured = f"the two models have other dimensions and cannot be compared stage by stage: {keys}"
    else:
        for side in (model, ref):
            if side.checkpoint is not None:
                require_runnable(side.checkpoint)
        _measure(state, tokens, progress, observe)
    clock["layers"] = time.perf_counter()
    verdict, reason = _verdict(state, tokens)
    lacking = _lacking(state, verdict)
    if lacking:
        lacks = "; ".join(finding.message for finding in lacking)
        verdict, reason = Verdict.UNMEASURED, f"{lacks}. Of what was measured, {reason}"
    return LayersReport(
        verdict=verdict,
        reason=reason,
        first_divergence=_tokens_divergence(tokens) or state.first,
        sides={"model": side_info(model), "ref": side_info(ref)},
        prompt=PromptInfo(tokens.name, tokens.text, tokens.wrap, tokens.ids, positions),
        findings=(*findings, *lacking),
        layers=tuple(([LayerReport(OUTSIDE, state.outside)] if state.outside else []) + state.layers),
        margins=tuple(state.margins),
        noise=state.noise.to_json(),
        seconds={"files": clock["files"] - clock["start"], "layers": clock["layers"] - clock["files"]},
    )


def _require_same_tokens(side: Side, tokens: TokensReport, positions: tuple[int, ...]) -> None:
    """A trace can only be compared on the tokens and at the positions that it was recorded with."""
    if not isinstance(side, Traced):
        return
    info = side.trace.info
    if info.tokens != tokens.ids:
        raise UnmeasurableError(
            f"the trace is of {len(info.tokens)} tokens ({_few(info.tokens)}), to be compared are {len(tokens.ids)} "
            f"({_few(tokens.ids)})",
            file=info.path,
            fix="record the trace with the same tokens, or leave the prompt out to take the trace's own",
        )
    missing = sorted(set(positions) - set(info.head_positions))
    if missing:
        raise UnmeasurableError(
            f"the trace has no logits at {len(missing)} of the compared positions, the first is {missing[0]}",
            file=info.path,
            fix="ask for --positions that the trace has, or record it again with all",
        )


def _few(tokens: tuple[int, ...]) -> str:
    return ", ".join(map(str, tokens[:4])) + (" …" if len(tokens) > 4 else "")


def findings_of(model: Side, ref: Side, files: FilesReport | None, tokens: TokensReport) -> tuple[SidedFinding, ...]:
    """What was met in both files and sides before anything ran: the files comparison first."""
    if files is None:
        text = "The files cannot be compared: the one that the trace was made from is not at hand."
        about = [Finding("files-compared", "info", text)]
    else:
        about = [Finding("files-compared", "info", files.sentence()), *files.findings()]
    found = [sided(f, "both") for f in (*about, *tokens.findings)]
    for name, side in (("model", model), ("ref", ref)):
        found += [sided(f, name) for f in (side.checkpoint.findings if side.checkpoint is not None else ())]
        if isinstance(side, Traced) and side.missing:
            text = f"not in the trace, so not measured: {', '.join(side.missing)}"
            found.append(SidedFinding("stages-unmeasured", "warning", text, side=name))
    return tuple(found)


def _measure(
    state: _State,
    tokens: TokensReport,
    progress: Callable[[str, int, int], None],
    observe: Callable[[LayerPair], None],
) -> None:
    known = state.ref.checkpoint or state.model.checkpoint
    total = 1 if known is None else known.config.num_layers + 1
    final = {stage: _StageSums() for stage in (Stage.FINAL_NORM, Stage.LM_HEAD)}
    for index, (rows, pair) in enumerate(_pairs(state, list(tokens.ids))):
        progress("layers", min(index, total), total)
        observe(pair)
        if pair.layer != OUTSIDE:
            state.layers.append(LayerReport(pair.layer, _stage_reports(state, pair)))
        elif Stage.EMBEDDING in {*pair.model, *pair.ref}:
            state.outside.update(_stage_reports(state, pair))
        else:
            if Stage.LM_HEAD in pair.model and Stage.LM_HEAD in pair.ref:
                state.margins += margins(pair.model[Stage.LM_HEAD], pair.ref[Stage.LM_HEAD], rows)
            for stage, sums in final.items():
                sums.add(state, pair, stage, list(range(len(rows))), rows)
    for stage, sums in final.items():
        state.outside[stage] = sums.report(state, OUTSIDE, stage)
    progress("layers", total, total)


def _pairs(state: _State, tokens: list[int]) -> Iterator[tuple[list[int], LayerPair]]:
    """(positions of the head's rows, both sides): the embedding, every layer, then the head in batches."""
    model, ref = state.model, state.ref
    if isinstance(model, Traced) or isinstance(ref, Traced):
        yield from traced_pairs(model, ref, tokens, state.rows)
        return
    weights = WeightSource((lambda name: False) if state.files is None else state.files.same_bytes)
    for pair in run_layers(model, ref, tokens, weights):
        if isinstance(pair, tuple):
            yield from run_final(model, ref, pair, state.rows, weights)
        else:
            yield state.rows, pair


def _stage_reports(state: _State, pair: LayerPair) -> dict[Stage, StageReport]:
    reports = {stage: StageReport(UNMEASURED, None, unmeasured=_BEYOND) for stage in pair.beyond}
    for stage in [stage for stage in Stage if stage in pair.ref or stage in pair.model]:
        sums = _StageSums()
        sums.add(state, pair, stage, state.rows, state.rows)
        reports[stage] = sums.report(state, pair.layer, stage)
    return reports


class _StageSums:
    """One stage's distances, added up over batches of rows."""

    def __init__(self) -> None:
        self.spreads = {"free": SpreadSums(), "local": SpreadSums()}
        self.free, self.local = Sums(self.spreads["free"]), Sums(self.spreads["local"])
        self.arithmetic, self.from_file, self.rest = Sums(), Sums(), Sums()
        self.mixed = False
        self.missing = ""
        self.tolerance: float | None = None
        self.channels: tuple[int, ...] | None = None

    def add(self, state: _State, pair: LayerPair, stage: Stage, rows: list[int], positions: list[int]) -> None:
        """Adds the rows of one pair; `positions` are the rows' positions among the tokens."""
        if stage in pair.beyond:
            self.missing = _BEYOND
            return
        if stage not in pair.model or stage not in pair.ref:
            self.missing = f"the {'reference' if stage in pair.model else 'model'}'s trace lacks this stage"
            return
        ours, theirs, local = pair.model[stage][rows], pair.ref[stage][rows], pair.local[stage][rows]
        _check_finite(state, (pair.layer, stage), ours, theirs, positions)
        self.free.add(ours, theirs)
        against = theirs if pair.against is None else pair.against[stage][rows]
        self.local.add(local, against)
        from_file = relative_l2(local, against)
        if pair.local_ref_file is not None:
            self.mixed = True
            same_file = pair.local_ref_file[stage][rows]
            self.arithmetic.add(same_file, against)
            # What the file itself adds: the two files under one arithmetic, from the same inputs.
            self.from_file.add(local, same_file)
            from_file = relative_l2(local, same_file)
        allowed = state.noise.tolerance(pair, stage, rows, from_file)
        if allowed is not None:
            self.tolerance = max(allowed, self.tolerance or 0.0)
        if self.channels is None:
            no_channels = stage in (Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX, Stage.LM_HEAD)
            self.channels = () if no_channels else massive_channels(theirs)
        if self.channels:
            self.rest.add(without_channels(ours, self.channels), without_channels(theirs, self.channels))

    def report(self, state: _State, layer: int, stage: Stage) -> StageReport:
        """The stage's report; the first stage beyond its tolerance is accused."""
        if self.missing:
            return StageReport(UNMEASURED, None, unmeasured=self.missing)
        from_file = (self.from_file if self.mixed else self.local).rel_l2
        beyond = self.tolerance is not None and from_file is not None and from_file > self.tolerance
        if state.first is None and state.unmeasured is None and beyond:
            state.first = _accuse(state, layer, stage)
        channels = self.channels or ()
        free = self.free.distance()
        row, channel = free.max_abs_at or (0, 0)
        return StageReport(
            distance=replace(free, max_abs_at=(state.positions[row], channel)),
            local_rel_l2=self.local.rel_l2,
            tolerance=self.tolerance,
            arithmetic_rel_l2=self.arithmetic.rel_l2 if self.mixed else None,
            massive_channels=channels,
            without_massive=self.rest.distance() if channels else None,
            spreads={name: sums.spread() for name, sums in self.spreads.items()},
        )


def _check_finite(
    state: _State, place: tuple[int, Stage], ours: np.ndarray, theirs: np.ndarray, positions: list[int]
) -> None:
    """NaN or infinity on the model's side alone is a divergence, on the reference's it leaves nothing to judge by."""
    if state.first is not None or state.unmeasured is not None:
        return
    for value, side in ((theirs, "reference"), (ours, "model")):
        bad = ~np.isfinite(value)
        if not bad.any():
            continue
        row, channel = (int(i) for i in np.argwhere(bad)[0])
        text = f"the {side}'s value is {value[row, channel]} at position {positions[row]}, channel {channel}"
        if side == "reference":
            state.unmeasured = f"layer {place[0]}, {place[1]}: {text}; there is nothing to judge the model by"
        else:
            accused = _accuse(state, *place)
            state.first = replace(accused, cause=f"{text}; {accused.cause}")
        return


def _accuse(state: _State, layer: int, stage: Stage) -> FirstDivergence:
    engine = next((s.engine for s in (state.model, state.ref) if isinstance(s, Traced)), None)
    arithmetics = (state.model.arithmetic, state.ref.arithmetic)
    accused = accuse(layer, stage, state.files, arithmetics, engine=engine)
    return FirstDivergence(layer, stage, accused.cause, accused.next_step, accused.confidence)


def _tokens_divergence(tokens: TokensReport) -> FirstDivergence | None:
    if tokens.agree:
        return None
    return FirstDivergence(
        OUTSIDE,
        Stage.EMBEDDING,
        tokens.reason,
        "`python -m aprjax tokens` says which token, and why",
        Confidence(Level.CERTAIN, "both tokenizers were run on the text"),
    )


def _lacking(state: _State, verdict: Verdict) -> tuple[SidedFinding, ...]:
    """What keeps a verdict from being an agreement: values that a trace lacks, where a fault may lie."""
    known = state.ref.checkpoint or state.model.checkpoint
    if verdict.exit_code != Verdict.AGREE.exit_code or known is None:
        return ()
    found = []
    for side, name, whose in ((state.model, "model", "model's"), (state.ref, "ref", "reference's")):
        if isinstance(side, Traced):
            text = unmeasured_part(side.trace, known.config.num_layers, f"the {whose} trace")
            found += [SidedFinding(VALUES_LACKING, "warning", text, side=name)] if text else []
    return tuple(found)


def _verdict(state: _State, tokens: TokensReport) -> tuple[Verdict, str]:
    if not tokens.agree:
        return Verdict.DIVERGENCE, tokens.reason
    if state.unmeasured is not None:
        return Verdict.UNMEASURED, state.unmeasured
    if state.first is not None:
        return Verdict.DIVERGENCE, state.first.cause
    empty = [layer.layer for layer in state.layers if all(s.unmeasured for s in layer.stages.values())]
    if len(empty) == len(state.layers) and not state.margins:
        return Verdict.UNMEASURED, "no value of any layer, and no logits, that could be compared"
    flips = [m for m in state.margins if m.flip]
    if not flips:
        files = state.files
        touched = files is not None and (any(not t.same_values for t in files.tensors) or files.config)
        tail = "; the files differ, but nowhere that these tokens touch" if touched else ""
        explained = (
            "rounding explains" if state.model.arithmetic == state.ref.arithmetic else "the two arithmetics explain"
        )
        tail += f"; {len(empty)} of {len(state.layers)} layers were not measured" if empty else ""
        logits = ", and no position flips" if state.margins else "; the logits were not measured"
        return Verdict.AGREE, f"no stage differs by more than {explained}{logits}{tail}"
    worst = max(flips, key=lambda m: m.gap / m.rms_delta if m.rms_delta else np.inf)
    sigmas = worst.gap / worst.rms_delta if worst.rms_delta else float("inf")
    share = f"{len(flips)} of {len(state.margins)} positions flip"
    text = f"{share}, at most across {worst.gap:.3g} logits ({sigmas:.1f} sigma)"
    if sigmas <= NEAR_TIE_SIGMAS:
        return Verdict.NEAR_TIE, f"{text}: within the noise between the two arithmetics"
    state.first = FirstDivergence(
        OUTSIDE,
        Stage.LM_HEAD,
        f"{text}, without any single guilty stage",
        "`python -m aprjax locate` and `attribute` say where the drift comes together",
        Confidence(Level.STRONG, f"{sigmas:.1f} sigma, where noise explains {NEAR_TIE_SIGMAS:.1f}"),
    )
    return Verdict.DIVERGENCE, state.first.cause
