"""What the toolkit says of a planted fault, held against what was planted."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from cases import Case
from tensor_faults import REFUSED, TENSOR_FAULTS
from workshop import PlantedCase, Workshop

from aprjax.bisect.files import FilesReport, compare_files
from aprjax.bisect.layers.compare import layers
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.report import LayersReport
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic

# A factor that was planted in block scales is rounded to float16 in each of them: a half unit is 2^-11 of them, and
# more of the subnormal ones that Q6_K's small scales are. Of the median of many little of it is left.
_FACTOR_TOLERANCE = 2.0**-10


@dataclass
class Result:
    """One case, judged.

    Attributes:
        case: its key and fields.
        expected: layer, stage and explanation.
        found: the same, as the toolkit has them.
        localised: the exact layer and stage come first.
        explained: the right explanation comes first, for every tensor that was changed.
        wrong_blame: a place or explanation is named that is not the planted one.
        false_alarm: of a clean pair: anything is accused.
        both: of a pair of faults: both are found and explained.
        passes: forward passes that it took, by question.
        seconds: likewise.
        reason: what went wrong, in words.
        measures: what else was measured.
    """

    case: dict[str, Any]
    expected: dict[str, Any]
    found: dict[str, Any]
    localised: bool | None = None
    explained: bool | None = None
    wrong_blame: bool = False
    false_alarm: bool = False
    both: bool | None = None
    passes: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    measures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


def arithmetic_for(files: FilesReport) -> Arithmetic:
    """What `layers` takes unasked: llama.cpp's, or decoded values where block types differ."""
    mixed = any(len(set(tensor.block_types)) > 1 for tensor in files.tensors)
    return PRESETS["float32" if mixed else "llama.cpp"]


def run_layers(workshop: Workshop, model: Checkpoint, files: FilesReport) -> LayersReport:
    """`layers` on every position."""
    arithmetic = workshop.arithmetic or arithmetic_for(files)
    fed = TokensReport("bench", None, "none", workshop.tokens)
    sides = Runner(model, arithmetic), Runner(workshop.ref, arithmetic)
    return layers(*sides, tokens=fed, positions=tuple(range(len(workshop.tokens))), files=files)


def judge_file(workshop: Workshop, case: Case, *, bounds: bool = False) -> Result:
    """One fault of a file: `files` for its explanation, `layers` for its place."""
    try:
        return _judge_file(workshop, case, bounds=bounds)
    except CheckpointError as error:
        # It cannot even be opened.
        assert case.tensor is not None
        expected = {"explanation": list(TENSOR_FAULTS[case.fault].explained), "tensors": [case.tensor]}
        result = Result(case.to_json(), expected, {"refused": str(error)})
        result.localised = result.explained = case.fault in REFUSED and case.tensor in str(error)
        result.reason = "" if result.localised else f"refused: {error}"
        return result


def _judge_file(workshop: Workshop, case: Case, *, bounds: bool) -> Result:
    with workshop.model((case,)) as (model, (planted,)):
        result = Result(case.to_json(), _expected(case, planted), {})
        start = time.perf_counter()
        files = compare_files(model, workshop.ref)
        compared = time.perf_counter()
        result.seconds["files"] = compared - start
        fault = TENSOR_FAULTS.get(case.fault)
        if fault is not None and fault.finding:
            told = [found.id for found in model.findings if found.tensor in planted.tensors]
            result.found["explanation"] = told
            result.localised = result.explained = told == [fault.finding]
            result.wrong_blame = bool(files.differing or files.config)
            return result
        _judge_explanation(result, case, workshop, planted, files)
        try:
            report = run_layers(workshop, model, files)
        except CheckpointError as error:
            result.found["refused"] = str(error)
            result.localised = case.fault in REFUSED and planted.tensors[0] in str(error)
            if not result.localised:
                result.reason += f"; refused: {error}"
            return result
        result.seconds["layers"] = time.perf_counter() - compared
        result.passes["layers"] = layer_passes(report)
        _judge_place(result, planted, report)
        result.measures = {"verdict": str(report.verdict), **(bounds_of(report) if bounds else {})}
        return result


