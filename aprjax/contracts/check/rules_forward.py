"""Forward parity: ratios of standard deviations over equal selections, and what those cannot see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from aprjax.bisect.report import VALUES_LACKING, LayersReport, StageReport, Verdict
from aprjax.contracts.check.measurement import Asked, Measurement, measures
from aprjax.contracts.check.traced_pass import SELECTIONS, SLOTS, TracedPass
from aprjax.qwen2.stages import OUTSIDE, Stage

# Upstream's prompt of forward parity, and the same in ChatML, which meets the control tokens' rows.
PROBES = ("direct", "chatml")
_DRIFT_STAGES = (Stage.POST_ATTN_RESIDUAL, Stage.POST_FFN_RESIDUAL)


def passes(asked: Asked) -> list[TracedPass]:
    """The passes over both probes; one pass where a recorded trace has its own tokens."""
    found = {}
    for name in PROBES:
        one = asked.bench.traced(name)
        found[one.artifact] = one
    return list(found.values())


def broken_off(report: LayersReport) -> Measurement | None:
    """What keeps a pass from being judged by numbers: tokens or dimensions that differ, values that are none."""
    # What a trace lacks is missing from the numbers; those that are there can be judged.
    partial = any(finding.id == VALUES_LACKING for finding in report.findings)
    if report.verdict is Verdict.UNMEASURED and not partial:
        return Measurement(unmeasured=report.reason)
    first = report.first_divergence
    if first is not None and not report.layers:
        return Measurement(failed=f"{report.prompt.name}: {first.cause}")
    return None


def _selected_ratios(found: Iterable[TracedPass], slot: str, layer: int | None = None) -> dict[str, Any]:
    """The least and largest ratio of a slot, of each selection, and where."""
    measured: dict[str, Any] = {}
    for selection in SELECTIONS:
        ratios = [
            (ratio, index, one.report.prompt.name)
            for one in found
            for index, ratio in one.ratios(slot, selection).items()
            if layer is None or index == layer
        ]
        finite = [(ratio, index, name) for ratio, index, name in ratios if ratio is not None]
        complete = len(finite) == len(ratios) > 0
        measured[f"least_{slot}_ratio_{selection}"] = min(finite)[0] if complete else None
        measured[f"largest_{slot}_ratio_{selection}"] = max(finite)[0] if complete else None
        if finite and selection == "last":
            far = max(finite, key=lambda item: abs(math.log(item[0])) if item[0] > 0 else math.inf)
            measured["farthest_layer"] = far[1]
    return measured


@measures("FALSIFY-APR-GGUF-PARITY-001")
def every_layer_in_band(asked: Asked) -> Measurement:
    """The ratio of ffn_swigl's standard deviations, in every layer, over equal selections."""
    found = passes(asked)
    stopped = next(filter(None, (broken_off(one.report) for one in found)), None)
    if stopped is not None:
        return stopped
    measured = _selected_ratios(found, "ffn_swigl")
    layers = len({layer for one in found for layer, _, _ in one.spreads})
    return Measurement(
        {**measured, "layers": layers},
        f"{layers} layers, prompts {', '.join(one.report.prompt.name for one in found)}",
        artifacts=tuple(one.artifact for one in found),
    )


@measures("FALSIFY-APR-GGUF-PARITY-002", "FALSIFY-APR-GGUF-PARITY-003", "FALSIFY-FFN-GGUF-003")
def layer_three(asked: Asked) -> Measurement:
    """The same for layer 3 alone: of ffn_swigl, or of ffn_gate."""
    slot = "ffn_gate" if asked.test.id.endswith("PARITY-003") else "ffn_swigl"
    found = passes(asked)
    stopped = next(filter(None, (broken_off(one.report) for one in found)), None)
    if stopped is not None:
        return stopped
    if not any(layer == 3 for one in found for layer, _, _ in one.spreads):
        return Measurement(unmeasured="the model has no layer 3")
    return Measurement(_selected_ratios(found, slot, 3), artifacts=tuple(one.artifact for one in found))


@measures("FALSIFY-APR-GGUF-PARITY-004", "FALSIFY-APR-TRACE-SAVE-008")
def contract_is_valid(asked: Asked) -> Measurement:
    """The contract itself keeps the schema."""
    from aprjax.contracts.load import load_contract

    loaded = load_contract(asked.contract.path)
    return Measurement({"schema_errors": len(loaded.errors)}, f"{asked.contract.path.name}, by `aprjax lint`'s rules")


