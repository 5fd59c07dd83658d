"""`demo`: a fault planted in the embedded model, and what `layers` must say of it.

The faults are planted in memory, by the meaning of a tensor or a key and not by the code that looks for them; the
fault bench under `benchmarks/faults` plants in files, byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.assets import embedded_model
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.apr_writer import write_apr
from aprjax.checkpoint.types import Checkpoint
from aprjax.demo_fault import DemoFault
from aprjax.text.probes import Probe

# One question, asked directly and in ChatML: one that the model was trained on, and of 17 and 27 tokens, so that both
# are padded to 32 and share every compiled program. A test holds that.
QUESTION = "Write a Python function that computes the factorial of a number."
PROBES = (Probe("direct", QUESTION, "none"), Probe("chatml", QUESTION, "once"))
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Plan:
    """A fault and its consequence.

    Attributes:
        words: what is planted.
        plant: makes the faulty checkpoint of the sound one.
        site: layer and stage at which `layers` must find it; None where both sides must agree.
        probes: the probes that must diverge; the others must agree.
    """

    words: str
    plant: Callable[[Checkpoint], Checkpoint]
    site: tuple[int, str] | None
    probes: tuple[str, ...] = ("direct", "chatml")


def _swap(checkpoint: Checkpoint) -> Checkpoint:
    gate, up = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors = dict(checkpoint.tensors)
    tensors[gate], tensors[up] = replace(tensors[up], name=gate), replace(tensors[gate], name=up)
    return replace(checkpoint, tensors=tensors)


def _overwrite_row(checkpoint: Checkpoint) -> Checkpoint:
    assert checkpoint.vocabulary is not None
    tokens = checkpoint.vocabulary.tokens
    embedding = checkpoint.tensors[EMBEDDING]
    rows = np.array(embedding.data).reshape(len(tokens), -1)
    rows[tokens.index("<|im_start|>")] = rows[tokens.index("!")]
    tensors = {**checkpoint.tensors, embedding.name: replace(embedding, data=rows.reshape(-1))}
    return replace(checkpoint, tensors=tensors)


def _theta(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, config=replace(checkpoint.config, rope_theta=1e4))


PLANS = {
    DemoFault.GATE_UP_SWAPPED: Plan("layer 2's gate and up projections are exchanged", _swap, (2, "ffn_gate")),
    DemoFault.CHATML_ROW: Plan(
        "the embedding row of <|im_start|> holds another token's values, so only ChatML prompts suffer",
        _overwrite_row,
        (-1, "embedding"),
        ("chatml",),
    ),
    DemoFault.ROPE_THETA: Plan("rope_theta is 10,000 instead of 1,000,000", _theta, (0, "q_post_rope")),
    DemoFault.NONE: Plan("nothing, the model is only converted to .apr", lambda checkpoint: checkpoint, None, ()),
}


def prepare(fault: DemoFault, folder: Path) -> tuple[Path, Path]:
    """Writes the faulty model into `folder`; returns it and the embedded one.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    reference = embedded_model()
    sound = open_checkpoint(reference)
    faulty = PLANS[fault].plant(sound)
    # `.apr` files carry a head of their own: the sound embedding, whatever was done to the rows that are looked up.
    head = replace(sound.tensors[EMBEDDING], name="lm_head.weight")
    target = folder / ("sound.apr" if fault is DemoFault.NONE else "faulty.apr")
    write_apr(
        target,
        config=faulty.config,
        tensors=[*faulty.tensors.values(), head],
        vocabulary=faulty.vocabulary,
        chat_template=faulty.chat_template,
        tied_embeddings=faulty.tensors[EMBEDDING] is sound.tensors[EMBEDDING],
        allow_any_type=True,
    )
    return target, reference


def missed(fault: DemoFault, document: dict[str, Any]) -> tuple[str, ...]:
    """What the JSON of `layers` over both probes does not say as it was planted; empty where it found the fault."""
    plan = PLANS[fault]
    wrong = []
    for probe in document["probes"]:
        name = probe["prompt"]["name"]
        expected = plan.site if name in plan.probes else None
        first = probe["first_divergence"]
        found = (first["layer"], first["stage"]) if first else None
        if (probe["verdict"], found) != ("divergence" if expected else "agree", expected):
            wrong.append(f"{name}: {probe['verdict']} at {found} instead of {expected or 'agreement'}")
    return tuple(wrong)
