"""A Qwen2 in plain NumPy and double precision: short enough to be checked by reading, and the tests' witness."""

from __future__ import annotations

import numpy as np

from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.stages import OUTSIDE, Stage

Values = dict[tuple[int, Stage], np.ndarray]


def forward(checkpoint: Checkpoint, tokens: list[int]) -> Values:
    """Every stage's value by (layer, stage), `float64[position, width]`."""
    config = checkpoint.config
    count, channels = len(tokens), config.head_dim
    weight = {name: tensor.decode().astype(np.float64) for name, tensor in checkpoint.tensors.items()}
    values: Values = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + np.float32(config.rms_norm_eps)) * weight[name]

    def rotate(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for position in range(count):
            for pair in range(channels // 2):
                angle = position * config.rope_theta ** (-2 * pair / channels)
                one, two = (pair, pair + channels // 2) if config.rope_pairing == "neox" else (2 * pair, 2 * pair + 1)
                a, b = x[position, :, one], x[position, :, two]
                out[position, :, one] = a * np.cos(angle) - b * np.sin(angle)
                out[position, :, two] = a * np.sin(angle) + b * np.cos(angle)
        return out

    hidden = weight["model.embed_tokens.weight"][tokens]
    values[OUTSIDE, Stage.EMBEDDING] = hidden
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        keep = {}
        keep[Stage.ATTN_NORM] = x = norm(hidden, at + "input_layernorm.weight")
        parts = [x @ weight[f"{at}self_attn.{p}_proj.weight"].T for p in "qkv"]
        keep[Stage.QKV_MATMUL] = np.concatenate(parts, axis=1)
        parts = [part + weight[f"{at}self_attn.{p}_proj.bias"] for p, part in zip("qkv", parts, strict=True)]
        keep[Stage.QKV_BIAS] = np.concatenate(parts, axis=1)
        q, k, v = (part.reshape(count, -1, channels) for part in parts)
        q, k = rotate(q), rotate(k)
        keep[Stage.Q_POST_ROPE], keep[Stage.K_POST_ROPE] = q.reshape(count, -1), k.reshape(count, -1)
        scores = np.empty((count, config.num_heads, count))
        softmax = np.zeros_like(scores)
        merged = np.empty((count, config.num_heads, channels))
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            scores[:, head] = q[:, head] @ k[:, shared].T / np.sqrt(channels)
            for position in range(count):
                seen = np.exp(scores[position, head, : position + 1] - scores[position, head, : position + 1].max())
                softmax[position, head, : position + 1] = seen / seen.sum()
            merged[:, head] = softmax[:, head] @ v[:, shared]
        keep[Stage.ATTN_SCORES], keep[Stage.ATTN_SOFTMAX] = scores.reshape(count, -1), softmax.reshape(count, -1)
        keep[Stage.ATTENTION] = merged.reshape(count, -1)
        keep[Stage.ATTN_OUT] = keep[Stage.ATTENTION] @ weight[at + "self_attn.o_proj.weight"].T
        keep[Stage.POST_ATTN_RESIDUAL] = hidden = hidden + keep[Stage.ATTN_OUT]
        keep[Stage.FFN_NORM] = x = norm(hidden, at + "post_attention_layernorm.weight")
        keep[Stage.FFN_GATE] = gate = x @ weight[at + "mlp.gate_proj.weight"].T
        keep[Stage.FFN_UP] = up = x @ weight[at + "mlp.up_proj.weight"].T
        keep[Stage.FFN_SILU] = gate / (1 + np.exp(-gate))
        keep[Stage.FFN_SWIGL] = keep[Stage.FFN_SILU] * up
        keep[Stage.FFN_OUT] = keep[Stage.FFN_SWIGL] @ weight[at + "mlp.down_proj.weight"].T
        keep[Stage.POST_FFN_RESIDUAL] = hidden = hidden + keep[Stage.FFN_OUT]
        values.update({(layer, stage): value for stage, value in keep.items()})
    values[OUTSIDE, Stage.FINAL_NORM] = normed = norm(hidden, "model.norm.weight")
    head = weight.get("lm_head.weight", weight["model.embed_tokens.weight"])
    values[OUTSIDE, Stage.LM_HEAD] = normed @ head.T
    return values


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    """`|ours - theirs| / |theirs|` in double precision."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(theirs, np.float64)))