@measures("FALSIFY-APR-GGUF-PARITY-006", "FALSIFY-FFN-GGUF-001", "FALSIFY-SUB-FFN-005", "FALSIFY-SUB-FFN-006")
def every_slot_is_there(asked: Asked) -> Measurement:
    """Both sides yield all ten slots of every layer, each as wide as the config says."""
    one = asked.bench.traced(PROBES[0])
    config = (asked.bench.side("ref").checkpoint or asked.bench.checkpoint("model")).config
    positions = len(one.report.prompt.positions)
    missing = wrong = 0
    for layer in range(config.num_layers):
        for slot in SLOTS:
            spread = one.spreads.get((layer, slot, "all"))
            missing += spread is None
            inner = slot in ("ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl")
            if spread is not None and inner:
                wrong += spread.counts != (positions * config.intermediate_size,) * 2
    return Measurement(
        {"missing_slots": missing, "wrong_counts": wrong, "slots": config.num_layers * len(SLOTS)},
        f"{config.num_layers} layers of {len(SLOTS)} slots, {positions} positions",
        artifacts=(one.artifact,),
    )


@measures("FALSIFY-APR-GGUF-PARITY-007")
def equal_counts(asked: Asked) -> Measurement:
    """No ratio is taken over selections of different size."""
    found = passes(asked)
    unequal = sum(s.counts[0] != s.counts[1] for one in found for s in one.spreads.values())
    compared = sum(len(one.spreads) for one in found)
    if not compared:
        return Measurement(unmeasured="no slot is there on both sides")
    return Measurement(
        {"unequal_counts": unequal, "compared": compared},
        "each over the last token and over all, on both sides",
        artifacts=tuple(one.artifact for one in found),
    )


def _stages(found: Iterable[TracedPass]) -> Iterable[tuple[str, int, Stage, StageReport]]:
    for one in found:
        for layer in one.report.layers:
            for stage, report in layer.stages.items():
                if not report.unmeasured:
                    yield one.report.prompt.name, layer.layer, stage, report


@measures("APRJAX-FORWARD-001")
def nothing_beyond_rounding(asked: Asked) -> Measurement:
    """Given the reference's inputs, no stage of the model differs by more than rounding explains."""
    found = passes(asked)
    artifacts = tuple(one.artifact for one in found)
    accused = [one for one in found if one.report.verdict is Verdict.DIVERGENCE]
    if accused:
        first = accused[0].report.first_divergence
        where = "" if first is None or first.layer == OUTSIDE else f"layer {first.layer}, "
        text = accused[0].report.reason if first is None else f"{where}{first.stage}: {first.cause}"
        return Measurement(failed=f"{accused[0].report.prompt.name}: {text}", artifacts=artifacts)
    stopped = next(filter(None, (broken_off(one.report) for one in found)), None)
    if stopped is not None:
        return stopped
    stages = list(_stages(found))
    beyond = [place for place in stages if (place[3].local_rel_l2 or 0.0) > (place[3].tolerance or math.inf)]
    largest = max((report.local_rel_l2 or 0.0 for _, _, _, report in stages), default=0.0)
    return Measurement(
        {
            "stages_beyond_rounding": 0 if asked_arithmetics_differ(asked) else len(beyond),
            "stages": len(stages),
            "largest_local_rel_l2": largest,
        },
        f"{len(stages)} stages, the largest local difference is {largest:.3g}",
        artifacts=artifacts,
    )


def asked_arithmetics_differ(asked: Asked) -> bool:
    """Whether the two sides compute otherwise: then `layers` judges the files, not the difference of arithmetics."""
    return asked.bench.run_by[0] != asked.bench.run_by[1]


@measures("APRJAX-FORWARD-002", "APRJAX-FORWARD-003")
def drift_of_the_stream(asked: Asked) -> Measurement:
    """Cosine and relative L2 of the residual stream behind every layer, and of the logits."""
    found = passes(asked)
    stopped = next(filter(None, (broken_off(one.report) for one in found)), None)
    if stopped is not None:
        return stopped
    chosen = [place for place in _stages(found) if place[2] in (*_DRIFT_STAGES, Stage.LM_HEAD)]
    if not chosen:
        return Measurement(unmeasured="neither the residual stream nor the logits are there on both sides")
    cosines = [place[3].distance.cosine for place in chosen]
    drifts = [place[3].distance.rel_l2 for place in chosen]
    worst = max(chosen, key=lambda place: _or_infinite(place[3].distance.rel_l2))
    where = "the logits" if worst[1] == OUTSIDE else f"layer {worst[1]}, {worst[2]}"
    return Measurement(
        {
            "least_cosine": None if None in cosines else min(c for c in cosines if c is not None),
            "largest_rel_l2": None if None in drifts else max(d for d in drifts if d is not None),
        },
        f"farthest at {where} of {worst[0]}",
        artifacts=tuple(one.artifact for one in found),
    )


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


