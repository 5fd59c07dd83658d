"""What the toolkit says of a trace whose engine computed wrongly, or that is not what it is taken for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from engine import Model, Twist, Values, run_engines
from engine_faults import ENGINE_FAULTS, OUTSIDE_STAGES, WEIGHT_FAULTS, EngineFault
from judging import Result, layer_passes
from trace_faults import TOKEN_FAULTS, TRACE_FAULTS, other_tokens
from trace_files import save_folder, save_trace

from aprjax.bisect.explain.identity import identify
from aprjax.bisect.explain.run import explain
from aprjax.bisect.layers.compare import layers
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Traced
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.arithmetic import PRESETS
from aprjax.qwen2.stages import Stage
from aprjax.trace import Trace

ALL_ENGINE_FAULTS = {**ENGINE_FAULTS, **WEIGHT_FAULTS}
# The bound for fitted numbers.
_PARAMETER_TOLERANCE = 1e-3
FLOAT32 = PRESETS["float32"]


@dataclass
class Studio:
    """One file, and traces that pretend to be of it.

    Attributes:
        name: of the model.
        ref: the file, opened.
        folder: for traces.
        tokens: what is fed.
    """

    name: str
    ref: Checkpoint
    folder: Path
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        self.engine = Model(self.ref.path)

    def run(self, cases: Sequence[Case]) -> list[Values]:
        """What an engine with each case's faults computes."""
        return list(run_engines(self.engine, self.tokens, [twists_of(case) for case in cases]))

    def saved(self, values: Values) -> Trace:
        """The values as a saved trace, opened."""
        path = self.folder / f"{self.name}.safetensors"
        save_trace(path, values, model=self.ref.path, sha256=self.ref.sha256(), tokens=self.tokens)
        return Trace.load(path)


def twists_of(case: Case) -> tuple[Twist, ...]:
    """A case's faults, for the engine."""
    if case.parts:
        return tuple(twist for part in case.parts for twist in twists_of(part))
    if case.fault not in ALL_ENGINE_FAULTS:
        return ()
    return (Twist(case.fault, None if case.layer is None else frozenset([case.layer]), case.strength),)


def expected_place(case: Case) -> tuple[int, str]:
    """Where a fault of the computation shows first."""
    stage = ALL_ENGINE_FAULTS[case.fault].stage
    return (-1 if stage in OUTSIDE_STAGES else case.layer or 0), stage


def _order(place: tuple[int, str]) -> tuple[int, int]:
    layer, stage = place
    rank = [str(s) for s in Stage].index(stage)
    return (1 << 20 if stage in ("final_norm", "lm_head") else layer), rank


