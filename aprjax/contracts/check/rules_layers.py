"""Layer parity: fourteen steps, each from the reference's own inputs, each within its tolerance."""

from __future__ import annotations

import math

from aprjax.contracts.check.measurement import Asked, Measurement, measures
from aprjax.contracts.check.rules_forward import broken_off, passes


@measures("APRJAX-LAYER-001")
def every_step_within_tolerance(asked: Asked) -> Measurement:
    """How much of its tolerance the worst element of each step uses, over all layers and both probes."""
    found = passes(asked)
    stopped = next(filter(None, (broken_off(one.report) for one in found)), None)
    if stopped is not None:
        return stopped
    artifacts = tuple(one.artifact for one in found)
    names = [step.name for step in asked.contract.layer_steps]
    absent = [name for name in names if not any(name in one.uses for one in found)]
    if absent or not names:
        what = f"not there on both sides: {', '.join(absent)}" if absent else "the contract lists no steps"
        return Measurement(unmeasured=what, artifacts=artifacts)
    worst = {}
    for name in names:
        uses = [(one.uses[name], one.report.prompt.name) for one in found if name in one.uses]
        worst[name] = max(uses, key=lambda item: item[0].use)
    name, (use, prompt) = max(worst.items(), key=lambda item: item[1][0].use)
    where = f"layer {use.layer}, position {use.position}, channel {use.channel} of {prompt}"
    if math.isinf(use.use):
        return Measurement(failed=f"{name}: a value that is no number, or of another shape, at {where}")
    return Measurement(
        {step: place.use for step, (place, _) in worst.items()},
        f"in units of each step's tolerance; {name} uses most, at {where}",
        artifacts=artifacts,
    )