@measures("APRJAX-FORWARD-004")
def no_flip_beyond_noise(asked: Asked) -> Measurement:
    """No position of the probes chooses another token, except where it is a near-tie."""
    found = passes(asked)
    stopped = next(filter(None, (broken_off(one.report) for one in found)), None)
    if stopped is not None:
        return stopped
    margins = [margin for one in found for margin in one.report.margins]
    if not margins:
        return Measurement(unmeasured="the logits are not there on both sides")
    flips = [margin for margin in margins if margin.flip]
    beyond = 0.0
    for flip in flips:
        beyond = max(beyond, flip.gap / flip.rms_delta if flip.rms_delta else math.inf)
    return Measurement(
        {"widest_flip_sigmas": beyond, "flips": len(flips), "positions": len(margins)},
        f"{len(flips)} flips in {len(margins)} positions",
        artifacts=tuple(one.artifact for one in found),
    )


@measures("FALSIFY-SUB-FFN-001")
def one_slot_stands_out(asked: Asked) -> Measurement:
    """Upstream's statistic: whether a slot of layer 3 stands out of layers 5 to 26, on the model's side."""
    one = asked.bench.traced(PROBES[0])
    last = max((layer for layer, _, _ in one.spreads), default=-1)
    if last < 26:
        return Measurement(unmeasured=f"the statistic takes layers 5 to 26, and the model has {last + 1} layers")
    ratios: dict[str, float] = {}
    for slot in ("ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out"):
        stds = {layer: one.spreads[layer, slot, "last"].model for layer in range(27)}
        if any(value is None for value in stds.values()):
            return Measurement(failed=f"{slot} of the model holds values that are no numbers")
        others = sorted(stds[layer] or 0.0 for layer in range(5, 27))
        ratios[slot] = (stds[3] or 0.0) / ((others[10] + others[11]) / 2)
    return Measurement(
        {"slots_standing_out": sum(value >= 3 for value in ratios.values()), **_named(ratios)},
        "last token of the direct prompt; no slot of layer 3 should stand out on a sound model",
        artifacts=(one.artifact,),
    )


def _named(ratios: Mapping[str, float]) -> dict[str, float]:
    return {f"layer_3_{slot}_over_median": ratio for slot, ratio in ratios.items()}


@measures("FALSIFY-ATTN-SUB-004")
def first_drop_in_attention(asked: Asked) -> Measurement:
    """Along the attention of layer 0: how many adjacent stages fall below upstream's floor of 0.999."""
    one = asked.bench.traced(PROBES[0])
    stopped = broken_off(one.report)
    if stopped is not None:
        return stopped
    chain = (
        *(Stage.ATTN_NORM, Stage.QKV_MATMUL, Stage.QKV_BIAS, Stage.Q_POST_ROPE, Stage.K_POST_ROPE),
        *(Stage.ATTN_SCORES, Stage.ATTN_SOFTMAX, Stage.ATTENTION, Stage.ATTN_OUT),
    )
    stages = next((layer.stages for layer in one.report.layers if layer.layer == 0), {})
    absent = [stage for stage in chain if stage not in stages or stages[stage].unmeasured]
    if absent:
        return Measurement(unmeasured=f"not there on both sides: {', '.join(absent)}", artifacts=(one.artifact,))
    cosines = [stages[stage].distance.cosine for stage in chain]
    if any(cosine is None for cosine in cosines):
        return Measurement(failed="a stage of the model's attention holds values that are no numbers")
    known = [cosine for cosine in cosines if cosine is not None]
    drops = sum(a >= 0.999 > b for a, b in pairwise(known))
    return Measurement(
        {"drops": drops, "least_cosine": min(known)},
        f"nine stages, the least cosine is {min(known):.6f}",
        artifacts=(one.artifact,),
    )
