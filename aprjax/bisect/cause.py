"""From a stage to the tensors and config keys it is computed from, and from there to one sentence."""

from __future__ import annotations

from aprjax.bisect.files import FilesReport
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.stages import Stage

# What each stage is computed from besides its inputs: tensor names (`{}` is the layer) and config keys.
STAGE_TENSORS: dict[Stage, tuple[str, ...]] = {
    Stage.EMBEDDING: ("model.embed_tokens.weight",),
    Stage.ATTN_NORM: ("model.layers.{}.input_layernorm.weight",),
    Stage.QKV_MATMUL: tuple(f"model.layers.{{}}.self_attn.{p}_proj.weight" for p in "qkv"),
    Stage.QKV_BIAS: tuple(f"model.layers.{{}}.self_attn.{p}_proj.bias" for p in "qkv"),
    Stage.ATTN_OUT: ("model.layers.{}.self_attn.o_proj.weight",),
    Stage.FFN_NORM: ("model.layers.{}.post_attention_layernorm.weight",),
    Stage.FFN_GATE: ("model.layers.{}.mlp.gate_proj.weight",),
    Stage.FFN_UP: ("model.layers.{}.mlp.up_proj.weight",),
    Stage.FFN_OUT: ("model.layers.{}.mlp.down_proj.weight",),
    Stage.FINAL_NORM: ("model.norm.weight",),
    Stage.LM_HEAD: ("lm_head.weight",),
}
STAGE_CONFIG: dict[Stage, tuple[str, ...]] = {
    Stage.ATTN_NORM: ("rms_norm_eps",),
    Stage.FFN_NORM: ("rms_norm_eps",),
    Stage.FINAL_NORM: ("rms_norm_eps",),
    Stage.Q_POST_ROPE: ("rope_theta", "rope_pairing"),
    Stage.K_POST_ROPE: ("rope_theta", "rope_pairing"),
}
MATMUL_STAGES = frozenset(
    {Stage.QKV_MATMUL, Stage.ATTN_OUT, Stage.FFN_GATE, Stage.FFN_UP, Stage.FFN_OUT, Stage.LM_HEAD}
)


def tensors_of(layer: int, stage: Stage) -> tuple[str, ...]:
    """The tensors a stage reads."""
    return tuple(name.format(layer) for name in STAGE_TENSORS.get(stage, ()))


def cause_of(
    layer: int,
    stage: Stage,
    files: FilesReport | None,
    arithmetics: tuple[Arithmetic, Arithmetic],
    *,
    engine: str | None = None,
) -> tuple[str, str]:
    """Why this stage's output differs although its inputs agree, and the next step, one sentence each.

    `files` is None where a trace's own file is not at hand; `engine` names what computed a trace.
    """
    if files is None:
        return (
            f"{engine} computed something else here than the file gives from the same inputs, and the file that it "
            "ran is not at hand",
            "give the file that the trace was made from, or see `python -m aprjax replay`",
        )
    for key in STAGE_CONFIG.get(stage, ()):
        if key in files.config:
            ours, theirs = files.config[key]
            return (
                f"{key} is {ours!r} in the model and {theirs!r} in the reference",
                f"correct {key} in the model's metadata, or convert it again from the reference",
            )
    differing = [d for name in tensors_of(layer, stage) if (d := files.tensor(name)) is not None]
    for difference in differing:
        if not difference.same_values:
            return (
                f"{difference.name} differs: {difference.explanation}",
                "convert the model again from the reference; `python -m aprjax inspect` shows the tensor",
            )
    if differing:
        ours, theirs = differing[0].block_types
        return (
            f"{differing[0].name} holds equal values as {ours} and {theirs}, "
            "which this arithmetic multiplies differently",
            "run both sides under --arithmetic float32 to compare the files alone",
        )
    ours, theirs = arithmetics
    if engine is not None:
        return (
            f"the files agree here; {engine} computes this stage otherwise than {ours.name} arithmetic",
            "`python -m aprjax replay --arithmetic auto` says which arithmetic explains it, if any",
        )
    if ours != theirs:
        return (
            f"the files agree here; {ours.name} and {theirs.name} compute this stage differently",
            "run both sides under one --arithmetic to compare the files alone",
        )
    return (
        "the files agree here and both sides use one arithmetic: the difference is the computation's own",
        "report this with --save-trace: it should not happen",
    )
