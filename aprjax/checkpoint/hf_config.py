"""`config.json` of a Hugging Face folder <-> `ModelConfig` (transformers' `Qwen2Config`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aprjax.checkpoint.config_rules import DEFAULT_ROPE_THETA, build_config
from aprjax.checkpoint.types import CheckpointError, Finding, ModelConfig, Vocabulary

MODEL_TYPE = "qwen2"
_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "head_dim": "head_dim",
}
# transformers' names of a dtype, by ours.
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAME = "is not computed; results will differ from transformers'"


def parse_hf_config(content: Mapping[str, Any], file: Path) -> tuple[ModelConfig, list[Finding]]:
    """The config and what a plain Qwen2 does not compute of what the file asks for.

    Raises:
        CheckpointError: another model, or a dimension missing or impossible.
    """
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"expected model_type {MODEL_TYPE!r}, found {str(content.get('model_type'))[:80]!r}",
            file=file,
            fix="give a Qwen2 model",
        )
    findings: list[Finding] = []
    numbers: dict[str, Any] = {field: content.get(key) for field, key in _KEYS.items()}
    # transformers 5 keeps the rotation's constants in an object of their own.
    rope = next((value for key in ("rope_parameters", "rope_scaling") if (value := content.get(key)) is not None), {})
    if not isinstance(rope, dict):
        raise CheckpointError(
            f"expected rope_parameters as an object, found {type(rope).__name__}", file=file, fix="download it again"
        )
    theta = content.get("rope_theta", rope.get("rope_theta"))
    if theta is None:
        theta = DEFAULT_ROPE_THETA
        message = f"rope_theta is absent; transformers takes {theta}"
        findings.append(Finding("rope-theta-defaulted", "warning", message))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        findings.append(Finding("rope-scaling-unsupported", "error", f"rope scaling {str(kind)[:40]!r} {_SAME}"))
    if content.get("use_sliding_window"):
        findings.append(Finding("sliding-window-unsupported", "error", f"sliding-window attention {_SAME}"))
    activation = content.get("hidden_act", "silu")
    if activation != "silu":
        findings.append(Finding("activation-unsupported", "error", f"activation {str(activation)[:40]!r} {_SAME}"))
    if content.get("quantization_config"):
        message = "the weights are packed by a quantization method of transformers; those tensors are not read"
        findings.append(Finding("quantization-unsupported", "error", message))
    numbers["rope_theta"] = theta
    return build_config(file, architecture="qwen2", keys=_KEYS, **numbers), findings


def write_hf_config(config: ModelConfig, vocabulary: Vocabulary | None, *, tied: bool, dtype: str) -> dict[str, Any]:
    """The content of `config.json`; `dtype` is the type of the matrices (F32, F16 or BF16).

    Raises:
        CheckpointError: the config pairs rotated channels in a way that transformers does not.
    """
    if config.rope_pairing != "neox":
        raise CheckpointError(
            f"rope pairing {config.rope_pairing!r} cannot be told to transformers, which always uses 'neox'",
            fix="correct rope_type in the source file (2 for Qwen2)",
        )
    content = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": MODEL_TYPE,
        **{key: getattr(config, field) for field, key in _KEYS.items()},
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,  # transformers' default; only training reads it
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
        "torch_dtype": _TORCH_DTYPES[dtype],
    }
    if config.head_dim * config.num_heads == config.hidden_size:
        del content["head_dim"]
    return content | special_ids(vocabulary)


def special_ids(vocabulary: Vocabulary | None) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id`, where known."""
    if vocabulary is None:
        return {}
    ids = {
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.padding_token_id,
    }
    return {key: value for key, value in ids.items() if value is not None}
