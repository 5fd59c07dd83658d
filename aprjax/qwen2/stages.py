"""The 20 stages of a Qwen2 forward pass, and `Tap`: the one way into and out of the graph.

The names are those of `apr trace --save-tensor` (paiml/aprender, apr-cli-trace-save-tensor-v1). The
same names appear in `jax.named_scope`, in JSON, in plots and in saved traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# The layer number that stands for stages outside the layers: embedding, final_norm, lm_head.
OUTSIDE = -1


class Stage(StrEnum):
    """A point in the graph, in execution order; each value is `[position, width]`."""

    EMBEDDING = "embedding"
    ATTN_NORM = "attn_norm"
    QKV_MATMUL = "qkv_matmul"  # q, k and v side by side, before the bias
    QKV_BIAS = "qkv_bias"  # q, k and v side by side, after the bias
    Q_POST_ROPE = "q_post_rope"
    K_POST_ROPE = "k_post_rope"  # before the KV heads are repeated
    ATTN_SCORES = "attn_scores"  # scaled, before the mask; width = heads * key positions
    ATTN_SOFTMAX = "attn_softmax"  # after the mask
    ATTENTION = "attention"  # softmax times V, heads merged
    ATTN_OUT = "attn_out"
    POST_ATTN_RESIDUAL = "post_attn_residual"
    FFN_NORM = "ffn_norm"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_SILU = "ffn_silu"
    FFN_SWIGL = "ffn_swigl"
    FFN_OUT = "ffn_out"
    POST_FFN_RESIDUAL = "post_ffn_residual"
    FINAL_NORM = "final_norm"
    LM_HEAD = "lm_head"


LAYER_STAGES: tuple[Stage, ...] = tuple(
    stage for stage in Stage if stage not in (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)
)

# The stages whose values a stage is computed from, within one layer. `previous` is the layer's input.
# Local error at a stage is its error when exactly these inputs are given.
STAGE_INPUTS: Mapping[Stage, tuple[str, ...]] = {
    Stage.EMBEDDING: (),
    Stage.ATTN_NORM: ("previous",),
    Stage.QKV_MATMUL: (Stage.ATTN_NORM,),
    Stage.QKV_BIAS: (Stage.QKV_MATMUL,),
    Stage.Q_POST_ROPE: (Stage.QKV_BIAS,),
    Stage.K_POST_ROPE: (Stage.QKV_BIAS,),
    Stage.ATTN_SCORES: (Stage.Q_POST_ROPE, Stage.K_POST_ROPE),
    Stage.ATTN_SOFTMAX: (Stage.ATTN_SCORES,),
    Stage.ATTENTION: (Stage.ATTN_SOFTMAX, Stage.QKV_BIAS),
    Stage.ATTN_OUT: (Stage.ATTENTION,),
    Stage.POST_ATTN_RESIDUAL: ("previous", Stage.ATTN_OUT),
    Stage.FFN_NORM: (Stage.POST_ATTN_RESIDUAL,),
    Stage.FFN_GATE: (Stage.FFN_NORM,),
    Stage.FFN_UP: (Stage.FFN_NORM,),
    Stage.FFN_SILU: (Stage.FFN_GATE,),
    Stage.FFN_SWIGL: (Stage.FFN_SILU, Stage.FFN_UP),
    Stage.FFN_OUT: (Stage.FFN_SWIGL,),
    Stage.POST_FFN_RESIDUAL: (Stage.POST_ATTN_RESIDUAL, Stage.FFN_OUT),
    Stage.FINAL_NORM: ("previous",),
    Stage.LM_HEAD: (Stage.FINAL_NORM,),
}


@dataclass
class Tap:
    """Captures, replaces and perturbs the values that pass through it, inside a traced function.

    Attributes:
        capture: record every value as it was *computed*, before any replacement.
        replace: values that go on in place of the computed ones. Replacing every stage by another
            side's values makes each captured value a local one: computed from that side's inputs.
        perturb: values added to what goes on; the gradient with respect to a perturbation of zeros
            is the gradient with respect to the stage.
        captured: what was recorded, in execution order.
    """

    capture: bool = False
    replace: Mapping[Stage, Any] = field(default_factory=dict)
    perturb: Mapping[Stage, Any] = field(default_factory=dict)
    captured: dict[Stage, Any] = field(default_factory=dict)

    def __call__(self, stage: Stage, value: Any) -> Any:
        """Passes `value` (`[position, width]`) through the tap and returns what goes on."""
        if self.capture:
            self.captured[stage] = value
        if stage in self.replace:
            value = self.replace[stage]
        if stage in self.perturb:
            value = value + self.perturb[stage]
        return value
