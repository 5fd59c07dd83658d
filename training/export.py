"""Writes a trained state as the GGUF file that aprjax carries, quantized with the types of llama.cpp's Q4_K_M.

    python training/export.py out/embedded aprjax/assets/tiny-qwen2-q4_k.gguf

With `--float32` the weights stay as they were trained, which is what the quantized file is measured against.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from network import CONFIG
from vocabulary import read_vocabulary

from aprjax.blocks import encode
from aprjax.checkpoint.gguf_metadata import build_metadata
from aprjax.checkpoint.gguf_writer import write_gguf
from aprjax.checkpoint.names import hf_to_gguf
from aprjax.checkpoint.tensor_plan import PlannedTensor
from aprjax.checkpoint.types import EncodedTensor, canonical_tensor_shapes

NAME = "aprjax tiny Qwen2, trained on Python's standard library"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def block_type(name: str) -> str:
    """llama.cpp's Q4_K_M in every layer alike: more bits for the (tied) head, v and down, where errors cost most.

    Q4_K_M itself leaves v and down at Q4_K in half of the layers. Here layers that hold the same types share one
    compiled program, which is most of what a first run costs; the file is 0.2 MB larger for it.
    """
    if not name.endswith("weight") or "norm" in name:
        return "F32"
    return "Q6_K" if any(part in name for part in ("embed_tokens", "v_proj", "down_proj")) else "Q4_K"


def trained_weights(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The step and the weights of a saved state: its first leaves, sorted by name, as pytrees flatten."""
    names = sorted(name for name in canonical_tensor_shapes(CONFIG) if name != "lm_head.weight")
    with np.load(folder / "state.npz") as saved:
        return int(saved["step"]), {name: saved[f"leaf{index}"] for index, name in enumerate(names)}


def export(folder: Path, target: Path, *, encoded: bool = True) -> None:
    """Writes the model; with `encoded` false every tensor stays float32."""
    _, weights = trained_weights(folder)
    tensors = []
    for name in canonical_tensor_shapes(CONFIG):
        if name not in weights:
            continue
        kind = block_type(name) if encoded else "F32"
        value = np.ascontiguousarray(weights[name])
        tensor = EncodedTensor(name, value.shape, kind, encode(kind, value))
        tensors.append(PlannedTensor(hf_to_gguf(name), tensor, kind))
    metadata = build_metadata(
        CONFIG,
        read_vocabulary(folder / "vocabulary.json"),
        CHAT_TEMPLATE,
        block_types=[(tensor.name, tensor.block_type) for tensor in tensors],
        record=None,
        name=NAME,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(target, metadata=metadata, tensors=tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument("target", type=Path)
    parser.add_argument("--float32", action="store_true", help="leave every tensor in float32")
    given = parser.parse_args()
    export(given.folder, given.target, encoded=not given.float32)
    print(f"{given.target}: {given.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
