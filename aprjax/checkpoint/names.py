"""Tensor names as data: GGUF's (`blk.3.ffn_gate.weight`) and Hugging Face's, which are canonical here.

The pairs are those of llama.cpp's Qwen2 graph and of `apr import` (apr-format.md 4.1). A name that
is in no table passes unchanged, except that a layer's unknown suffix keeps its layer number
(`blk.3.x.weight` <-> `model.layers.3.x.weight`), as `apr import` writes it.
"""

from __future__ import annotations

import re

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_NAMES_BACK = {hf: gguf for gguf, hf in GLOBAL_NAMES.items()}
_LAYER_NAMES_BACK = {hf: gguf for gguf, hf in LAYER_NAMES.items()}

_GGUF_LAYER = re.compile(r"blk\.([0-9]+)\.(.+)", re.DOTALL)
_HF_LAYER = re.compile(r"model\.layers\.([0-9]+)\.(.+)", re.DOTALL)


def gguf_to_hf(name: str) -> str:
    """Canonical name of a GGUF tensor: `blk.3.ffn_gate.weight` -> `model.layers.3.mlp.gate_proj.weight`."""
    return _translate(name, _GGUF_LAYER, "model.layers", GLOBAL_NAMES, LAYER_NAMES)


def hf_to_gguf(name: str) -> str:
    """GGUF name of a canonical one, the inverse of `gguf_to_hf` on every name that it can return."""
    return _translate(name, _HF_LAYER, "blk", _GLOBAL_NAMES_BACK, _LAYER_NAMES_BACK)


def is_gguf_name(name: str) -> bool:
    """Whether the name is spelled the way GGUF files spell it."""
    return gguf_to_hf(name) != name


def _translate(
    name: str,
    layer_pattern: re.Pattern[str],
    layer_prefix: str,
    global_names: dict[str, str],
    layer_names: dict[str, str],
) -> str:
    layer = layer_pattern.fullmatch(name)
    rest = layer[2] if layer else name
    stem, dot, kind = rest.rpartition(".")
    table = layer_names if layer else global_names
    if dot and stem in table:
        rest = f"{table[stem]}.{kind}"
    return f"{layer_prefix}.{layer[1]}.{rest}" if layer else rest
