"""The registry of faults of a computation: where each must show first, and what `explain` must call it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineFault:
    """A fault of the NumPy engine.

    Attributes:
        id: its name, also in `engine.Twist`.
        stage: whose own computation is wrong.
        explained: ids of `aprjax.bisect.explain` that are right.
        strengths: numbers that it is made with; None where it has none.
        parameter: of the explanation, that must be the strength (within a tenth of a per cent, the issue's bound).
        everywhere: it is one setting of the engine, so it is not made in single layers.
    """

    id: str
    stage: str
    explained: tuple[str, ...]
    strengths: tuple[float | None, ...] = (None,)
    parameter: str | None = None
    everywhere: bool = False


def _same(ids: str, stage: str, **options: object) -> list[EngineFault]:
    return [EngineFault(name, stage, (name,), **options) for name in ids.split()]  # type: ignore[arg-type]


_ROPE = "q_post_rope"
ENGINE_FAULTS: dict[str, EngineFault] = {
    fault.id: fault
    for fault in (
        EngineFault(
            "embedding-scaled", "embedding", ("scaled-embedding", "weights-scaled"), (16.0, 1.01), "factor", True
        ),
        EngineFault("rms-eps", "attn_norm", ("rms-eps",), (1e-5, 2e-6), "rms_norm_eps", True),
        EngineFault("eps-outside", "attn_norm", ("eps-outside",), everywhere=True),
        *_same("layer-norm norm-missing norm-weight-missing", "attn_norm"),
        # The same numbers as of weights to which one was added.
        EngineFault("norm-plus-one", "attn_norm", ("norm-weight-plus-one", "weights-shifted")),
        EngineFault("activations-per-32", "qkv_matmul", ("activations-per-32",), everywhere=True),
        # Where all matrices are K-quants, as in the small model, ggml's pairing by weight *is* per 256.
        EngineFault(
            "activations-per-256",
            "qkv_matmul",
            ("activations-per-256", "activations-by-weight", "activations-engine"),
            everywhere=True,
        ),
        *_same("activations-float16 activations-bfloat16", "qkv_matmul", everywhere=True),
        # A bias that is added twice is one that was doubled in the file, as far as a trace tells; none is one of zeros.
        EngineFault("bias-missing", "qkv_bias", ("bias-missing", "weights-zeroed")),
        EngineFault("bias-doubled", "qkv_bias", ("bias-doubled", "weights-scaled")),
        EngineFault("bias-missing-k", "qkv_bias", ("bias-missing-k", "weights-zeroed")),
        EngineFault("bias-missing-q", "qkv_bias", ("bias-missing-q", "weights-zeroed")),
        EngineFault("bias-doubled-v", "qkv_bias", ("bias-doubled-v", "weights-scaled")),
        EngineFault("rope-theta", _ROPE, ("rope-theta",), (1e4, 5e5, 1.01e6), "rope_theta", True),
        EngineFault("rope-pairing", _ROPE, ("rope-pairing-norm",)),
        EngineFault("position-offset", _ROPE, ("position-offset",), (1.0, 3.0), "offset", True),
        EngineFault("rope-scaling", _ROPE, ("rope-scaling",), (0.5, 0.25), "position_factor", True),
        *_same("rope-missing rope-backwards", _ROPE),
        *_same("attn-scale-missing attn-scale-twice", "attn_scores"),
        EngineFault("attn-scale", "attn_scores", ("attn-scale",), (1.001, 1.1)),
        EngineFault("attn-softcap", "attn_scores", ("attn-softcap",), (20.0,), "score_cap"),
        *_same("kv-heads-interleaved kv-heads-first kv-float16 kv-bfloat16", "attn_scores"),
        *_same("mask-missing mask-too-long", "attn_softmax"),
        EngineFault("sliding-window", "attn_softmax", ("sliding-window",), (4.0,), "window"),
        *_same("softmax-not-normalised softmax-one-more softmax-float16", "attn_softmax"),
        EngineFault("softmax-base-2", "attn_softmax", ("exponential-base-2",)),
        EngineFault("softmax-schraudolph", "attn_softmax", ("exponential-schraudolph",)),
        EngineFault("attention-scaled", "attention", ("scaled-attention",), (1.001, 1.1), "factor"),
        *_same(
            "attention-output-doubled attention-output-missing attention-residual-missing attention-residual-doubled "
            "attention-residual-from-norm",
            "post_attn_residual",
        ),
        *_same(
            "activation-gelu activation-gelu-tanh activation-quick-gelu activation-relu activation-hard-swish "
            "activation-sigmoid activation-identity",
            "ffn_silu",
        ),
        *_same("gate-up-exchanged", "ffn_swigl"),
        # No trace can tell a product times a factor from a matrix times that factor.
        EngineFault("ffn_out-scaled", "ffn_out", ("scaled-ffn_out", "weights-scaled"), (1.01, 2.0), "factor"),
        *_same("ffn-output-doubled ffn-output-missing ffn-residual-missing ffn-residual-doubled", "post_ffn_residual"),
        EngineFault("head-tied", "lm_head", ("head-tied",), everywhere=True),
        EngineFault("lm_head-scaled", "lm_head", ("scaled-lm_head", "weights-scaled"), (1.01, 0.5), "factor", True),
    )
}
# Outside the layers.
OUTSIDE_STAGES = ("embedding", "final_norm", "lm_head")
# What the engine reads wrongly from a right file: the stage, and the ids of the explanations.
WEIGHT_FAULTS: dict[str, EngineFault] = {
    fault.id: fault
    for fault in (
        EngineFault("weights-o-transposed", "attn_out", ("weights-transposed",)),
        EngineFault("weights-gate-up-exchanged", "ffn_gate", ("weights-another-tensor",)),
        EngineFault("weights-k-v-exchanged", "qkv_matmul", ("weights-another-tensor",)),
        EngineFault("weights-norms-exchanged", "attn_norm", ("norm-weight-other", "weights-another-tensor")),
        EngineFault("weights-down-scaled", "ffn_out", ("scaled-ffn_out", "weights-scaled"), (1.01, 2.0), "factor"),
        EngineFault("weights-gate-rows-shifted", "ffn_gate", ("weights-rows-shifted",)),
        EngineFault("weights-up-rows-reversed", "ffn_up", ("weights-reversed", "weights-rows-permuted")),
        EngineFault("weights-q-heads-permuted", "qkv_matmul", ("weights-heads-permuted",)),
        EngineFault("weights-q-rotary", "qkv_matmul", ("weights-rotary-interleaved",)),
        EngineFault("weights-q-head-zero", "qkv_matmul", ("weights-zeroed",)),
        EngineFault("weights-down-zero", "ffn_out", ("zero-ffn_out", "scaled-ffn_out", "weights-zeroed")),
        EngineFault("weights-gate-dims", "ffn_gate", ("weights-dimensions-exchanged",)),
    )
}
