"""Plant one known fault in an APR v2 file, and say where it must show.

    python benchmarks/faults/plant.py IN.apr OUT.apr --fault rope-theta
    python benchmarks/faults/plant.py --list

The output differs from the input by that fault alone; checksums are renewed. On stdout, one JSON object says what was
changed, and either the layer and stage at which the two models must first part (`expected.layer`, `expected.stage`;
layer -1 for embedding, final_norm and lm_head), the id of the finding that a reader must make (`expected.finding`), or
the cause that `bisect tokens` must name (`expected.cause`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from codec import FLOAT_TYPES, decode, encode
from container import GGUF_GLOBALS, AprFile, Computed, PlantError, Tensor
from planted import Planted, Request
from text_faults import TEXT_FAULTS

# Where a tensor is used: the design's stage names.
STAGES = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "qkv_matmul",
    "self_attn.k_proj.weight": "qkv_matmul",
    "self_attn.v_proj.weight": "qkv_matmul",
    "self_attn.q_proj.bias": "qkv_bias",
    "self_attn.k_proj.bias": "qkv_bias",
    "self_attn.v_proj.bias": "qkv_bias",
    "self_attn.o_proj.weight": "attn_out",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_out",
}
GLOBAL_STAGES = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}
# Byte of a block's float16 scale `d`, and the block's size (kernels.md, block layouts).
SCALE_PLACE = {"Q4_K": (0, 144), "Q6_K": (208, 210)}


def site_of(name: str) -> tuple[int, str]:
    """Layer and stage at which a tensor (Hugging Face name) is used."""
    if name in GLOBAL_STAGES:
        return -1, GLOBAL_STAGES[name]
    _, _, layer, leaf = name.split(".", 3)
    return int(layer), STAGES[leaf]


def in_layer(layer: int, leaf: str) -> str:
    return f"model.layers.{layer}.{leaf}"


def rope_theta(file: AprFile, request: Request) -> Planted:
    """rope_theta 10000 instead of 1000000."""
    old = file.set_key("rope_theta", 10000.0)
    return Planted(f"rope_theta {old} -> 10000.0", keys=("rope_theta",), layer=0, stage="q_post_rope")


def rope_type(file: AprFile, request: Request) -> Planted:
    """rope_type 0 (pairs of neighbours) instead of 2 (split halves)."""
    old = file.set_key("rope_type", 0)
    return Planted(f"rope_type {old} -> 0", keys=("rope_type",), layer=0, stage="q_post_rope")


def rms_eps(file: AprFile, request: Request) -> Planted:
    """rms_norm_eps 1e-5 instead of 1e-6."""
    old = file.set_key("rms_norm_eps", 1e-5)
    return Planted(f"rms_norm_eps {old} -> 1e-05", keys=("rms_norm_eps",), layer=0, stage="attn_norm")


def zero_k_bias(file: AprFile, request: Request) -> Planted:
    """The k bias of one layer (17) is zero."""
    layer = 17 if request.layer is None else request.layer
    name = in_layer(layer, "self_attn.k_proj.bias")
    tensor = file.tensor(name)
    if not np.frombuffer(tensor.whole(), np.uint8).any():
        raise PlantError(f"{name} is zero already")
    file.put(tensor.with_bytes(bytes(tensor.size)))
    return Planted("bias set to zero", (name,), layer=layer, stage="qkv_bias")


def swap_gate_up(file: AprFile, request: Request) -> Planted:
    """The gate and up projections of one layer (9) are exchanged."""
    layer = 9 if request.layer is None else request.layer
    names = in_layer(layer, "mlp.gate_proj.weight"), in_layer(layer, "mlp.up_proj.weight")
    gate, up = (file.tensor(name) for name in names)
    file.put(Tensor(gate.name, up.dtype, up.shape, up.pieces))
    file.put(Tensor(up.name, gate.dtype, gate.shape, gate.pieces))
    return Planted("gate and up exchanged", names, layer=layer, stage="ffn_gate")


def transpose_o(file: AprFile, request: Request) -> Planted:
    """The attention output projection of one layer (5) is transposed; it must be square."""
    layer = 5 if request.layer is None else request.layer
    name = in_layer(layer, "self_attn.o_proj.weight")
    tensor = file.tensor(name)
    if len(tensor.shape) != 2 or tensor.shape[0] != tensor.shape[1]:
        raise PlantError(f"{name} is {list(tensor.shape)}, not square")
    values = decode(tensor)
    file.put(tensor.with_bytes(encode(np.ascontiguousarray(values.T), tensor.type_name)))
    return Planted(f"transposed, and encoded as {tensor.type_name} again", (name,), layer=layer, stage="attn_out")


def interleave_nibbles(file: AprFile, request: Request) -> Planted:
    """The nibbles of one layer's (3) Q4_K gate are packed as neighbours instead of 32 apart."""
    layer = 3 if request.layer is None else request.layer
    name = in_layer(layer, "mlp.gate_proj.weight")
    tensor = file.tensor(name)
    blocks = q4_k_blocks(tensor, name)
    quants = blocks[:, 16:].reshape(-1, 4, 32)
    in_order = np.concatenate([quants & 15, quants >> 4], axis=2).reshape(len(blocks), 256)
    blocks[:, 16:] = in_order[:, 0::2] | (in_order[:, 1::2] << 4)
    file.put(tensor.with_bytes(blocks.tobytes()))
    return Planted("nibbles of neighbours share a byte", (name,), layer=layer, stage="ffn_gate")


