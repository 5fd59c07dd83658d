"""Trains the embedded model: a Qwen2 of 5 million parameters, on Python's standard library, in JAX on a CPU.

    python training/train.py out/embedded
    python training/export.py out/embedded aprjax/assets/tiny-qwen2-q4_k.gguf

The same seed, library and versions give the same batches; an interrupted run goes on from its last saved step. The
learning rate is constant but for a warm-up and a linear decay over the last quarter, so that a run which is only to
become longer may start from any step saved before the decay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import Conversation, Source, conversations, sources
from network import CONFIG, Weights, initial_weights, logits
from vocabulary import END_OF_TEXT, encoder, read_vocabulary, train_vocabulary, write_vocabulary

from aprjax.checkpoint.atomic import atomic_file
from aprjax.text.template import wrap

CONTEXT = 256  # tokens of a training sequence: most functions of the library, and every conversation, fit
ROWS = 8  # sequences of a step, one in four of conversations
WARM_UP = 100
DECAY = 0.25  # share of the steps over which the learning rate falls to zero
# Muon's and Adam's usual rates at this width (arXiv:2502.16982 for the ratio of the two).
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
VALIDATE_EVERY = 100


@dataclass(frozen=True)
class Data:
    """Token ids: training text, held-out text, and conversations, each a whole."""

    text: np.ndarray
    held_out: np.ndarray
    conversations: tuple[np.ndarray, ...]

    def batch(self, seed: int, step: int) -> np.ndarray:
        """`int32[row, CONTEXT + 1]`, decided by seed and step alone."""
        random = np.random.default_rng([seed, step])
        rows = []
        for row in range(ROWS):
            if row % 4 == 0:
                rows.append(self._talk(random))
            else:
                start = random.integers(len(self.text) - CONTEXT)
                rows.append(self.text[start : start + CONTEXT + 1])
        return np.stack(rows).astype(np.int32)

    def _talk(self, random: np.random.Generator) -> np.ndarray:
        """Whole conversations from the row's first position on, as they begin at the first position when asked."""
        parts, length = [], 0
        while length < CONTEXT + 1:
            parts.append(self.conversations[random.integers(len(self.conversations))])
            length += len(parts[-1])
        return np.concatenate(parts)[: CONTEXT + 1]


def tokenized(files: tuple[Source, ...], talks: tuple[Conversation, ...], folder: Path) -> Data:
    """The corpus in token ids; the vocabulary is trained at the first call and kept in `folder`."""
    place = folder / "vocabulary.json"
    if not place.exists():
        write_vocabulary(place, train_vocabulary([f.text for f in files if not f.held_out], CONFIG.vocab_size))
    vocabulary = read_vocabulary(place)
    encode = encoder(vocabulary)
    end = vocabulary.tokens.index(END_OF_TEXT)

    def stream(held_out: bool) -> np.ndarray:
        ids = encode([f.text for f in files if f.held_out == held_out])
        return np.concatenate([np.asarray([*one, end], np.int32) for one in ids])

    spoken = encode([wrap(talk.question) + talk.answer + "<|im_end|>\n" for talk in talks])
    return Data(stream(False), stream(True), tuple(np.asarray([*one, end], np.int32) for one in spoken))


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the layers' matrices, Adam for embedding, norms and biases."""

    def schedule(rate: float) -> optax.Schedule:
        decay = int(steps * DECAY)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, rate, WARM_UP),
                optax.constant_schedule(rate),
                optax.linear_schedule(rate, 0.0, decay),
            ],
            [WARM_UP, steps - decay],
        )

    def kinds(weights: Weights) -> dict[str, str]:
        return {n: "matrix" if w.ndim == 2 and "layers" in n else "other" for n, w in weights.items()}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                "matrix": optax.contrib.muon(schedule(MATRIX_RATE), weight_decay=0.01),
                "other": optax.adam(schedule(OTHER_RATE), b2=0.95),
            },
            kinds,
        ),
    )


def mean_loss(weights: Weights, rows: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the next token, in nats."""
    predicted = logits(weights, rows[:, :-1], CONFIG)
    return optax.softmax_cross_entropy_with_integer_labels(predicted, rows[:, 1:]).mean()


def held_out_loss(weights: Weights, data: Data, rows: int = 32) -> float:
    """Over evenly spaced windows of the held-out text."""
    starts = np.linspace(0, len(data.held_out) - CONTEXT - 2, rows).astype(int)
    return float(_loss(weights, jnp.asarray(np.stack([data.held_out[s : s + CONTEXT + 1] for s in starts]))))


_loss = jax.jit(mean_loss)


def train(
    folder: Path, *, steps: int, seed: int, save_every: int, until: int | None = None
) -> Iterator[dict[str, float]]:
    """Trains up to `steps`, from the last saved step if there is one; yields a record per validation.

    With `until` it ends there, at a learning rate that still follows `steps`. A record's `seconds` count from the last
    start.
    """
    end = steps if until is None else min(until, steps)
    folder.mkdir(parents=True, exist_ok=True)
    files = sources()
    data = tokenized(files, conversations(files), folder)
    rule = optimizer(steps)
    weights = initial_weights(CONFIG, seed)
    state = rule.init(weights)
    step, weights, state = _resume(folder / "state.npz", weights, state)

    @jax.jit
    def advance(weights: Weights, state: optax.OptState, rows: jax.Array) -> tuple[Weights, optax.OptState, jax.Array]:
        loss, gradient = jax.value_and_grad(mean_loss)(weights, rows)
        change, state = rule.update(gradient, state, weights)
        return optax.apply_updates(weights, change), state, loss

    begun, losses = time.perf_counter(), []
    for now in range(step, end):
        weights, state, loss = advance(weights, state, jnp.asarray(data.batch(seed, now)))
        losses.append(float(loss))
        done = now + 1
        if done % VALIDATE_EVERY == 0 or done == end:
            yield {
                "step": done,
                "training_loss": float(np.mean(losses)),
                "held_out_loss": held_out_loss(weights, data),
                "tokens": done * ROWS * CONTEXT,
                "seconds": time.perf_counter() - begun,
            }
            losses = []
        if done % save_every == 0 or done == end:
            _save(folder / "state.npz", done, weights, state)


def _save(path: Path, step: int, weights: Weights, state: optax.OptState) -> None:
    leaves = jax.tree.leaves((weights, state))
    with atomic_file(path) as stream:
        np.savez(stream, step=step, **{f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)})


def _resume(path: Path, weights: Weights, state: optax.OptState) -> tuple[int, Weights, optax.OptState]:
    if not path.exists():
        return 0, weights, state
    saved = np.load(path)
    structure = jax.tree.structure((weights, state))
    leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(structure.num_leaves)]
    weights, state = jax.tree.unflatten(structure, leaves)
    return int(saved["step"]), weights, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where vocabulary, state and loss curve are kept")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--until", type=int, help="stop after this step, the learning rate being that of --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    given = parser.parse_args()
    records = train(given.folder, steps=given.steps, seed=given.seed, save_every=given.save_every, until=given.until)
    for record in records:
        print(json.dumps(record), flush=True)
        with (given.folder / "curve.jsonl").open("a") as curve:
            curve.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