def judge_engine(studio: Studio, case: Case, values: Values, *, clean: Values | None = None) -> Result:
    """One fault (or several) of an engine: `layers` on the trace for its place, `explain` for its cause."""
    parts = case.parts or ((case,) if case.fault in ALL_ENGINE_FAULTS else ())
    faults = [ALL_ENGINE_FAULTS[part.fault] for part in parts]
    first = min((expected_place(part) for part in parts), key=_order, default=None)
    expected = {
        "layer": first[0] if first else None,
        "stage": first[1] if first else None,
        "explanation": [list(fault.explained) for fault in faults],
    }
    result = Result(case.to_json(), expected, {})
    trace = studio.saved(values)
    start = time.perf_counter()
    fed = TokensReport("bench", None, "none", studio.tokens)
    everywhere = tuple(range(len(studio.tokens)))
    sides = Traced(trace, studio.ref, FLOAT32), Runner(studio.ref, FLOAT32)
    report = layers(*sides, tokens=fed, positions=everywhere)
    place = report.first_divergence and (report.first_divergence.layer, str(report.first_divergence.stage))
    result.seconds["layers"] = time.perf_counter() - start
    result.passes["layers"] = layer_passes(report)
    start = time.perf_counter()
    explained = explain(trace, studio.ref, FLOAT32)
    result.seconds["explain"] = time.perf_counter() - start
    found = explained.explanations
    result.found = {
        "layer": place[0] if place else None,
        "stage": place[1] if place else None,
        "explanation": [one.id for one in found],
        "identity": [str(finding["id"]) for finding in explained.identity],
        "unexplained": len(explained.unexplained),
    }
    problems = []
    if case.group == "clean":
        result.false_alarm = bool(place or found or explained.identity) or explained.verdict is not Verdict.AGREE
        result.reason = explained.reason if result.false_alarm else ""
        return result
    result.localised = place == first
    if not result.localised:
        result.wrong_blame |= place is not None
        problems.append(f"found at {place}")
    wrong = [] if case.parts else _wrong(faults[0], case, found)
    if case.parts:
        missed = [part for part in parts if not any(_explains(part, one) for one in found)]
        result.both = not missed
        problems += [f"not found: {part.key}" for part in missed]
        extra = [one for one in found if not any(_explains(part, one) for part in parts)]
        result.wrong_blame |= bool(extra)
        problems += [f"blamed as well: {one.id}" for one in extra]
    else:
        result.explained = not wrong
        result.wrong_blame |= bool(found) and bool(wrong)
        problems += wrong
    if explained.identity:
        problems.append(f"identity: {', '.join(str(finding['id']) for finding in explained.identity)}")
    if explained.unexplained:
        problems.append(f"{len(explained.unexplained)} nodes unexplained")
    result.reason = "; ".join(problems)
    result.measures = {"rivals": {one.id: [rival.id for rival in one.rivals[:3]] for one in found}}
    if clean is not None:
        result.measures |= bounds_between(values, clean)
    return result


def _wrong(fault: EngineFault, case: Case, found: Sequence[Any]) -> list[str]:
    if not found:
        return ["no explanation"]
    first = found[0]
    if first.id not in fault.explained:
        return [f"explained as {first.id}: {first.sentence}"]
    problems = [f"blamed as well: {one.id}" for one in found[1:] if one.id not in fault.explained]
    value = first.parameters.get(fault.parameter) if fault.parameter else None
    if fault.parameter and case.strength is not None:
        number = getattr(value, "value", value)
        if number is None or not np.isclose(float(number), _told(fault, case, number), rtol=_PARAMETER_TOLERANCE):
            problems.append(f"{fault.parameter} is {number}, made with {case.strength:g}")
    return problems


def _told(fault: EngineFault, case: Case, number: Any) -> float:
    """What the parameter must be: the scale of scores is told whole, not relative to the right one."""
    del number
    strength = float(case.strength or 0.0)
    return strength if fault.id != "attn-scale" else strength * _SCALES[case.model]


# One over the root of the head's width.
_SCALES = {"tiny": 64**-0.5, "0.5b": 64**-0.5, "1.5b": 128**-0.5}


def _explains(part: Case, one: Any) -> bool:
    fault = ALL_ENGINE_FAULTS[part.fault]
    place = expected_place(part)
    return one.id in fault.explained and any((layer, str(stage)) == place for layer, stage in one.nodes)


def bounds_between(values: Values, clean: Values) -> dict[str, Any]:
    """Std ratios of `ffn_swigl`, cosines of layer outputs and logits: computed here, in plain NumPy."""
    count = 1 + max(layer for layer, _ in clean)

    def pair(key: tuple[int, str]) -> tuple[np.ndarray, np.ndarray]:
        return values[key].astype(np.float64).ravel(), clean[key].astype(np.float64).ravel()

    def cosine(key: tuple[int, str]) -> float | None:
        a, b = pair(key)
        size = np.sqrt((a @ a) * (b @ b))
        return float(a @ b / size) if np.isfinite(size) and size > 0 else None

    def ratio(key: tuple[int, str]) -> float | None:
        a, b = (part.std(ddof=1) for part in pair(key))
        return float(a / b) if np.isfinite(a) and b > 0 else None

    logits = values[-1, "lm_head"], clean[-1, "lm_head"]
    flips = np.count_nonzero(logits[0].argmax(axis=1) != logits[1].argmax(axis=1))
    return {
        "std_ratio": [ratio((layer, "ffn_swigl")) for layer in range(count)],
        "cosine": [cosine((layer, "post_ffn_residual")) for layer in range(count)],
        "logit_cosine": cosine((-1, "lm_head")),
        "flips": int(flips),
        "positions": len(logits[0]),
    }


