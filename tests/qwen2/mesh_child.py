"""Runs cases over several devices in a process of its own: `python mesh_child.py CASE…` prints JSON by case.

A processor is split into devices before jax starts, which no test's process can do once another has run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

DEVICES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from blocks.support import random_blocks  # noqa: E402
from tiny import CONFIG, random_values, tiny_checkpoint, write_tiny  # noqa: E402

from aprjax.blocks import block_format, encode  # noqa: E402
from aprjax.blocks.dot import float_matmul, integer_matmul  # noqa: E402
from aprjax.blocks.relay import relay  # noqa: E402
from aprjax.qwen2 import functional, loading, model, stages  # noqa: E402
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic  # noqa: E402
from aprjax.qwen2.batch import generate_batch  # noqa: E402
from aprjax.qwen2.device_memory import device_memory  # noqa: E402
from aprjax.qwen2.generate import generate_greedy  # noqa: E402
from aprjax.qwen2.model import Qwen2  # noqa: E402
from aprjax.qwen2.sharding import Heads, SplitRelaid, device_mesh, split_product, split_relay  # noqa: E402

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
# Six query heads on two key heads, and rows that 8 does not divide: 261 logits or so, 6 * 64 query rows, 776 neurons.
UNEVEN = replace(CONFIG, num_layers=1, num_heads=6, num_kv_heads=2, intermediate_size=768)
TYPES = {"": "Q4_K", "down": "Q6_K", "v_proj": "Q8_0", "o_proj": "Q5_0"}


def relative(found: object, expected: object) -> float:
    """Relative L2 of the difference."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def products(*names: str) -> dict[str, object]:
    """Each block type's product of 83 rows over 8 devices and over one."""
    generator = np.random.default_rng(7)
    x = jnp.asarray(generator.normal(size=(5, 512)).astype(np.float32))
    found = {}
    for name in names:
        blocks = block_format(name)
        quantized = blocks.activation is not None
        if not quantized:
            values = generator.normal(size=(83, 512)).astype(np.float32)
            packed = np.ascontiguousarray(encode(name, values)).view(np.uint8).reshape(83, -1, blocks.block_bytes)
        else:
            packed = random_blocks(name, (83, 512 // blocks.block_size), generator)
        split, whole = split_relay(name, packed, device_mesh(DEVICES)), relay(name, packed)
        kernel = partial(integer_matmul if quantized else float_matmul, name)

        def over(weight: SplitRelaid, x: jax.Array, kernel: Callable = kernel) -> jax.Array:
            return split_product(weight, x, kernel)

        out, expected = jax.jit(over)(split, x), jax.jit(kernel)(whole, x)
        # The gradient of a sum of squares: every row takes part.
        pull, pull_one = (
            jax.jit(jax.grad(lambda x, run=run, weight=weight: jnp.sum(run(weight, x) ** 2)))
            for run, weight in ((over, split), (kernel, whole))
        )
        leaves = jax.tree.leaves(split)
        found[name] = {
            "equal": bool(np.array_equal(out, expected)),
            "relative": relative(out, expected),
            "gradient": relative(pull(x), pull_one(x)),
            "quantized": quantized,
            "devices": sorted({len(leaf.addressable_shards) for leaf in leaves}),
            "shares": sorted({leaf.addressable_shards[0].data.size * DEVICES == leaf.size for leaf in leaves}),
        }
    return found


def attention(heads: int, kv_heads: int, devices: int) -> dict[str, object]:
    """Scores, softmax and weighted values, split and whole."""
    generator = np.random.default_rng(3)
    q, k, v = (jnp.asarray(generator.normal(size=(7, n, 32)).astype(np.float32)) for n in (heads, kv_heads, kv_heads))
    visible = jnp.tril(jnp.ones((7, 7), bool))

    def attended(over: Heads, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = over.scores(functional.attention_scores, q, k)
        weights = over.softmax(functional.masked_softmax, scores, visible)
        return scores, over.values(functional.weighted_values, weights, v)

    def pulled(over: Heads) -> jax.Array:
        return jax.grad(lambda q: jnp.sum(attended(over, q)[1] ** 2))(q)

    sides = [Heads(mesh, heads, kv_heads) for mesh in (device_mesh(devices), None)]
    split, whole = (jax.jit(partial(attended, side, q))() for side in sides)
    gradient, expected = (jax.jit(partial(pulled, side))() for side in sides)
    return {
        "scores": relative(split[0], whole[0]),
        "values": relative(split[1], whole[1]),
        "gradient": relative(gradient, expected),
    }


def whole_model(name: str, devices: int) -> dict[str, object]:
    """Every stage over several devices: free-running, and from one device's inputs."""
    arithmetic = PRESETS[name]
    checkpoint = tiny_checkpoint(UNEVEN, types=TYPES)
    one, many = Qwen2(checkpoint, arithmetic), Qwen2(checkpoint, arithmetic, mesh=devices)
    _, expected = one.run_with_cache(TOKENS)
    _, found = many.run_with_cache(TOKENS)
    return {
        "free": {
            f"{layer}:{stage}": relative(found[layer, stage], value) for (layer, stage), value in expected.items()
        },
        "local": local_differences(many, expected, arithmetic),
    }


def every_stage(name: str, *counts: int) -> dict[str, object]:
    """The farthest that any stage is off, free-running, by the number of devices."""
    arithmetic, checkpoint = PRESETS[name], tiny_checkpoint(UNEVEN, types=TYPES)
    _, expected = Qwen2(checkpoint, arithmetic).run_with_cache(TOKENS)
    found = {}
    for count in counts:
        _, values = Qwen2(checkpoint, arithmetic, mesh=count).run_with_cache(TOKENS)
        found[str(count)] = max(relative(values[place], value) for place, value in expected.items())
    return found


def large_scores(name: str, *counts: int) -> dict[str, object]:
    """The same with scores as large as the real 0.5B's, behind which a softmax shows the last bit of a product."""
    values = random_values(UNEVEN)
    for part in ("q_proj", "k_proj"):
        values[f"model.layers.0.self_attn.{part}.bias"] *= 48
    arithmetic, checkpoint = PRESETS[name], tiny_checkpoint(UNEVEN, types=TYPES, values=values)
    _, expected = Qwen2(checkpoint, arithmetic).run_with_cache(TOKENS)
    found: dict[str, object] = {"largest": float(np.abs(expected[0, stages.Stage.ATTN_SCORES]).max())}
    for count in counts:
        _, split = Qwen2(checkpoint, arithmetic, mesh=count).run_with_cache(TOKENS)
        found[str(count)] = max(relative(split[place], value) for place, value in expected.items())
    return found


def local_differences(many: Qwen2, expected: dict, arithmetic: Arithmetic) -> dict[str, float]:
    """Each stage of the first layer from one device's inputs."""
    with model.precision_scope(arithmetic):
        context = model.causal_context(many.config, arithmetic, length=len(TOKENS))
        values = {stage: value for (layer, stage), value in expected.items() if layer == 0}
        _, _, captured = model.run_layer(
            many.layers[0],
            expected[stages.OUTSIDE, stages.Stage.EMBEDDING],
            context,
            values,
            {},
            arithmetic=arithmetic,
            capture=True,
        )
        return {str(stage): relative(captured[stage], value) for stage, value in values.items()}


def decoding() -> dict[str, object]:
    """A greedy continuation over a split cache, alone and in a batch, and over a whole cache."""
    checkpoint, arithmetic = tiny_checkpoint(UNEVEN, types=TYPES), PRESETS["llama.cpp"]
    many = Qwen2(checkpoint, arithmetic, mesh=2)
    return {
        "one": generate_greedy(Qwen2(checkpoint, arithmetic), TOKENS, max_new_tokens=4),
        "many": generate_greedy(many, TOKENS, max_new_tokens=4),
        "batch": generate_batch(many, [TOKENS], max_new_tokens=4)[0],
    }


def memory() -> dict[str, object]:
    """Bytes that each device holds of the split weights, and what the shapes say."""
    checkpoint = tiny_checkpoint(UNEVEN, types={"": "Q8_0"})
    loaded = Qwen2(checkpoint, PRESETS["llama.cpp"], mesh=DEVICES)
    held = dict.fromkeys(map(str, jax.devices()), 0)
    for leaf in jax.tree.leaves([loaded.layers, loaded.head]):
        if leaf.ndim > 1:
            for shard in leaf.addressable_shards:
                held[str(shard.device)] += shard.data.nbytes
    said = device_memory(UNEVEN, lambda _: "Q8_0", devices=DEVICES)
    return {
        "held": sorted(held.values()),
        "said": said.weights,
        "whole": device_memory(UNEVEN, lambda _: "Q8_0").weights,
    }


def command_line() -> dict[str, object]:
    """`layers --mesh 2` of a file and itself: its exit code, its verdict, and how many matrices were split."""
    from aprjax.cli import main

    split, plainly = [], loading.split_relay

    def counted(name: str, packed: np.ndarray, mesh: object) -> object:
        split.append(mesh.size)
        return plainly(name, packed, mesh)

    loading.split_relay = counted
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        file, out = str(Path(folder) / "tiny.apr"), Path(folder) / "out.json"
        checkpoint = tiny_checkpoint(replace(CONFIG, num_layers=1), types={"": "Q4_K", "down": "Q6_K"})
        write_tiny(Path(file), checkpoint)
        tokens = ",".join(map(str, TOKENS))
        code = main(["layers", "--model", file, "--ref", file, "--tokens", tokens, "--mesh", "2", "--json", str(out)])
        return {"code": code, "verdict": json.loads(out.read_text())["verdict"], "split": split}


CASES: dict[str, Callable[..., dict[str, object]]] = {
    "products": products,
    "attention": attention,
    "model": whole_model,
    "every_stage": every_stage,
    "large_scores": large_scores,
    "decoding": decoding,
    "memory": memory,
    "command_line": command_line,
}


def run(case: str) -> dict[str, object]:
    """`model:llama.cpp:8` calls `whole_model("llama.cpp", 8)`."""
    name, *arguments = case.split(":")
    return CASES[name](*(int(part) if part.isdigit() else part for part in arguments))


if __name__ == "__main__":
    json.dump({case: run(case) for case in sys.argv[1:]}, sys.stdout)