def drop_scale_bits(file: AprFile, request: Request) -> Planted:
    """The high two bits of the 6-bit scales 4..7 of Q4_K are lost, in every tensor of the type (or one)."""
    changed = []
    for name in [request.tensor] if request.tensor else execution_order(file):
        tensor = file.tensor(name)
        if tensor.type_name != "Q4_K" and not request.tensor:
            continue
        if not (q4_k_blocks(tensor, name)[:, 4:12] & 0xC0).any():
            continue
        file.put(tensor.with_bytes(Computed(tensor.size, partial(without_high_bits, tensor, name))))
        changed.append(name)
    if not changed:
        raise PlantError("the file has no Q4_K tensor with such bits")
    layer, stage = site_of(changed[0])
    return Planted(f"scale bits dropped in {len(changed)} tensors", tuple(changed), layer=layer, stage=stage)


def without_high_bits(tensor: Tensor, name: str) -> bytes:
    """Bytes 4..11 of a block hold scales and mins 0..3 in six bits, above them the high bits of 4..7 (kernels.md)."""
    blocks = q4_k_blocks(tensor, name)
    blocks[:, 4:12] &= 0x3F
    return blocks.tobytes()


def shift_head(file: AprFile, request: Request) -> Planted:
    """The rows of lm_head are shifted by one."""
    name = "lm_head.weight"
    tensor = file.tensor(name)
    row = row_bytes(tensor, name)
    data = tensor.pieces[0] if len(tensor.pieces) == 1 else memoryview(tensor.whole())
    file.put(tensor.with_bytes(data[-row:], data[:-row]))
    return Planted("row i holds what row i - 1 held", (name,), layer=-1, stage="lm_head")


def overwrite_token(file: AprFile, request: Request) -> Planted:
    """The embedding row of one token (`<|im_start|>`) is that of token 0: prompts without the token cannot show it."""
    token = request.token or "<|im_start|>"
    name = "model.embed_tokens.weight"
    tensor = file.tensor(name)
    vocabulary = file.metadata.get("tokenizer.vocabulary") or []
    if token not in vocabulary:
        raise PlantError(f"the vocabulary has no token {token!r}; see --token")
    number, row = vocabulary.index(token), row_bytes(tensor, name)
    data = tensor.pieces[0]
    if number == 0 or data[:row] == data[number * row : (number + 1) * row]:
        raise PlantError(f"the row of {token!r} is that of token 0 already")
    file.put(tensor.with_bytes(data[: number * row], data[:row], data[(number + 1) * row :]))
    return Planted(f"row {number} ({token}) overwritten with row 0", (name,), layer=-1, stage="embedding")