def judge_trace(studio: Studio, case: Case, clean: Values) -> Result:
    """An APRT folder that is not what it is taken for: `identify` before any number is compared."""
    fault = TRACE_FAULTS.get(case.fault)
    if fault is None:
        fed = other_tokens(case.fault, studio.tokens, bos=studio.ref.config.vocab_size - 1)
        values = next(iter(run_engines(studio.engine, fed, [()])))
        explained, keys = TOKEN_FAULTS[case.fault], ()
    else:
        chosen = [case.layer] if case.layer is not None else list(range(studio.engine.layers))
        values, keys = fault.spoil(clean, chosen, studio.ref.config.head_dim)
        explained = fault.explained
    folder = studio.folder / "aprt"
    shutil.rmtree(folder, ignore_errors=True)
    save_folder(folder, values, studio.ref.config.num_heads)
    start = time.perf_counter()
    findings = identify(folder, studio.ref, tokens=studio.tokens, arithmetic=FLOAT32)
    stages = sorted({stage for _, stage in keys})
    hurt = sorted({layer for layer, _ in keys})
    result = Result(case.to_json(), {"layers": hurt, "stages": stages, "explanation": list(explained)}, {})
    result.seconds["identify"] = time.perf_counter() - start
    result.passes["identify"] = 1.0
    first = findings[0] if findings else None
    result.found = {
        "explanation": [finding.id for finding in findings],
        "stages": sorted(str(stage) for stage in first.stages) if first else [],
        "layers": list(first.layers) if first else [],
    }
    result.explained = first is not None and first.id in explained
    wrong = [finding for finding in findings if finding.id not in explained and finding.severity == "error"]
    result.wrong_blame = bool(wrong)
    whole = fault is None or fault.everywhere
    result.localised = None if whole else (result.found["layers"], result.found["stages"]) == (hurt, stages)
    problems = [] if result.explained else [f"first finding: {first.id}: {first.sentence}" if first else "no finding"]
    if result.localised is False:
        problems.append(f"found in layers {result.found['layers']}, {result.found['stages']}")
    problems += [f"said as well: {finding.id}: {finding.sentence}" for finding in wrong]
    result.reason = "; ".join(problems)
    return result


def engine_cases(model: str, chosen: Iterable[int], *, few: bool = False) -> list[Case]:
    """Faults of the computation: in single layers and in all."""
    chosen, cases = list(chosen), []
    for turn, (name, fault) in enumerate(ALL_ENGINE_FAULTS.items()):
        places: list[int | None] = [None]
        if not fault.everywhere:
            places += [chosen[turn % len(chosen)]] if few else chosen
        strengths = fault.strengths[turn % len(fault.strengths) :][:1] if few else fault.strengths
        cases += [Case(model, "computation", name, layer, strength=s) for layer in places for s in strengths]
    return cases


def trace_cases(model: str, chosen: Iterable[int], *, few: bool = False) -> list[Case]:
    """Faults of traces: in one layer, and in all."""
    chosen, cases = list(chosen), []
    for turn, (name, fault) in enumerate(TRACE_FAULTS.items()):
        places: list[int | None] = [None] if fault.everywhere or name != "not-finite" else []
        if not fault.everywhere:
            places += [chosen[turn % len(chosen)]] if few else chosen
        cases += [Case(model, "trace", name, layer) for layer in places]
    return cases + [Case(model, "trace", name) for name in TOKEN_FAULTS]
