"""One lockstep pass over a prompt, and what the contracts ask of it: ratios, counts, steps within tolerances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from aprjax.bisect.lockstep import LayerPair, Values
from aprjax.bisect.report import LayersReport
from aprjax.checkpoint.types import ModelConfig
from aprjax.contracts.types import LayerStep
from aprjax.qwen2.stages import OUTSIDE, Stage

# The ten slots of `apr trace --payload` (contracts.md 2.4); `qkv` is after the bias on both sides here.
SLOTS: dict[str, Stage] = {
    "attn_norm": Stage.ATTN_NORM,
    "qkv": Stage.QKV_BIAS,
    "attn_out": Stage.ATTN_OUT,
    "ffn_norm": Stage.FFN_NORM,
    "ffn_gate": Stage.FFN_GATE,
    "ffn_up": Stage.FFN_UP,
    "ffn_silu": Stage.FFN_SILU,
    "ffn_swigl": Stage.FFN_SWIGL,
    "ffn_out": Stage.FFN_OUT,
    "output": Stage.POST_FFN_RESIDUAL,
}
SELECTIONS = ("last", "all")

# The steps of `layer-parity-v1` and where their values are; q, k and v lie side by side in one stage.
_STEPS: dict[str, tuple[Stage, ...]] = {
    "attn_norm": (Stage.ATTN_NORM,),
    "q_proj": (Stage.QKV_BIAS,),
    "k_proj": (Stage.QKV_BIAS,),
    "v_proj": (Stage.QKV_BIAS,),
    "rope": (Stage.Q_POST_ROPE, Stage.K_POST_ROPE),
    "attention": (Stage.ATTENTION,),
    "o_proj": (Stage.ATTN_OUT,),
    "residual1": (Stage.POST_ATTN_RESIDUAL,),
    "ffn_norm": (Stage.FFN_NORM,),
    "gate_proj": (Stage.FFN_GATE,),
    "up_proj": (Stage.FFN_UP,),
    "swiglu": (Stage.FFN_SWIGL,),
    "down_proj": (Stage.FFN_OUT,),
    "residual2": (Stage.POST_FFN_RESIDUAL,),
}


@dataclass(frozen=True)
class Spread:
    """Sample standard deviations (ddof 1) of one slot on both sides, over one selection of positions.

    Attributes:
        model: the model's; None where it is not finite.
        ref: the reference's.
        counts: how many values each was taken over.
    """

    model: float | None
    ref: float | None
    counts: tuple[int, int]

    @property
    def ratio(self) -> float | None:
        """The model's over the reference's; None where there is no ratio or the selections differ."""
        if self.counts[0] != self.counts[1] or self.model is None or not self.ref:
            return None
        return self.model / self.ref


@dataclass(frozen=True)
class StepUse:
    """How much of its tolerance the worst element of a step uses: 1 is all of it.

    Attributes:
        use: `|model - ref| / (tolerance_abs + tolerance_rel * |ref|)`; infinite where the model's value is no number.
        layer, position, channel: where.
    """

    use: float
    layer: int
    position: int
    channel: int


@dataclass
class Observer:
    """Given to `layers` as `observe`: takes from every layer what the contracts ask, and lets the values go."""

    config: ModelConfig | None
    steps: Sequence[LayerStep]
    spreads: dict[tuple[int, str, str], Spread] = field(default_factory=dict)
    uses: dict[str, StepUse] = field(default_factory=dict)

    def __call__(self, pair: LayerPair) -> None:
        """Takes one layer."""
        if pair.layer == OUTSIDE:
            return
        for slot, stage in SLOTS.items():
            if stage in pair.model and stage in pair.ref:
                for selection in SELECTIONS:
                    key = pair.layer, slot, selection
                    self.spreads[key] = _spread(
                        _selected(pair.model, stage, selection), _selected(pair.ref, stage, selection)
                    )
        against = pair.ref if pair.against is None else pair.against
        for step in self.steps:
            for stage in _STEPS.get(step.name, ()):
                if stage in pair.local and stage in against:
                    part = self._columns(step.name, pair.local[stage].shape[1])
                    self._use(step, pair.layer, pair.local[stage][:, part], against[stage][:, part], part.start or 0)

    def _columns(self, step: str, width: int) -> slice:
        """The columns of q, k or v; all of any other step."""
        if self.config is None or step not in ("q_proj", "k_proj", "v_proj"):
            return slice(0, width)
        queries = self.config.num_heads * self.config.head_dim
        keys = self.config.num_kv_heads * self.config.head_dim
        begin = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[step]
        return slice(begin, begin + (queries if step == "q_proj" else keys))

    def _use(self, step: LayerStep, layer: int, ours: np.ndarray, theirs: np.ndarray, first: int) -> None:
        if ours.shape != theirs.shape:
            self.uses[step.name] = StepUse(math.inf, layer, 0, 0)
            return
        ref = theirs.astype(np.float64)
        allowed = step.tolerance_abs + step.tolerance_rel * np.abs(ref)
        use = np.abs(ours.astype(np.float64) - ref) / allowed
        use = np.where(np.isfinite(use), use, np.inf)
        row, channel = (int(index) for index in np.unravel_index(int(use.argmax()), use.shape))
        worst = float(use[row, channel])
        if step.name not in self.uses or worst > self.uses[step.name].use:
            self.uses[step.name] = StepUse(worst, layer, row, first + channel)


@dataclass(frozen=True)
class TracedPass:
    """What one pass over one prompt yielded.

    Attributes:
        report: the answer of `layers`.
        spreads: by (layer, slot, selection).
        uses: by step: how much of its tolerance the worst element uses, from the reference's own inputs.
        artifact: name of the report among the raw outputs.
    """

    report: LayersReport
    spreads: dict[tuple[int, str, str], Spread]
    uses: dict[str, StepUse]
    artifact: str

    def ratios(self, slot: str, selection: str) -> dict[int, float | None]:
        """Ratios of standard deviations by layer."""
        return {
            layer: spread.ratio
            for (layer, name, chosen), spread in self.spreads.items()
            if name == slot and chosen == selection
        }


def _selected(values: Values, stage: Stage, selection: str) -> np.ndarray:
    return values[stage][-1:] if selection == "last" else values[stage]


def _spread(model: np.ndarray, ref: np.ndarray) -> Spread:
    found = []
    for values in (model, ref):
        std = float(values.std(ddof=1, dtype=np.float64)) if values.size > 1 else 0.0
        found.append(std if math.isfinite(std) else None)
    return Spread(found[0], found[1], (model.size, ref.size))
