"""One side run as it is and with one legitimate change at a time, layer by layer.

What is changed is what every engine is free to choose: the order of sums, their precision, and how many
positions are fed at once. No change touches a number that the file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aprjax.bisect.lockstep import Runner, arbiter
from aprjax.blocks import block_format
from aprjax.checkpoint.mapped_file import release_pages
from aprjax.checkpoint.types import Checkpoint, EncodedTensor
from aprjax.qwen2.arithmetic import Arithmetic
from aprjax.qwen2.loading import head_tensor, load_layer, load_norm, pack
from aprjax.qwen2.model import causal_context, embed_padded, precision_scope, run_head, run_layer, run_norm
from aprjax.qwen2.modules import Context, DecoderLayer, FeedForward, Linear, PackedWeight
from aprjax.qwen2.streaming import LOGIT_ROWS

AS_IT_IS = "as it is"
PERMUTED = "feed-forward sums in another order"
DOUBLE = "float64 sums"
REASSOCIATED = "sums re-associated"
STEPWISE = "one position at a time"

# The order of neurons is drawn from this seed: any order but the file's own will do.
_SEED = 1
# Where nothing is quantized, neurons move in groups of this size: the step of ggml's float kernels.
_FLOAT_GROUP = 32


@dataclass(frozen=True)
class Variant:
    """One way to run a side.

    Attributes:
        name: of the change.
        arithmetic: that runs it.
        order: the feed-forward neurons in their new order; None to leave them.
        steps: how many of the last positions are fed one at a time.
    """

    name: str
    arithmetic: Arithmetic
    order: tuple[int, ...] | None = None
    steps: int = 0


def variants(runner: Runner, steps: int) -> tuple[list[Variant], list[str]]:
    """The side as it is, then each change that applies to it; and the changes that do not, with the reason."""
    arithmetic, skipped = runner.arithmetic, []
    found = [Variant(AS_IT_IS, arithmetic)]
    if arithmetic.exact:
        # Following the engine's own order of sums is slow; any other order is the change asked for.
        found.append(Variant(REASSOCIATED, replace(arithmetic, name=REASSOCIATED, exact=False)))
    else:
        order = _neuron_order(runner)
        if order is None:
            skipped.append(f"{PERMUTED}: the rows of down_proj have too few whole blocks")
        else:
            found.append(Variant(PERMUTED, arithmetic, order=order))
    if arithmetic.dtype == "float32":
        found.append(Variant(DOUBLE, arbiter(arithmetic)))
    if steps > 0:
        found.append(Variant(STEPWISE, arithmetic, steps=steps))
    return found, skipped


def _neuron_order(runner: Runner) -> tuple[int, ...] | None:
    """A new order of the feed-forward's neurons that keeps every block, of weights and activations, whole."""
    checkpoint = runner.checkpoint
    width = checkpoint.config.intermediate_size
    downs = [checkpoint.tensors[_name(i, "down")] for i in range(checkpoint.config.num_layers)]
    group = max(_group(tensor, runner.arithmetic) for tensor in downs)
    # Two summands have one order only.
    if any(tensor.row_padded for tensor in downs) or width % group or width < 3 * group:
        return None
    groups = np.random.default_rng(_SEED).permutation(width // group)
    return tuple(int(i) for i in (groups[:, None] * group + np.arange(group)).reshape(-1))


def _group(tensor: EncodedTensor, arithmetic: Arithmetic) -> int:
    form = block_format(tensor.block_type)
    if arithmetic.activations in ("realizar", "per 256"):
        return 256
    quantized = 1 if form.flat else block_format(form.activation).block_size if form.activation else 1
    return max(form.block_size, quantized, _FLOAT_GROUP)


def _name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}_proj.weight"


def sweep(
    runner: Runner, tokens: list[int], ways: list[Variant], progress: Callable[[int, int], None]
) -> list[Float[np.ndarray, "position hidden"]]:
    """The last hidden state by each variant; one layer is in memory at a time."""
    checkpoint, count = runner.checkpoint, len(tokens)
    layers = checkpoint.config.num_layers
    embedded = embed_padded(checkpoint, tokens, *(way.arithmetic for way in ways))
    hidden = [embedded for _ in ways]
    contexts = [causal_context(checkpoint.config, way.arithmetic, length=len(embedded)) for way in ways]
    for index in range(layers):
        progress(index, layers)
        layer = load_layer(checkpoint, index, _packed)
        for at, way in enumerate(ways):
            module = layer if way.order is None else _reordered(checkpoint, layer, index, way.order)
            with precision_scope(way.arithmetic):
                hidden[at] = _run(module, hidden[at], contexts[at], way, count)
    progress(layers, layers)
    return [value[:count] for value in hidden]


def _packed(tensor: EncodedTensor) -> PackedWeight:
    packed = pack(tensor)
    release_pages(tensor.data)
    return packed


def _run(layer: DecoderLayer, hidden: np.ndarray, context: Context, way: Variant, count: int) -> np.ndarray:
    """One layer's output; with `steps`, the last positions one at a time, over the cache of those before."""
    output, (keys, values), _ = run_layer(
        layer, jnp.asarray(hidden), context, {}, {}, arithmetic=way.arithmetic, capture=False
    )
    result = np.array(output)
    for position in range(count - min(way.steps, count), count):
        here = Context(
            context.cos[position : position + 1],
            context.sin[position : position + 1],
            context.visible[position : position + 1],
            keys,
            values,
            jnp.asarray(position, jnp.int32),
        )
        row = jnp.asarray(hidden[position : position + 1])
        stepped, (keys, values), _ = run_layer(layer, row, here, {}, {}, arithmetic=way.arithmetic, capture=False)
        result[position] = np.asarray(stepped)[0]
    return result


def _reordered(checkpoint: Checkpoint, layer: DecoderLayer, index: int, order: tuple[int, ...]) -> DecoderLayer:
    """The layer with its feed-forward neurons in another order: the same function, summed otherwise."""
    gate, up, down = (Linear(pack(tensor)) for tensor in reordered(checkpoint, index, order).values())
    mlp = FeedForward(gate, up, down)
    return DecoderLayer(layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, mlp)


def reordered(checkpoint: Checkpoint, index: int, order: tuple[int, ...]) -> dict[str, EncodedTensor]:
    """One layer's `gate`, `up` and `down` with the neurons in another order; blocks are moved, not encoded again."""
    rows = np.asarray(order)
    found = {}
    for part in ("gate", "up", "down"):
        tensor = checkpoint.tensors[_name(index, part)]
        size = block_format(tensor.block_type).block_size
        held = tensor.packed()
        moved = held[:, rows[::size] // size] if part == "down" else held[rows]
        release_pages(tensor.data)
        found[part] = replace(tensor, data=np.ascontiguousarray(moved).reshape(-1))
    return found


def head_batches(
    runner: Runner, ways: list[Variant], hidden: list[np.ndarray], rows: list[int]
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """(positions, each variant's logits there), `LOGIT_ROWS` positions at a time."""
    norm = load_norm(runner.checkpoint, "model.norm.weight")
    head = _packed(head_tensor(runner.checkpoint))
    for begin in range(0, len(rows), LOGIT_ROWS):
        chosen = rows[begin : begin + LOGIT_ROWS]
        logits = []
        for way, value in zip(ways, hidden, strict=True):
            with precision_scope(way.arithmetic):
                normed = run_norm(norm, jnp.asarray(value[chosen]), arithmetic=way.arithmetic)
                logits.append(np.asarray(run_head(head, normed, arithmetic=way.arithmetic)))
        yield chosen, logits