def layer_passes(report: LayersReport) -> float:
    """Forward passes of `layers`: reference and model, and from the first differing layer on one more."""
    differing = [
        n for n, layer in enumerate(report.layers[1:]) if any(s.distance.rel_l2 for s in layer.stages.values())
    ]
    return 2.0 + ((len(report.layers) - 1 - differing[0]) / (len(report.layers) - 1) if differing else 0.0)


def _expected(case: Case, planted: PlantedCase) -> dict[str, Any]:
    explained = [f"config {key}" for key in planted.keys] or list(TENSOR_FAULTS[case.fault].explained)
    return {"layer": planted.layer, "stage": planted.stage, "explanation": explained, "tensors": list(planted.tensors)}


def _judge_place(result: Result, planted: PlantedCase, report: LayersReport) -> None:
    first = report.first_divergence
    place = None if first is None else (first.layer, str(first.stage))
    result.found |= {"layer": None if place is None else place[0], "stage": None if place is None else place[1]}
    result.localised = place == (planted.layer, planted.stage)
    if not result.localised:
        result.wrong_blame |= place is not None
        result.reason += f"; found at {place}" if place else "; no divergence found"
    elif first is not None and not any(word in first.cause for word in (*planted.tensors, *planted.keys)):
        result.explained = False
        result.reason += f"; the cause does not name what was planted: {first.cause}"
    result.reason = result.reason.removeprefix("; ")


def _judge_explanation(
    result: Result, case: Case, workshop: Workshop, planted: PlantedCase, files: FilesReport
) -> None:
    problems, blamed = explanation_problems(case, workshop, planted, files)
    others = {tensor.name for tensor in files.differing} - set(planted.tensors)
    others |= set(files.config) - set(planted.keys)
    if others:
        problems.append(f"accused as well: {', '.join(sorted(others))}")
    found_in = [files.tensor(name) for name in planted.tensors]
    result.found["explanation"] = [t.explanation_id if t is not None else None for t in found_in] or sorted(
        files.config
    )
    result.explained, result.wrong_blame = not problems, blamed or bool(others)
    result.reason = "; ".join(problems)


def explanation_problems(
    case: Case, workshop: Workshop, planted: PlantedCase, files: FilesReport
) -> tuple[list[str], bool]:
    """What is wrong with the explanations of a fault's tensors, and whether another one is named."""
    problems, blamed = [], False
    for key in planted.keys:
        if key not in files.config:
            problems.append(f"{key} is not seen to differ")
    for name in planted.tensors:
        tensor = files.tensor(name)
        if tensor is None or tensor.same_values:
            problems.append(f"{name} is not seen to differ")
            continue
        fault = TENSOR_FAULTS[case.fault]
        if tensor.explanation_id not in fault.explained:
            blamed |= bool(tensor.explanation_id)
            problems.append(f"{name}: {tensor.explanation_id or 'no explanation'} ({tensor.explanation})"[:400])
            continue
        for key, value in fault.parameters(workshop.site(case)).items():
            found = tensor.parameters.get(key)
            if found is None or not np.isclose(found, value, rtol=_FACTOR_TOLERANCE, atol=0):
                problems.append(f"{name}: {key} is {found}, planted was {value:g}")
                blamed = True
    return problems, blamed


def bounds_of(report: LayersReport) -> dict[str, Any]:
    """Std ratio of each layer's `ffn_swigl`, cosines of layer outputs and logits: what upstream's bounds look at."""
    ratios, cosines = [], []
    for layer in report.layers[1:]:
        stages = {str(stage): found for stage, found in layer.stages.items()}
        ratios.append(stages["ffn_swigl"].distance.std_ratio)
        cosines.append(stages["post_ffn_residual"].distance.cosine)
    outside = {str(stage): found for stage, found in report.layers[0].stages.items()}
    return {
        "std_ratio": ratios,
        "cosine": cosines,
        "logit_cosine": outside["lm_head"].distance.cosine,
        "flips": sum(margin.flip for margin in report.margins),
        "positions": len(report.margins),
    }
