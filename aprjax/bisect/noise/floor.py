"""How much of a local difference rounding explains: measured on these tokens, not assumed.

The floor of a stage is the relative L2 between the reference's own value and the same stage computed
from the same inputs with float64 sums (`lockstep.arbiter`). It is measured when it is first needed: two
sides that are bit-identical need no tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aprjax.bisect.lockstep import LayerPair
from aprjax.bisect.metrics import relative_l2
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.stages import Stage

# Two float32 evaluations of one stage differ by at most the sum of their distances from the float64
# one. A re-associated sum was never seen to be more than 3 times as far from it as the reference
# (tests/bisect/test_noise.py measures that over shapes and block types), so their difference stays
# below 4 floors; 8 leaves a factor of two.
FACTOR = 8.0
# No floor is below half a unit in the last place of float32: a value that happens to be exact would
# otherwise allow nothing.
SMALLEST = 2.0**-24

# A rounding to float16 moves a value by at most 2^-11 of it, in the root mean square by about 2^-12.
_HALF = 2.0**-12
# Queries from which ggml's flash attention keeps its sums in float32 (`ggml_fa_tile_config`, ops.cpp).
_TILE = 64


def engine_floors(engine: Mapping[str, str], arithmetics: Iterable[Arithmetic], positions: int) -> dict[Stage, float]:
    """Floors that an engine's recorded options imply and that the arithmetic at hand does not show.

    With a float16 cache ggml's flash attention rounds its sums to float16 once per key for fewer than 64 queries
    (`ggml_compute_forward_flash_attn_ext_f16_one_chunk`, ops.cpp): independent roundings of sums that grow with the
    keys, so at most the root of their number together. Arithmetics with flash attention follow it
    and need no such floor.
    """
    fused = engine.get("flash_attention") == "True" and engine.get("type_v") == "f16"
    if not fused or all(arithmetic.flash for arithmetic in arithmetics):
        return {}
    return {Stage.ATTENTION: _HALF * (math.sqrt(positions) if positions < _TILE else 1.0)}


@dataclass
class NoiseFloor:
    """The measured floor by stage, and where it was measured."""

    by_stage: dict[Stage, float] = field(default_factory=dict)
    measured_at: list[int] = field(default_factory=list)
    _last: tuple[int, dict[Stage, float]] | None = None

    def tolerance(self, pair: LayerPair, stage: Stage, rows: list[int], local: float | None) -> float | None:
        """What rounding may explain at this stage; None where the local difference is zero.

        The floor known so far is used while it suffices; a difference that exceeds it makes this layer's own
        floor be measured before anything is accused.
        """
        if local is None or local == 0.0:
            return None
        known = self.by_stage.get(stage)
        if known is None or local > FACTOR * known:
            self._measure(pair, rows)
        return FACTOR * max(self.by_stage.get(stage, 0.0), SMALLEST)

    def _measure(self, pair: LayerPair, rows: list[int]) -> None:
        """This layer's floors, once a layer; each stage keeps the largest met."""
        rounded = pair.ref if pair.rounded is None else pair.rounded
        if self._last is not None and self._last[0] == pair.layer and set(self._last[1]) >= set(rounded):
            return
        values = pair.rounding()
        floors = {s: relative_l2(values[s][rows], rounded[s][rows]) or 0.0 for s in rounded if s in values}
        self._last = (pair.layer, floors)
        self.measured_at.append(pair.layer)
        for stage, floor in floors.items():
            self.by_stage[stage] = max(floor, self.by_stage.get(stage, 0.0))

    def to_json(self) -> dict[str, Any]:
        """How the floor was measured, and what came out."""
        if not self.measured_at:
            return {
                "method": "not needed: every stage is bit-identical given the same inputs",
                "factor": FACTOR,
                "layers": [],
                "rel_l2": {},
            }
        return {
            "method": "relative L2 of the reference's stage from the same stage of the same inputs with float64 sums",
            "factor": FACTOR,
            "layers": self.measured_at,
            "rel_l2": {str(stage): floor for stage, floor in self.by_stage.items()},
        }
