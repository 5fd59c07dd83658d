"""`attribute`: shares a margin's change out over the stages' own errors, and checks the largest shares by runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aprjax.bisect.attribute.causes import RealRuns, cause_shares, grouped
from aprjax.bisect.attribute.metric import Kind, metric_between
from aprjax.bisect.attribute.report import LARGEST_GAP, AttributeReport, Contribution
from aprjax.bisect.attribute.reverse import Perturbed, mixture
from aprjax.bisect.attribute.shares import Differences, Key, Shares
from aprjax.bisect.attribute.values import Errors, Source, base_runner, local_errors
from aprjax.bisect.files import FilesReport
from aprjax.bisect.lockstep import WeightSource
from aprjax.bisect.parts import stage_units
from aprjax.bisect.patching import PatchedModel, require_traced
from aprjax.bisect.reads import differing_reads
from aprjax.bisect.report import PromptInfo, Verdict, sided
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side, Traced, side_info
from aprjax.checkpoint.types import Finding, UnmeasurableError
from aprjax.qwen2.stages import Stage

Progress = Callable[[str, int, int], None]
# Positions and parts listed for each contribution; the frame of a notebook has room for few.
_LISTED = 5


def attribute(
    model: Side,
    ref: Side,
    *,
    tokens: TokensReport,
    positions: tuple[int, ...],
    files: FilesReport | None,
    kind: Kind = "margin",
    steps: int = 8,
    verify: int = 5,
    dtype: str = "float32",
    progress: Progress = lambda what, done, total: None,
) -> AttributeReport:
    """Attributes the change of a margin (or of the KL divergence) from the reference to the model.

    Args:
        model: the side under suspicion: a file that runs here, or a trace.
        ref: the side it is judged by, likewise.
        tokens: what both were fed.
        positions: whose margins are averaged.
        files: the comparison of the two files, if both are at hand: it tells a file's error from the arithmetic's.
        kind: `margin` or `kl`.
        steps: Gauss-Legendre nodes along the path.
        verify: how many of the largest contributions are checked by two real runs each.
        dtype: of the base network: float32, or float64 for exactness.
        progress: told what is being done.

    Raises:
        CheckpointError: a side cannot be run, a trace lacks values, or the two have other dimensions.
    """
    start = time.perf_counter()
    if files is not None and files.dimensions:
        keys = ", ".join(files.dimensions)
        raise UnmeasurableError(f"the two models have other dimensions, so their errors have no common network: {keys}")
    weights = WeightSource((lambda name: False) if files is None else files.same_bytes)
    progress("loading", 0, 0)
    beside = (model.arithmetic, ref.arithmetic)
    for side in (model, ref):
        known = ref.checkpoint or model.checkpoint
        if isinstance(side, Traced) and known is not None:
            require_traced(side, tokens.ids, known)
    base = PatchedModel(base_runner(ref, dtype), tokens.ids, positions, weights, beside)
    with tempfile.TemporaryDirectory(prefix="aprjax-") as name:
        errors, logits, sources = {}, {}, {}
        for which, side in (("ref", ref), ("model", model)):
            folder = Path(name) / which
            folder.mkdir()
            progress(f"local errors of the {which}", 0, 0)
            sources[which] = Source(side, tokens.ids, positions, weights, beside)
            compared = files if which == "model" else None
            errors[which], logits[which] = local_errors(sources[which], base, folder, compared)
        metric = metric_between(kind, logits["model"], logits["ref"], dtype)
        values = {which: metric.value(logits[which]) for which in logits}
        change = values["model"] - values["ref"]
        network = Perturbed(base, metric)
        measured = _measure(network, errors["model"], errors["ref"], steps=steps, verify=verify, progress=progress)
        runs = RealRuns(sources, metric, values, weights, files)
        config = base.runner.checkpoint.config
        groups = grouped(measured.integrated, measured.first, (model, ref), files, config)
        causes = cause_shares(groups, runs, change=change, verify=verify, progress=progress)
    reconstruction = max(abs(measured.ends[which] - values[which]) for which in values)
    gaps = [_gap(shares.sum(), change) for shares in (measured.integrated, measured.first)]
    verdict, reason = _verdict(kind, change, gaps[0], steps=steps, rounding=reconstruction)
    return AttributeReport(
        verdict=verdict,
        reason=reason,
        metric=kind,
        chosen=tuple(int(t) for t in metric.chosen),
        rival=tuple(int(t) for t in metric.rival),
        ref_value=values["ref"],
        model_value=values["model"],
        steps=steps,
        contributions=_contributions(measured, files, base),
        causes=causes,
        gap=gaps[0],
        first_order_gap=gaps[1],
        reconstruction=reconstruction,
        dtype=dtype,
        passes={"forwards": network.forwards, "backwards": network.backwards},
        sides={"model": side_info(model), "ref": side_info(ref)},
        prompt=PromptInfo(tokens.name, tokens.text, tokens.wrap, tokens.ids, positions),
        findings=tuple(sided(f, "both") for f in (*_findings(files), *tokens.findings)),
        seconds={"total": time.perf_counter() - start},
    )


@dataclass
class _Measured:
    integrated: Shares
    first: Shares
    ends: dict[str, float]
    checked: dict[Key, tuple[float, float]]


def _measure(
    network: Perturbed, model: Errors, ref: Errors, *, steps: int, verify: int, progress: Progress
) -> _Measured:
    """The shares by gradients, and the largest of them by runs of the base with one error moved."""
    base = network.base
    differences = Differences(model, ref)
    integrated, first = Shares(differences, len(base.tokens)), Shares(differences, len(base.tokens))
    # Gauss-Legendre on [0, 1]: exact for polynomials of degree 2 n - 1, so few steps go far on a smooth path.
    nodes, node_weights = np.polynomial.legendre.leggauss(steps)
    total = steps + 1
    for layer, gradients in network.gradients(mixture(model, ref, base, 0.0)):
        first.add(layer, gradients, 1.0)
    for index, (node, weight) in enumerate(zip(nodes, node_weights, strict=True)):
        progress("gradients along the path", index + 1, total)
        for layer, gradients in network.gradients(mixture(model, ref, base, (node + 1) / 2)):
            integrated.add(layer, gradients, weight / 2)
    ends = {
        "ref": network.value(mixture(model, ref, base, 0.0)),
        "model": network.value(mixture(model, ref, base, 1.0)),
    }
    checked = {}
    for index, key in enumerate(integrated.largest()[:verify]):
        progress("real runs of the largest", index, verify)
        alone, without = _moved(ref, key, differences[key]), _moved(model, key, -differences[key])
        infected = network.value(mixture(alone, ref, base, 1.0)) - ends["ref"]
        healed = ends["model"] - network.value(mixture(without, ref, base, 1.0))
        checked[key] = (infected, healed)
    return _Measured(integrated, first, ends, checked)


def _moved(errors: Errors, key: tuple[int, Stage], by: np.ndarray) -> Errors:
    """The errors with one of them moved."""
    old = errors.at(*key)
    return Errors({**errors.values, key: by if old is None else np.asarray(old) + by})


def _gap(total: float, change: float) -> float:
    """What a sum misses of the change, relative to it; of no change, the sum itself."""
    return abs(total - change) / abs(change) if change else abs(total)


def _contributions(measured: _Measured, files: FilesReport | None, base: PatchedModel) -> tuple[Contribution, ...]:
    shares, config = measured.integrated, base.runner.checkpoint.config
    found = []
    for key in shares.largest():
        layer, stage = key
        by_position, by_column = shares.by_position[key], shares.by_column[key]
        if not np.any(by_position):
            continue
        at_the_head = stage in (Stage.FINAL_NORM, Stage.LM_HEAD)
        order = np.argsort(-np.abs(by_position), kind="stable")[:_LISTED]
        rows = base.rows if at_the_head else range(len(by_position))
        parts = [
            (unit.name, float(by_column[unit.columns].sum())) for unit in stage_units(stage, len(by_column), config)
        ]
        infects, heals = measured.checked.get(key, (None, None))
        found.append(
            Contribution(
                layer=layer,
                stage=stage,
                integrated=shares.total(key),
                first_order=measured.first.total(key),
                positions=tuple((rows[int(i)], float(by_position[i])) for i in order),
                parts=tuple(sorted(parts, key=lambda part: -abs(part[1]))[:_LISTED]),
                source=_source(shares, key, files),
                tensors=tuple(
                    (name, shares.from_file(key, columns))
                    for name, columns in (differing_reads(layer, stage, files, config) if files else ())
                ),
                infects=infects,
                heals=heals,
            )
        )
    return tuple(found)


def _source(shares: Shares, key: Key, files: FilesReport | None) -> str:
    if files is None:
        return "unknown: the files are not both at hand"
    total, from_file = shares.total(key), shares.from_file(key)
    return "file" if abs(from_file) > abs(total - from_file) else "arithmetic"


def _findings(files: FilesReport | None) -> list[Finding]:
    return [] if files is None else [Finding("files-compared", "info", files.sentence()), *files.findings()]


def _verdict(kind: str, change: float, gap: float, *, steps: int, rounding: float) -> tuple[Verdict, str]:
    if abs(change) <= rounding:
        return Verdict.AGREE, f"nothing to attribute: the {kind} is the same on both sides, to the rounding of the base"
    text = f"the {kind} changes by {change:+.4g}, and the shares miss {gap:.2%} of it with {steps} steps"
    if gap > LARGEST_GAP:
        return Verdict.UNMEASURED, f"{text}: they are not to be relied on; ask for more --steps, or --base float64"
    return Verdict.AGREE, text
