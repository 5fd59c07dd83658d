"""From a stage to the tensors and config keys that it is computed from: cause, next step, and confidence."""

from __future__ import annotations

from dataclasses import dataclass

from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.files import FilesReport, TensorDifference
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


@dataclass(frozen=True)
class Accusation:
    """What a stage's difference is put down to.

    Attributes:
        cause: in a sentence, without a full stop.
        next_step: what to do about it.
        confidence: how sure that is, and what it rests on.
    """

    cause: str
    next_step: str
    confidence: Confidence


def accuse(
    layer: int,
    stage: Stage,
    files: FilesReport | None,
    arithmetics: tuple[Arithmetic, Arithmetic],
    *,
    engine: str | None = None,
) -> Accusation:
    """Why this stage's output differs although its inputs agree, what to do next, and how sure that is.

    `files` is None where a trace's own file is not at hand; `engine` names what computed a trace.
    """
    if files is None:
        return Accusation(
            f"{engine} computed something else here than the file gives from the same inputs, and the file that it "
            "ran is not at hand",
            "give the file that the trace was made from, or see `python -m aprjax replay`",
            Confidence(Level.WEAK, "without that file its own contents cannot be told from the engine's computation"),
        )
    read = [of_key(key, files) for key in STAGE_CONFIG.get(stage, ()) if key in files.config]
    differing = [d for name in tensors_of(layer, stage) if (d := files.tensor(name)) is not None]
    read += [of_tensor(difference) for difference in differing if not difference.same_values]
    if read:
        return _together(read)
    if differing:
        ours, theirs = differing[0].block_types
        return Accusation(
            f"{differing[0].name} holds equal values as {ours} and {theirs}, "
            "which this arithmetic multiplies differently",
            "run both sides under --arithmetic float32 to compare the files alone",
            Confidence(Level.STRONG, "every value was compared and is equal, and nothing else differs here"),
        )
    ours, theirs = arithmetics
    if engine is not None:
        return Accusation(
            f"the files agree here; {engine} computes this stage otherwise than {ours.name} arithmetic",
            "`python -m aprjax replay --arithmetic auto` says which arithmetic explains it, if any",
            Confidence(Level.STRONG, "all that this stage reads is equal in both files, and so are its inputs"),
        )
    if ours != theirs:
        return Accusation(
            f"the files agree here; {ours.name} and {theirs.name} compute this stage differently",
            "run both sides under one --arithmetic to compare the files alone",
            Confidence(Level.STRONG, "all that this stage reads is equal in both files, and so are its inputs"),
        )
    return Accusation(
        "the files agree here and both sides use one arithmetic: the difference is the computation's own",
        "report this with --save-trace: it should not happen",
        Confidence(Level.WEAK, "nothing that was compared differs"),
    )


def of_tensor(difference: TensorDifference) -> Accusation:
    """A tensor whose values differ: the search's own explanation and next step, and what proves them."""
    return Accusation(
        f"{difference.name} differs: {difference.explanation}",
        difference.next_step or "convert the model again from the reference",
        difference.confidence,
    )


def of_key(key: str, files: FilesReport) -> Accusation:
    """A config key that differs."""
    ours, theirs = files.config[key]
    return Accusation(
        f"{key} is {ours!r} in the model and {theirs!r} in the reference",
        f"correct {key} in the model's metadata, or convert it again from the reference",
        Confidence(Level.CERTAIN, f"both files' metadata were read, and this stage computes with {key}"),
    )


def _together(found: list[Accusation]) -> Accusation:
    """Several things that a stage reads differ: all are named, and none can be told to be the one."""
    if len(found) == 1:
        return found[0]
    weakest = max(found, key=lambda one: list(Level).index(one.confidence.level))
    return Accusation(
        "; ".join(one.cause for one in found),
        "; ".join(dict.fromkeys(one.next_step for one in found)),
        Confidence(weakest.confidence.level, "; ".join(dict.fromkeys(one.confidence.basis for one in found))),
    )
