"""Two faults at once, `locate` on a sample, and clean pairs under every arithmetic."""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

from cases import Case
from judging import Result, arithmetic_for, bounds_of, explanation_problems, run_layers
from plant import site_of
from tensor_faults import CONTROLS, MENDED, REFUSED
from workshop import PlantedCase, Workshop

from aprjax.bisect.files import compare_files
from aprjax.bisect.layers.compare import layers
from aprjax.bisect.locate.run import locate
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
from aprjax.qwen2.stages import Stage

# Stages in execution order; those outside the layers stand around them.
_RANK = {str(stage): index for index, stage in enumerate(Stage)}


def pair_cases(singles: Sequence[Case], count: int, seed: int) -> list[Case]:
    """Pairs drawn at random from faults of one group; two faults of one tensor make a third, and are left out."""
    random, pairs, taken = Random(seed), [], set()
    # Neither faults that are refused or mended on reading, nor controls, which have no explanation to be found.
    singles = [case for case in singles if case.fault not in (*REFUSED, *MENDED, *CONTROLS)]
    while len(pairs) < count:
        first, second = random.sample(singles, 2)
        touched = [{case.tensor, case.other} - {None} or {case.fault} for case in (first, second)]
        computed = first.group == "computation"
        if not computed and touched[0] & touched[1]:
            continue
        if computed and (first.fault == second.fault or _same_place(first, second)):
            continue
        pair = Case(first.model, "pair", f"{first.group} pair", parts=(first, second))
        if pair.key not in taken:
            taken.add(pair.key)
            pairs.append(pair)
    return pairs


def _same_place(first: Case, second: Case) -> bool:
    from judging_traces import expected_place

    return expected_place(first) == expected_place(second)


def execution(place: PlantedCase) -> tuple[int, int]:
    """Sorts places by execution: the head's stages come behind all layers."""
    return (1 << 20 if place.stage in ("final_norm", "lm_head") else place.layer), _RANK[place.stage]


def judge_pair(workshop: Workshop, case: Case, *, by_locate: bool = True) -> Result:
    """Two faults of a file: `files` explains both, `layers` finds the first, and the second when that is mended."""
    start = time.perf_counter()
    problems: list[str] = []
    with workshop.model(case.parts) as (model, planted):
        files = compare_files(model, workshop.ref)
        for part, place in zip(case.parts, planted, strict=True):
            found, _ = explanation_problems(part, workshop, place, files)
            problems += found
        ordered = sorted(zip(case.parts, planted, strict=True), key=lambda entry: execution(entry[1]))
        expected = [[place.layer, place.stage] for _, place in ordered]
        result = Result(case.to_json(), {"places": expected}, {"places": []})
        places = [_first(workshop, model, files)]
        located = _located(workshop, model, files, result) if by_locate else []
    same = expected[0] == expected[1]
    with workshop.model((ordered[1][0],)) as (mended, _):
        places.append(_first(workshop, mended, compare_files(mended, workshop.ref)))
    result.found["places"] = places
    # Two faults of one stage have one place, where both are found at once.
    problems += [f"expected {want}, found {have}" for want, have in zip(expected, places, strict=True) if want != have]
    result.both = not problems
    result.wrong_blame = any(have is not None and have not in expected for have in places)
    result.measures = {"same": same}
    if by_locate:
        result.measures |= {"located": located, "located both": all(place in located for place in expected)}
    result.seconds["all"] = time.perf_counter() - start
    result.reason = "; ".join(problems)
    return result


def _first(workshop: Workshop, model, files) -> list | None:
    try:
        first = run_layers(workshop, model, files).first_divergence
    except CheckpointError:
        return None
    return None if first is None else [first.layer, str(first.stage)]


def _located(workshop: Workshop, model, files, result: Result) -> list[list]:
    fed = TokensReport("bench", None, "none", workshop.tokens)
    arithmetic = workshop.arithmetic or arithmetic_for(files)
    sides = Runner(model, arithmetic), Runner(workshop.ref, arithmetic)
    start = time.perf_counter()
    try:
        report = locate(*sides, tokens=fed, positions=tuple(range(len(workshop.tokens))), files=files)
    except CheckpointError as error:
        result.found["locate refused"] = str(error)
        return []
    result.seconds["locate"] = time.perf_counter() - start
    result.passes |= {f"locate {side}": spent["passes"] for side, spent in report.passes.items()}
    result.passes["locate runs"] = len(report.runs)
    return [[fault.layer, str(fault.stage)] for fault in report.faults]


def judge_located(workshop: Workshop, case: Case) -> Result:
    """One fault of a file, by `locate`: the place, and how many forward passes that took."""
    with workshop.model(case.parts) as (model, (planted,)):
        files = compare_files(model, workshop.ref)
        result = Result(case.to_json(), {"layer": planted.layer, "stage": planted.stage}, {})
        places = _located(workshop, model, files, result)
    result.found["places"] = places
    wanted = [planted.layer, planted.stage]
    result.localised = wanted in places
    # A linear scan runs the model once for each boundary and, in the layer, for each stage.
    result.measures = {"linear": workshop.layers + 1 + 17, "alone": places == [wanted]}
    # Two tensors that have changed places are two causes.
    right = [wanted, *(list(site_of(name)) for name in planted.tensors)]
    result.wrong_blame = any(place not in right for place in places)
    if not result.localised or result.wrong_blame:
        result.reason = f"expected {wanted}, found {places}"
    return result


def clean_cases(model: str, probes: Sequence[str], arithmetics: Sequence[str]) -> list[Case]:
    """Every arithmetic with every prompt; and both of `float32` and `llama.cpp` against each other."""
    pairs = [f"{name}, {probe}" for name in arithmetics for probe in probes]
    pairs += [f"{one} against {other}, {probe}" for one, other in _MIXED for probe in probes]
    return [Case(model, "clean", pair) for pair in pairs]


_MIXED = (("float32", "llama.cpp"), ("llama.cpp", "realizar"), ("float64", "float32"))


def judge_clean(workshop: Workshop, case: Case, prompts: dict[str, tuple[int, ...]]) -> Result:
    """The clean copy against its reference: nothing may be accused, and the command would exit with 0."""
    arithmetic, _, probe = case.fault.rpartition(", ")
    one, _, other = arithmetic.partition(" against ")
    model = open_checkpoint(workshop.clean)
    model.__dict__["_sha256"] = "not taken"
    start = time.perf_counter()
    files = compare_files(model, workshop.ref)
    tokens = prompts[probe]
    fed = TokensReport(probe, None, "none", tokens)
    run_by: tuple[Arithmetic, Arithmetic] = PRESETS[one], PRESETS[other or one]
    sides = Runner(model, run_by[0]), Runner(workshop.ref, run_by[1])
    report = layers(*sides, tokens=fed, positions=tuple(range(len(tokens))), files=files)
    result = Result(case.to_json(), {"exit": 0}, {"exit": report.verdict.exit_code, "verdict": str(report.verdict)})
    result.seconds["layers"] = time.perf_counter() - start
    result.false_alarm = report.verdict.exit_code != 0 or bool(files.differing or files.config)
    # Under one arithmetic there is nothing for which a tie would have to stand.
    result.false_alarm |= not other and report.verdict is not Verdict.AGREE
    result.reason = report.reason if result.false_alarm else ""
    # What two arithmetics differ by is what a bound has to let through.
    result.measures = bounds_of(report) if other else {}
    return result