def plant_nan(file: AprFile, request: Request) -> Planted:
    """One NaN in a weight (the second norm of layer 11); in a quantized tensor, one NaN block scale."""
    name = request.tensor or in_layer(11 if request.layer is None else request.layer, "post_attention_layernorm.weight")
    tensor = file.tensor(name)
    data = bytearray(tensor.whole())
    if tensor.type_name in FLOAT_TYPES:
        values = np.frombuffer(data, FLOAT_TYPES[tensor.type_name])
        values[values.size // 2] = np.nan
    elif tensor.type_name in SCALE_PLACE:
        place, size = SCALE_PLACE[tensor.type_name]
        middle = len(data) // size // 2 * size
        data[middle + place : middle + place + 2] = np.float16(np.nan).tobytes()
    else:
        raise PlantError(f"{name} is {tensor.type_name}; NaN can be planted in {[*FLOAT_TYPES, *SCALE_PLACE]}")
    file.put(tensor.with_bytes(bytes(data)))
    layer, stage = site_of(name)
    return Planted("one NaN", (name,), layer=layer, stage=stage)


def scale_norm(file: AprFile, request: Request) -> Planted:
    """A norm weight (the first of layer 13) is multiplied by 1.5."""
    name = request.tensor or in_layer(13 if request.layer is None else request.layer, "input_layernorm.weight")
    tensor = file.tensor(name)
    values = decode(tensor)
    file.put(tensor.with_bytes(encode(values * np.float32(1.5), tensor.type_name)))
    layer, stage = site_of(name)
    return Planted("multiplied by 1.5", (name,), layer=layer, stage=stage)


def missing_tensor(file: AprFile, request: Request) -> Planted:
    """A tensor (the up projection of layer 20) is not in the file."""
    name = request.tensor or in_layer(20 if request.layer is None else request.layer, "mlp.up_proj.weight")
    file.remove(name)
    finding = "missing-bias" if name.endswith(".bias") else "missing-tensor"
    return Planted("left out", (name,), finding="apr-head-absent" if name == "lm_head.weight" else finding)


def header_crc(file: AprFile, request: Request) -> Planted:
    """The checksum of the header is wrong."""
    file.header_crc_xor = 0x5A5A5A5A
    return Planted("header checksum inverted in half of its bits", finding="apr-header-crc-wrong")


FAULTS: dict[str, Callable[[AprFile, Request], Planted]] = {
    "rope-theta": rope_theta,
    "rope-type": rope_type,
    "rms-eps": rms_eps,
    "k-bias-zero": zero_k_bias,
    "gate-up-swapped": swap_gate_up,
    "o-proj-transposed": transpose_o,
    "nibbles-interleaved": interleave_nibbles,
    "scale-bits-dropped": drop_scale_bits,
    "head-rows-shifted": shift_head,
    "token-row-overwritten": overwrite_token,
    "nan-weight": plant_nan,
    "norm-scaled": scale_norm,
    "tensor-missing": missing_tensor,
    "header-crc": header_crc,
    **TEXT_FAULTS,
}


def execution_order(file: AprFile) -> list[str]:
    """The Hugging Face names of the model's tensors that the file has, in the order in which they are used."""
    layers = int(file.metadata.get("num_layers") or file.metadata.get("num_hidden_layers") or 0)
    names = ["model.embed_tokens.weight"]
    names += [in_layer(layer, leaf) for layer in range(layers) for leaf in STAGES]
    names += [f"{stem}.weight" for stem in GGUF_GLOBALS if stem != "model.embed_tokens"]
    present = []
    for name in names:
        try:
            file.tensor(name)
        except PlantError:
            continue
        present.append(name)
    return present


def q4_k_blocks(tensor: Tensor, name: str) -> np.ndarray:
    """The blocks of a Q4_K tensor, `uint8[blocks, 144]`, writable."""
    if tensor.type_name != "Q4_K":
        raise PlantError(f"{name} is {tensor.type_name}; this fault is one of Q4_K's packing")
    return np.frombuffer(bytearray(tensor.whole()), np.uint8).reshape(-1, 144)


def row_bytes(tensor: Tensor, name: str) -> int:
    rows = tensor.shape[0]
    if tensor.size % rows:
        raise PlantError(f"{name}: the rows of {tensor.type_name} {list(tensor.shape)} do not begin at whole bytes")
    return tensor.size // rows


def plant(source: Path, target: Path, fault: str, request: Request | None = None) -> dict[str, Any]:
    """Copy `source` to `target` with one fault; returns what the command prints."""
    file = AprFile.read(source)
    planted = FAULTS[fault](file, request or Request())
    file.write(target)
    return {
        "fault": fault,
        "input": str(source),
        "output": str(target),
        "detail": planted.detail,
        "tensors": list(planted.tensors),
        "keys": list(planted.keys),
        "expected": planted.expected(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant one known fault in an APR v2 file, and say where it must show.")
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("target", nargs="?", type=Path)
    parser.add_argument("--fault", choices=list(FAULTS))
    parser.add_argument("--layer", type=int, help="layer, for faults of one layer")
    parser.add_argument(
        "--tensor", help="Hugging Face name of a tensor, for nan-weight, norm-scaled, tensor-missing, …"
    )
    parser.add_argument("--token", help="token whose embedding row is overwritten")
    parser.add_argument("--list", action="store_true", help="list the faults")
    options = parser.parse_args(arguments)
    if options.list:
        for name, fault in FAULTS.items():
            print(f"{name:22} {(fault.__doc__ or '').strip()}")
        return 0
    if options.source is None or options.target is None or options.fault is None:
        parser.error("give IN.apr, OUT.apr and --fault, or --list")
    try:
        request = Request(options.layer, options.tensor, options.token)
        report = plant(options.source, options.target, options.fault, request)
    except (PlantError, OSError) as error:
        print(f"plant: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
