"""`locate`: which place *causes* the drift, found by putting the reference's values into the model.

Cheapest cause first: a config key that differs acts in every layer, so the reference's is put in before any
place is looked for (`locate_search`). Nothing here prints.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from aprjax.bisect.cause import STAGE_CONFIG, of_key, tensors_of
from aprjax.bisect.files import FilesReport
from aprjax.bisect.locate.chosen import chosen_at, effects_everywhere
from aprjax.bisect.locate.report import ChoiceEffect, LocatedFault, LocateReport, Run, place
from aprjax.bisect.locate.search import SHARP, Progress, Search, find_causes, logit_drift
from aprjax.bisect.lockstep import Runner, WeightSource
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.noise.logits import measure_logit_noise
from aprjax.bisect.patching import PatchedModel, RunReference, open_reference
from aprjax.bisect.report import PromptInfo, Verdict, sided
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side, side_info
from aprjax.checkpoint.types import Finding, UnmeasurableError
from aprjax.qwen2.stages import Stage

# Where nothing but the arithmetics differs, every product drifts a little: what makes less than this share of the
# drift is not what is looked for. A place of the files is looked for down to the noise.
_NEGLIGIBLE = 0.05
# Tensors that a finding names; the rest is counted.
_LISTED = 4
# Where activations are quantized, noise at a position is a code that flips, or none: one position may show none where
# the next has one. The root mean square of eight is known to a quarter (1 / sqrt(2 * 8)), far within NEAR_TIE_SIGMAS.
LEAST_NOISE_POSITIONS = 8


def locate(
    model: Runner,
    ref: Side,
    *,
    tokens: TokensReport,
    positions: tuple[int, ...],
    files: FilesReport | None,
    progress: Progress = lambda what, done, total: None,
) -> LocateReport:
    """Finds the places that cause the drift of the model's logits from the reference's.

    Args:
        model: the side under suspicion; it is run with values put in.
        ref: the side it is judged by: a file that runs here, or a trace.
        tokens: what both are fed.
        positions: whose logits are compared.
        files: the comparison of the two files, which names causes.
        progress: told what is being asked.

    Raises:
        CheckpointError: a side cannot be run, or a trace lacks values, is of other tokens or is not finite.
    """
    start = time.perf_counter()
    if files is not None and files.dimensions:
        keys = ", ".join(f"{key} ({a} and {b})" for key, (a, b) in files.dimensions.items())
        raise UnmeasurableError(
            f"the two models have other dimensions, so no value of the one fits into the other: {keys}",
            file=model.checkpoint.path,
        )
    same_bytes = (lambda name: False) if files is None else files.same_bytes
    weights = WeightSource(same_bytes)
    progress("loading", 0, 0)
    patched = PatchedModel(model, tokens.ids, positions, weights, (ref.arithmetic,))
    reference = open_reference(ref, patched, weights, tokens.ids)
    _require_finite(reference.logits, ref, positions)
    logits = patched.run()
    drift = logit_drift(logits, reference.logits)
    floor, basis = 0.0, "not needed: the logits are equal to the bit"
    if drift > 0:
        floor, basis = _floor((model, ref), files, tokens.ids, positions, progress)
    only_arithmetics = _only_the_arithmetics(files, model, ref)
    reach = max(floor, _NEGLIGIBLE * drift) if only_arithmetics else floor
    search = Search(patched, reference, files, (model, ref), reach, progress)
    faults, half_at, choices = (), None, ()
    if drift > floor:
        everywhere, remaining = _config_causes(search, drift, weights)
        found, half_at = find_causes(search, remaining) if remaining > reach else ((), None)
        if only_arithmetics:
            # Causes before another are judged by the hidden state there; here only what moves the logits is looked for.
            found = tuple(fault for fault in found if fault.infects is None or fault.infects > reach)
        found, guilty = chosen_at(search, found)
        faults = (*everywhere, *found)
        # Where a place in the files is guilty, the arithmetics' choices are not what is looked for.
        if guilty or not faults:
            choices = effects_everywhere(search, drift, guilty)
    flips = int(np.count_nonzero(logits.argmax(axis=1) != reference.logits.argmax(axis=1)))
    flipped = f"{flips} of {len(positions)} positions flip"
    verdict, reason = _verdict(faults, choices, drift=drift, floor=floor, half_at=half_at, flips=flipped)
    spent = {"model": patched.spent} | ({"ref": reference.model.spent} if isinstance(reference, RunReference) else {})
    return LocateReport(
        verdict=verdict,
        reason=reason,
        faults=faults,
        choices=choices,
        drift=drift,
        floor=floor,
        floor_basis=basis,
        half_at=half_at,
        flips=flips,
        sides={"model": side_info(model), "ref": side_info(ref)},
        prompt=PromptInfo(tokens.name, tokens.text, tokens.wrap, tokens.ids, positions),
        findings=tuple(
            sided(f, "both") for f in (*_files_findings(files), *_not_located(files, faults), *tokens.findings)
        ),
        runs=tuple(search.runs),
        passes={name: {"runs": s.runs, "passes": round(s.passes, 3)} for name, s in spent.items()},
        seconds={"total": time.perf_counter() - start},
    )


def _require_finite(logits: np.ndarray, ref: Side, positions: Sequence[int]) -> None:
    bad = ~np.isfinite(logits)
    if bad.any():
        row, channel = (int(i) for i in np.argwhere(bad)[0])
        raise UnmeasurableError(
            f"the reference's logit of token {channel} at position {positions[row]} is {logits[row, channel]}: nothing "
            "to judge by",
            file=ref.checkpoint.path if ref.checkpoint is not None else None,
            fix="`python -m aprjax inspect --values` says which tensor is not finite",
        )


def _only_the_arithmetics(files: FilesReport | None, model: Runner, ref: Side) -> bool:
    same = files is not None and not files.differing and not files.active_config
    return same and model.arithmetic != ref.arithmetic


def _files_findings(files: FilesReport | None) -> list[Finding]:
    if files is None:
        return [Finding("files-compared", "info", "The files cannot be compared: the trace's own is not at hand.")]
    return [Finding("files-compared", "info", files.sentence()), *files.findings()]


def _not_located(files: FilesReport | None, faults: tuple[LocatedFault, ...]) -> list[Finding]:
    """The differing tensors that no located place reads: they are not cleared, but hidden or too weak to be seen."""
    if files is None:
        return []
    read = {name for fault in faults for name in tensors_of(fault.layer, fault.stage)}
    hidden = [tensor.name for tensor in files.differing if tensor.name not in read]
    if not hidden:
        return []
    names = ", ".join(hidden[:_LISTED]) + (f" and {len(hidden) - _LISTED} more" if len(hidden) > _LISTED else "")
    text = (
        f"tensors that differ, at no located place: {names}. On these tokens that moves the logits by less than noise "
        "explains, or by less than what is located behind it: mend that and run again, or compare under --arithmetic "
        "float32, whose noise is least; `python -m aprjax files` says what became of them"
    )
    return [Finding("not-located", "warning", text)]


def _config_causes(search: Search, drift: float, weights: WeightSource) -> tuple[tuple[LocatedFault, ...], float]:
    """Differing config keys that cause drift, and what remains of it with the reference's in their place.

    The search goes on with the keys put in.
    """
    files = search.files
    found: list[LocatedFault] = []
    acts = {key: stage for stage in reversed(Stage) for key in STAGE_CONFIG.get(stage, ())}
    if files is None:
        return (), drift
    for key in [key for key in acts if key in files.config]:
        runner = search.model.runner
        config = replace(runner.checkpoint.config, **{key: files.config[key][1]})
        mended = Runner(replace(runner.checkpoint, config=config), runner.arithmetic)
        patched = PatchedModel(mended, search.model.tokens, search.model.rows, weights, search.model.beside)
        patched.spent = search.model.spent
        after = logit_drift(patched.run(), search.reference.logits)
        run = Run(f"the reference's {key} put in", "model", after, after <= search.floor, "logits", len(patched.layers))
        search.runs.append(run)
        if after < drift:
            accused = of_key(key, files)
            cause = f"{accused.cause} (in every layer)"
            found.append(
                LocatedFault(
                    0,
                    acts[key],
                    drift,
                    after,
                    "logits",
                    None,
                    None,
                    cause,
                    accused.next_step,
                    accused.confidence,
                )
            )
            search.model, drift = patched, after
    return tuple(found), drift


def _floor(
    sides: tuple[Runner, Side],
    files: FilesReport | None,
    tokens: Sequence[int],
    positions: Sequence[int],
    progress: Progress,
) -> tuple[float, str]:
    """The drift that noise explains, and its basis."""
    model, ref = sides
    same_layout = files is not None and all(t.block_types[0] == t.block_types[1] for t in files.tensors)
    if same_layout and isinstance(ref, Runner) and model.arithmetic == ref.arithmetic:
        return 0.0, "one arithmetic, one program and one layout: without a cause both sides are equal to the bit"
    other = ref if isinstance(ref, Runner) else None
    noise = measure_logit_noise(model, other, tokens, noise_positions(positions), steps=0, progress=progress)
    # A model whose values are not finite has no noise to measure; the reference's stands for both.
    known = [change.sigma_vocabulary for change in noise.changes if np.isfinite(change.sigma_vocabulary)]
    sigma = max(known, default=0.0)
    return NEAR_TIE_SIGMAS * sigma, f"{NEAR_TIE_SIGMAS:.2f} times the measured noise; {noise.method}"


def noise_positions(positions: Sequence[int]) -> tuple[int, ...]:
    """Where noise is measured: the compared positions and, if they are few, those before them.

    The first one is left out: its few massive activations make its noise another.
    """
    before = [position for position in range(max(positions) - 1, 0, -1) if position not in positions]
    return tuple(sorted({*positions, *before[: max(0, LEAST_NOISE_POSITIONS - len(positions))]}))


def _verdict(
    faults: tuple[LocatedFault, ...],
    choices: tuple[ChoiceEffect, ...],
    *,
    drift: float,
    floor: float,
    half_at: int | None,
    flips: str,
) -> tuple[Verdict, str]:
    size = f"the logits drift by {drift:.3g} (noise explains {floor:.3g}), {flips}"
    if drift <= floor:
        return Verdict.AGREE, f"nothing to locate: {size}"
    if faults:
        named = "; ".join(f"{place(f.layer, f.stage)}: {f.cause}" for f in faults)
        return Verdict.DIVERGENCE, f"{named} ({size})"
    one = choices[0] if choices and choices[0].after < drift / SHARP else None
    most = "" if one is None else f"; most of it by one choice: {one.sentence()}"
    return (
        Verdict.DIVERGENCE,
        f"the drift has no single place, it grows through the layers: half of it has come together at layer {half_at}"
        f"{most} ({size})",
    )
