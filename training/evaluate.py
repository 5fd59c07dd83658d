"""Measures the embedded model as the file that it is: quantized, under llama.cpp's arithmetic.

    python training/evaluate.py out/embedded aprjax/assets/tiny-qwen2-q4_k.gguf --out training/results

Writes `quality.json` (perplexity on held-out files, share of trained questions answered to the letter, continuations
of simple Python, margins of the first answered token with and without ChatML), `margins.png` and `loss.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import GREETINGS, Conversation, conversations, digest, sources
from export import trained_weights
from train import CONTEXT, tokenized

import aprjax
from aprjax.qwen2.arithmetic import PRESETS
from aprjax.qwen2.batch import generate_batch
from aprjax.qwen2.model import Qwen2
from aprjax.text import Tokenizer
from aprjax.text.template import wrap

WINDOWS = 32  # of CONTEXT tokens: an eighth of the held-out text
STARTS = (
    "import os\nimport ",
    "def __init__(self, ",
    "    if not isinstance(",
    "for i in range(",
    "    raise ValueError(",
    "class Error(",
    'if __name__ == "__main__":\n',
    "    def __repr__(self):\n        return ",
)


def perplexity(model: Qwen2, held_out: np.ndarray) -> float:
    """Of every token but the first, over evenly spaced windows of the held-out files."""
    losses = []
    for start in np.linspace(0, len(held_out) - CONTEXT - 1, WINDOWS).astype(int):
        window = held_out[start : start + CONTEXT]
        logits = np.asarray(model(window.tolist()), np.float64)[:-1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        losses.append(-probabilities[np.arange(CONTEXT - 1), window[1:]].mean())
    return math.exp(float(np.mean(losses)))


def asked(talks: tuple[Conversation, ...]) -> list[Conversation]:
    """Every seventh question of those trained on, and all greetings."""
    return [*(Conversation(*pair) for pair in GREETINGS), *talks[len(GREETINGS) :: 7]]


def answers(model: Qwen2, tokenizer: Tokenizer, talks: list[Conversation]) -> list[dict[str, Any]]:
    """What the model answers in ChatML, beside what it was trained to."""
    prompts = [list(tokenizer.encode(wrap(talk.question), parse_special=True)) for talk in talks]
    given: list[dict[str, Any]] = []
    for first in range(0, len(prompts), 32):
        batch = prompts[first : first + 32]
        for talk, ids in zip(
            talks[first : first + 32],
            generate_batch(model, batch, max_new_tokens=64, stop_ids=frozenset(tokenizer.stop_ids)),
            strict=True,
        ):
            stopped = bool(ids) and ids[-1] in tokenizer.stop_ids
            answer = tokenizer.decode(ids[:-1] if stopped else ids)
            given.append({"question": talk.question, "answer": answer, "right": stopped and answer == talk.answer})
    return given


def margins(model: Qwen2, tokenizer: Tokenizer, talks: list[Conversation]) -> dict[str, list[float]]:
    """The gap between the two likeliest first tokens after each question, bare and in ChatML."""
    found: dict[str, list[float]] = {"none": [], "once": []}
    for talk in talks:
        for times, gaps in found.items():
            ids = list(tokenizer.encode(wrap(talk.question, times), parse_special=True))
            best = np.sort(np.asarray(model(ids)[-1]))[-2:]
            gaps.append(float(best[1] - best[0]))
    return found


def continuations(model: Qwen2, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Twenty greedy tokens after a few beginnings."""
    prompts = [list(tokenizer.encode(start, parse_special=False)) for start in STARTS]
    made = generate_batch(model, prompts, max_new_tokens=20, stop_ids=frozenset(tokenizer.stop_ids))
    return [{"start": s, "continuation": tokenizer.decode(ids)} for s, ids in zip(STARTS, made, strict=True)]


def plot(folder: Path, gaps: dict[str, list[float]], curve: list[dict[str, float]]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    bins = np.linspace(0, max(max(values) for values in gaps.values()), 30)
    for times, name in (("none", "direct"), ("once", "ChatML")):
        axes.hist(gaps[times], bins=bins, alpha=0.6, label=f"{name}: median {np.median(gaps[times]):.2f}")
    axes.set_xlabel("gap between the two likeliest first tokens (logits)")
    axes.set_ylabel("questions")
    axes.legend()
    figure.savefig(folder / "margins.png", dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    tokens = [record["tokens"] / 1e6 for record in curve]
    axes.plot(tokens, [record["training_loss"] for record in curve], label="training (a quarter conversations)")
    axes.plot(tokens, [record["held_out_loss"] for record in curve], label="held-out files")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument("model", type=Path, help="what export.py wrote")
    parser.add_argument("--out", type=Path, default=Path("training/results"))
    parser.add_argument("--seed", type=int, default=0, help="the one that train.py was given, for the record")
    given = parser.parse_args()
    files = sources()
    talks = conversations(files)
    data = tokenized(files, talks, given.folder)
    checkpoint = aprjax.open(given.model)
    model, tokenizer = Qwen2(checkpoint, PRESETS["llama.cpp"]), Tokenizer.from_checkpoint(checkpoint)
    curve = [json.loads(line) for line in (given.folder / "curve.jsonl").read_text().splitlines()]
    sample = asked(talks)
    gaps = margins(model, tokenizer, sample)
    answered = answers(model, tokenizer, sample)
    result = {
        "model": {"file": given.model.name, "sha256": checkpoint.sha256(), "bytes": given.model.stat().st_size},
        "steps": trained_weights(given.folder)[0],
        "seed": given.seed,
        "corpus": {"python": sys.version.split()[0], "files": len(files), "sha256": digest(files)},
        "held_out_tokens": WINDOWS * (CONTEXT - 1),
        "perplexity": perplexity(model, data.held_out),
        "perplexity_as_trained": math.exp(curve[-1]["held_out_loss"]),
        "questions": len(answered),
        "answered_to_the_letter": sum(one["right"] for one in answered),
        "margins": {
            name: {"median": float(np.median(v)), "below_half_a_logit": int(np.sum(np.asarray(v) < 0.5)), "all": v}
            for name, v in (("direct", gaps["none"]), ("chatml", gaps["once"]))
        },
        "continuations": continuations(model, tokenizer),
        "answers": answered,
        "curve": curve,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(given.out, gaps, curve)
    print(
        f"perplexity {result['perplexity']:.1f} (as trained {result['perplexity_as_trained']:.1f}), "
        f"{result['answered_to_the_letter']} of {result['questions']} questions answered to the letter, "
        f"median margin {np.median(gaps['none']):.2f} direct, {np.median(gaps['once']):.2f} ChatML"
    )


if __name__ == "__main__":
    main()
