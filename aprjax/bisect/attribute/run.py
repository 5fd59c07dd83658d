"""`attribute`: shares a margin's change out over the stages' own errors, and checks the largest shares by runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aprjax.bisect.attribute.metric import Kind, metric_between
from aprjax.bisect.attribute.report import LARGEST_GAP, AttributeReport, Contribution
from aprjax.bisect.attribute.reverse import Perturbed, mixture
from aprjax.bisect.attribute.values import Errors, Source, base_runner, local_errors
from aprjax.bisect.cause import STAGE_CONFIG, tensors_of
from aprjax.bisect.files import FilesReport
from aprjax.bisect.lockstep import WeightSource
from aprjax.bisect.parts import stage_units
from aprjax.bisect.patching import PatchedModel
from aprjax.bisect.report import PromptInfo, Verdict, sided
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side, side_info
from aprjax.checkpoint.types import CheckpointError, Finding
from aprjax.qwen2.model import trim
from aprjax.qwen2.stages import Stage

Progress = Callable[[str, int, int], None]
# Positions and parts listed for each contribution; the frame of a notebook has room for few.
_LISTED = 5


@dataclass
class _Shares:
    """Sums of gradient times error difference, over the steps."""

    differences: dict[tuple[int, Stage], np.ndarray]
    count: int
    by_position: dict[tuple[int, Stage], np.ndarray] = field(default_factory=dict)
    by_column: dict[tuple[int, Stage], np.ndarray] = field(default_factory=dict)

    def add(self, layer: int, gradients: Mapping[Stage, np.ndarray], weight: float) -> None:
        """Adds one step's gradients."""
        for stage, gradient in gradients.items():
            difference = self.differences.get((layer, stage))
            if difference is None:
                continue
            at_the_head = stage in (Stage.FINAL_NORM, Stage.LM_HEAD)
            slope = gradient if at_the_head else np.asarray(trim(stage, gradient, self.count))
            product = slope.astype(np.float64) * difference * weight
            key = (layer, stage)
            self.by_position[key] = self.by_position.get(key, 0.0) + product.sum(axis=1)
            self.by_column[key] = self.by_column.get(key, 0.0) + product.sum(axis=0)

    def total(self, key: tuple[int, Stage]) -> float:
        """One stage's share."""
        return float(np.sum(self.by_position.get(key, 0.0)))

    def sum(self) -> float:
        """All shares together."""
        return float(sum(self.total(key) for key in self.by_position))


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
        raise CheckpointError(f"the two models have other dimensions, so their errors have no common network: {keys}")
    weights = WeightSource((lambda name: False) if files is None else files.same_bytes)
    progress("loading", 0, 0)
    base = PatchedModel(base_runner(ref, dtype), tokens.ids, positions, weights)
    with tempfile.TemporaryDirectory(prefix="aprjax-") as name:
        errors, logits = {}, {}
        for which, side in (("ref", ref), ("model", model)):
            folder = Path(name) / which
            folder.mkdir()
            progress(f"local errors of the {which}", 0, 0)
            source = Source(side, tokens.ids, positions, weights)
            errors[which], logits[which] = local_errors(source, base, folder)
        metric = metric_between(kind, logits["model"], logits["ref"], dtype)
        values = {which: float(metric(logits[which].astype(dtype))) for which in logits}
        network = Perturbed(base, metric)
        measured = _measure(network, errors["model"], errors["ref"], steps=steps, verify=verify, progress=progress)
    reconstruction = max(abs(measured.ends[which] - values[which]) for which in values)
    change = values["model"] - values["ref"]
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
    integrated: _Shares
    first: _Shares
    ends: dict[str, float]
    checked: dict[tuple[int, Stage], tuple[float, float]]


def _measure(
    network: Perturbed, model: Errors, ref: Errors, *, steps: int, verify: int, progress: Progress
) -> _Measured:
    """The shares by gradients, and the largest of them by real runs."""
    base = network.base
    count = len(base.tokens)
    differences = {}
    for key in {**model.values, **ref.values}:
        ours, theirs = model.at(*key), ref.at(*key)
        difference = (0.0 if ours is None else np.asarray(ours)) - (0.0 if theirs is None else np.asarray(theirs))
        if np.any(difference):
            differences[key] = difference
    integrated, first = _Shares(differences, count), _Shares(differences, count)
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
    for index, key in enumerate(_largest(integrated)[:verify]):
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


def _largest(shares: _Shares) -> list[tuple[int, Stage]]:
    return sorted(shares.by_position, key=lambda key: -abs(shares.total(key)))


def _gap(total: float, change: float) -> float:
    """What a sum misses of the change, relative to it; of no change, the sum itself."""
    return abs(total - change) / abs(change) if change else abs(total)


def _contributions(measured: _Measured, files: FilesReport | None, base: PatchedModel) -> tuple[Contribution, ...]:
    shares, config = measured.integrated, base.runner.checkpoint.config
    found = []
    for key in _largest(shares):
        layer, stage = key
        by_position, by_column = shares.by_position[key], shares.by_column[key]
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
                source=_source(layer, stage, files),
                tensors=_tensors(layer, stage, files, by_column, base),
                infects=infects,
                heals=heals,
            )
        )
    return tuple(found)


def _source(layer: int, stage: Stage, files: FilesReport | None) -> str:
    if files is None:
        return "unknown: the files are not both at hand"
    reads = tensors_of(layer, stage)
    differs = any(files.tensor(name) is not None for name in reads)
    differs = differs or any(key in files.config for key in STAGE_CONFIG.get(stage, ()))
    return "file" if differs else "arithmetic"


def _tensors(
    layer: int, stage: Stage, files: FilesReport | None, by_column: np.ndarray, base: PatchedModel
) -> tuple[tuple[str, float], ...]:
    """The share of each differing tensor that the stage reads: q, k and v lie side by side in its columns."""
    if files is None:
        return ()
    names = tensors_of(layer, stage)
    config = base.runner.checkpoint.config
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    columns = [slice(0, q), slice(q, q + kv), slice(q + kv, None)] if len(names) == 3 else [slice(None)]
    pairs = [(name, float(by_column[part].sum())) for name, part in zip(names, columns, strict=False)]
    return tuple((name, share) for name, share in pairs if files.tensor(name) is not None)


def _findings(files: FilesReport | None) -> list[Finding]:
    return [] if files is None else [Finding("files-compared", "info", files.sentence()), *files.findings()]


def _verdict(kind: str, change: float, gap: float, *, steps: int, rounding: float) -> tuple[Verdict, str]:
    if abs(change) <= rounding:
        return Verdict.AGREE, f"nothing to attribute: the {kind} is the same on both sides, to the rounding of the base"
    text = f"the {kind} changes by {change:+.4g}, and the shares miss {gap:.2%} of it with {steps} steps"
    if gap > LARGEST_GAP:
        return Verdict.UNMEASURED, f"{text}: they are not to be relied on; ask for more --steps, or --base float64"
    return Verdict.AGREE, text
