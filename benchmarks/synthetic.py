"""Make a full-size checkpoint of random weights: the shapes and block types of a real Qwen2.5, from a seed.

    python benchmarks/synthetic.py 7b.gguf 7b.apr --size 7b [--vocabulary REAL.gguf] [--seed 0]
    python benchmarks/synthetic.py --list

Block types are those that llama.cpp's Q4_K_M gives each tensor. The root mean squares of weights, biases and norms are
those of Qwen2.5-Coder-1.5B-Instruct (`RMS`), so that the residual grows as in a trained model, by a little in each
layer, and logits spread as its do. Weights stream to disk; memory holds a few MiB of them. The same seed gives the same
blocks, in both containers and whatever the vocabulary. APR has no Q5_0 and Q8_0, which the widths of 0.5B and 72B
demand: convert their .gguf.

Without --vocabulary the tokens are the 256 bytes, ChatML's three and `[PAD…]`: every text tokenizes, byte by byte.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_blocks import RANDOM_BLOCKS

from aprjax.blocks import block_format, byte_size
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.apr_writer import write_apr
from aprjax.checkpoint.gguf_metadata import build_metadata
from aprjax.checkpoint.gguf_writer import write_gguf
from aprjax.checkpoint.names import hf_to_gguf
from aprjax.checkpoint.types import CheckpointError, ModelConfig, Vocabulary, canonical_tensor_shapes
from aprjax.text.byte_alphabet import CHARACTER_OF_BYTE

# hidden, layers, heads, KV heads, feed-forward, rows of the embedding: apr-format.md of the project's reference notes
# for 0.5B to 7B, the published config.json of Qwen2.5-14B, 32B and 72B for the others.
SHAPES = {
    "0.5b": (896, 24, 14, 2, 4864, 151936),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "3b": (2048, 36, 16, 2, 11008, 151936),
    "7b": (3584, 28, 28, 4, 18944, 152064),
    "14b": (5120, 48, 40, 8, 13824, 152064),
    "32b": (5120, 64, 40, 8, 27648, 152064),
    "72b": (8192, 80, 64, 8, 29568, 152064),
}
# Root mean square of a matrix's values times the root of its width, so that an input of size 1 gives an output of that
# size; of biases, of the values themselves. Measured on Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, middle of its layers. The
# embedding's is of the values themselves, as its rows are read and not summed.
RMS = {
    "embed_tokens.weight": 0.017,
    "lm_head.weight": 0.67,
    "q_proj.weight": 0.57,
    "k_proj.weight": 0.62,
    "v_proj.weight": 0.5,
    "o_proj.weight": 0.76,
    "gate_proj.weight": 0.62,
    "up_proj.weight": 0.87,
    "down_proj.weight": 1.25,
    "q_proj.bias": 1.4,
    "k_proj.bias": 0.75,
    "v_proj.bias": 0.12,
}
# Mean and standard deviation of the norms' weights, from the same file.
NORMS = {
    "input_layernorm.weight": (1.7, 0.55),
    "post_attention_layernorm.weight": (1.5, 0.42),
    "norm.weight": (4.6, 0.58),
}
# Blocks made at a time: at most 14 MiB of the largest type.
_BLOCKS_TOGETHER = 1 << 16
_K_BLOCK = 256
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def config_of(size: str, *, layers: int | None = None) -> ModelConfig:
    """The dimensions of a size, with fewer layers if that is asked for."""
    hidden, all_layers, heads, kv_heads, ffn, vocabulary = SHAPES[size]
    return ModelConfig(
        architecture="qwen2",
        hidden_size=hidden,
        num_layers=all_layers if layers is None else layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_pairing="neox",
        rms_norm_eps=1e-6,
    )


def block_type(name: str, width: int, config: ModelConfig) -> str:
    """What llama.cpp's Q4_K_M makes of a tensor (`llama_tensor_get_type`, llama-quant.cpp), by its canonical name."""
    if name.endswith("bias") or name.endswith("norm.weight"):
        return "F32"
    chosen = "Q4_K"
    if name == "lm_head.weight":
        chosen = "Q6_K"
    elif "v_proj" in name or "down_proj" in name:
        count = config.num_layers
        # Layers are counted as they come, and in the published files they come in the order of their names.
        layer = sorted(map(str, range(count))).index(name.split(".")[2])
        # `use_more_bits`: the first and last eighth of the layers, and every third between them.
        if layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2:
            chosen = "Q6_K"
        elif "v_proj" in name and count == 80:  # LLM_TYPE_70B: eight heads share these weights
            chosen = "Q5_K"
    if width % _K_BLOCK:
        return {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}[chosen]
    return chosen


