"""The noise floor of the partings, measured where there are some and for no other arithmetics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aprjax.bisect.chatml.cells import Factorial
from aprjax.bisect.chatml.partings import Parting
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.noise.logits import measure_logit_noise
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.arithmetic import preset

# Positions at which it is measured, at most: those before the parting, the last ones. A standard deviation
# over 32 positions of ten logits each is known to about 1 in 25.
POSITIONS = 32


def measure_noise(
    factorial: Factorial,
    partings: Sequence[Parting],
    model: Checkpoint,
    ref: Checkpoint,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Mapping[tuple[str, str], float]:
    """Sigma of a logit by (model's arithmetic, reference's), for those under which a token flipped.

    Each is measured once, on the prompt and the common tokens of the longest parting.
    """
    longest: dict[tuple[str, str], Parting] = {}
    for found in partings:
        if found.gap is None:
            continue
        key = found.comparison.model.arithmetic, found.comparison.ref.arithmetic
        if key not in longest or found.step > longest[key].step:
            longest[key] = found
    noise = {}
    for key, found in longest.items():
        run = factorial.run_of(found.comparison.prompt, found.comparison.ref)
        assert run is not None
        tokens = [*run.prompt_tokens, *run.tokens[: found.step]]
        # The first position of all is an outlier in these models (kernels.md): it decides no flip.
        first = max(len(tokens) - POSITIONS, 1 if len(tokens) > 1 else 0)
        measured = measure_logit_noise(
            Runner(model, preset(key[0])),
            Runner(ref, preset(key[1])),
            tokens,
            range(first, len(tokens)),
            steps=0,
            progress=progress,
        )
        noise[key] = measured.sigma
    return noise