@dataclass(frozen=True)
class RandomTensor:
    """A tensor that is made as it is written, piece by piece; the same pieces every time.

    Attributes:
        name: the canonical one, or GGUF's.
        shape: `(out, in)`.
        block_type: how it is encoded.
        rms: of its values around `mean`.
        mean: of its values.
        seed: of the model and of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    block_type: str
    rms: float
    mean: float
    seed: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return byte_size(self.block_type, self.shape)

    @property
    def data(self) -> np.ndarray:
        """All bytes, `uint8[bytes]`."""
        return np.concatenate([chunk.reshape(-1) for chunk in self.chunks()])

    def chunks(self) -> Iterator[np.ndarray]:
        """The same in pieces."""
        generator = np.random.default_rng(self.seed)
        size = math.prod(self.shape)
        if self.block_type == "F32":
            values = self.mean + self.rms * generator.standard_normal(size, np.float32)
            yield values.astype("<f4").view(np.uint8)
            return
        blocks = size // block_format(self.block_type).block_size
        for start in range(0, blocks, _BLOCKS_TOGETHER):
            yield RANDOM_BLOCKS[self.block_type](generator, min(_BLOCKS_TOGETHER, blocks - start), self.rms)


def random_tensors(config: ModelConfig, seed: int) -> list[RandomTensor]:
    """All tensors of a model, in execution order."""
    made = []
    for name, shape in canonical_tensor_shapes(config).items():
        leaf = ".".join(name.split(".")[-2:])
        mean, rms = NORMS.get(leaf, (0.0, RMS.get(leaf, 0.0)))
        if len(shape) == 2 and leaf != "embed_tokens.weight":
            rms /= shape[1] ** 0.5
        own = (seed, zlib.crc32(name.encode()))
        made.append(RandomTensor(name, shape, block_type(name, shape[-1], config), rms, mean, own))
    return made


def byte_vocabulary() -> Vocabulary:
    """The 256 bytes and ChatML's special tokens, which any text can be written with."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    # One merge: llama.cpp refuses a vocabulary without any.
    ordinary = (*CHARACTER_OF_BYTE, "th")
    count = len(ordinary)
    return Vocabulary(
        tokens=(*ordinary, *specials),
        merges=("t h",),
        token_types=(_NORMAL,) * count + (_CONTROL,) * len(specials),
        bos_token_id=count,
        eos_token_id=count + 2,
        padding_token_id=count,
        add_bos=False,
        pre_tokenizer="qwen2",
        model="gpt2",
    )


def padded(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """A token for every row of the embedding, which llama.cpp demands.

    Raises:
        CheckpointError: the vocabulary has more tokens than rows.
    """
    count = len(vocabulary.tokens)
    if count > rows:
        raise CheckpointError(f"{count} tokens for {rows} rows of the embedding", fix="take another --vocabulary")
    return replace(
        vocabulary,
        tokens=(*vocabulary.tokens, *(f"[PAD{number}]" for number in range(count, rows))),
        token_types=(*(vocabulary.token_types or (_NORMAL,) * count), *((_UNUSED,) * (rows - count))),
    )


def write_synthetic(path: Path, config: ModelConfig, *, vocabulary: Path | None = None, seed: int = 0) -> int:
    """Writes a GGUF or APR file, by the path's extension, atomically; returns the bytes of its tensors.

    Raises:
        CheckpointError: the vocabulary cannot be read or has too many tokens, or the file cannot be written.
    """
    words, template = byte_vocabulary(), None
    if vocabulary is not None:
        source = open_checkpoint(vocabulary)
        if source.vocabulary is None:
            raise CheckpointError("no vocabulary", file=vocabulary, fix="give a file with one")
        words, template = source.vocabulary, source.chat_template
    words = padded(words, config.vocab_size)
    tensors, name = random_tensors(config, seed), f"random weights, seed {seed}"
    if path.suffix == ".apr":
        more = {"name": name, "quantization": "Q4_K_M"}
        write_apr(
            path,
            config=config,
            tensors=tensors,
            vocabulary=words,
            chat_template=template,
            extra_metadata=more,
            original_format="gguf",
        )
    else:
        stored = [replace(tensor, name=hf_to_gguf(tensor.name)) for tensor in tensors]
        types = [(tensor.name, tensor.block_type) for tensor in stored]
        metadata = build_metadata(config, words, template, block_types=types, record=None, name=name)
        write_gguf(path, metadata=metadata, tensors=stored)  # pyright: ignore[reportArgumentType] - has all it asks for
    return sum(tensor.nbytes for tensor in tensors)


def _peak_mib() -> float:
    """Of this program alone; `ru_maxrss` begins with the size of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Writes what was asked for, and says how fast it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the size has")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help=".gguf or .apr: each with the same blocks")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="a checkpoint whose vocabulary is copied")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the sizes and what they take")
    options = parser.parse_args()
    if options.list:
        for size in SHAPES:
            tensors = random_tensors(config_of(size), 0)
            parameters = sum(math.prod(tensor.shape) for tensor in tensors)
            print(f"{size:5} {parameters / 1e9:6.2f} billion  {sum(tensor.nbytes for tensor in tensors) / 1e9:6.2f} GB")
        return 0
    if not options.files:
        parser.error("give a file to write")
    try:
        config = config_of(options.size, layers=options.layers)
        for path in options.files:
            start = time.perf_counter()
            count = write_synthetic(path, config, vocabulary=options.vocabulary, seed=options.seed)
            _say("written", path, count, time.perf_counter() - start)
            start = time.perf_counter()
            open_checkpoint(path)
            opened = time.perf_counter() - start
            start = time.perf_counter()
            _say(f"opened in {opened:.2f} s; read", path, _read(path), time.perf_counter() - start)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    print(f"peak memory {_peak_mib():.0f} MiB")
    return 0


def _say(what: str, path: Path, count: int, seconds: float) -> None:
    print(f"{path.name}: {what} {count / 1e9:.2f} GB in {seconds:.1f} s ({count / seconds / 1e6:.0f} MB/s)", flush=True)


def _read(path: Path) -> int:
    """Reads a file once, front to back (from the system's cache, as far as it is there); returns its bytes."""
    buffer, count = bytearray(1 << 24), 0
    with path.open("rb", buffering=0) as stream:
        while got := stream.readinto(buffer):
            count += got
    return count


if __name__ == "__main__":
    sys.exit(main())
