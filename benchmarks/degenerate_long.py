"""Texts of 512 tokens, as many as upstream's gate gave, and whether two arithmetics drift apart along them.

The part `long` of `degenerate_text.py`. Nothing ends these texts: stop tokens are written, and generation goes on. They
are llama.cpp's, run three ways that are all honest, and of files with noise on every block scale. Along the plain
engine's own text our two arithmetics are then run at once, so that each position has the whole text behind it: a drift
that adds up over the tokens would be larger at the end than at the beginning.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from greedy_texts import judged_text

TOKENS = 512
# Prefixes at which a text is judged.
JUDGED = (24, 96, 256, TOKENS)
NOISES = {f"noise of {size:.0%} on every scale": size for size in (0.03, 0.1, 0.2)}
# Positions that are summed up together.
WINDOW = 64
# Refused, and not by a rule of known false positives, or looping (`aprjax.bisect.chatml.judged.BAD`).
BAD = ("wrong", "loops", "degenerate")
# Characters of a text that the page shows.
SHOWN = 420
SOUND = "none: plain"
# Engine options by name; see `aprjax.trace.llama_cpp.LlamaOptions`. One thread: ggml's wait for each other by spinning,
# which on a machine that does other work as well takes longer than one alone.
ENGINES: dict[str, dict[str, Any]] = {
    SOUND: {},
    "none: float16 cache": {"type_k": "f16", "type_v": "f16"},
    "none: float16 cache, flash attention": {"type_k": "f16", "type_v": "f16", "flash_attention": True},
}
# What is measured, the most telling first.
ORDER = (
    ("text", SOUND),
    ("drift", "two-plus-two"),
    ("text", "noise of 10% on every scale"),
    ("text", "none: float16 cache, flash attention"),
    ("drift", "hello"),
    ("text", "noise of 20% on every scale"),
    ("text", "noise of 3% on every scale"),
    ("text", "none: float16 cache"),
)
Noise = Callable[[Any, float], Any]


def measure(model: str, names: Sequence[str], path: Path, noise: Noise, stop: Callable[[], bool]) -> None:
    """Measures what the file lacks, a text or a drift at a time, until it is time to stop."""
    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.fetch import fetch

    document = json.loads(path.read_text("ascii")) if path.exists() else {"model": model, "texts": [], "drift": []}
    file = open_checkpoint(fetch(model, None, lambda what, done, total: None))
    for kind, name in ORDER:
        if kind == "text" and name not in {row["fault"] for row in document["texts"]}:
            document["texts"] += text(file, names, name, noise)
        elif kind == "drift" and name not in {row["prompt"] for row in document["drift"]}:
            plain = next(row for row in document["texts"] if (row["fault"], row["prompt"]) == (SOUND, name))
            document["drift"].append(drift(file, plain))
        else:
            continue
        write(path, document)
        if stop():
            return


def write(path: Path, document: dict[str, Any]) -> None:
    """The JSON, a line for each text."""
    text = json.dumps(document, ensure_ascii=True)
    path.write_text(text.replace('{"fault": ', '\n{"fault": ').replace('{"prompt": ', '\n{"prompt": ') + "\n", "ascii")


def text(file: Any, names: Sequence[str], fault: str, noise: Noise) -> list[dict[str, Any]]:
    """The texts of one engine, or of one noise."""
    if fault in ENGINES:
        return generated(file, file.path, names, {"fault": fault, "noise": 0.0}, ENGINES[fault])
    size = NOISES[fault]
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        target = Path(folder) / "noisy.gguf"
        shutil.copyfile(file.path, target)
        noisy = noise(file, size)
        with target.open("r+b") as stream:
            for key, tensor in noisy.tensors.items():
                if tensor.data is not file.tensors[key].data:
                    stream.seek(tensor.offset)
                    stream.write(tensor.data.tobytes())
        return generated(file, target, names, {"fault": fault, "noise": size}, {})


def generated(
    file: Any, path: Path, names: Sequence[str], about: dict[str, Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """llama.cpp's greedy texts, judged at several lengths."""
    from aprjax.bisect.chatml.prompts import chosen_prompts
    from aprjax.text import Tokenizer
    from aprjax.trace.llama_cpp import LlamaOptions
    from aprjax.trace.llama_cpp_generate import generate_llama_cpp

    print(about["fault"], file=sys.stderr, flush=True)
    tokenizer, prompts = Tokenizer.from_checkpoint(file), chosen_prompts(names)
    ids = [list(tokenizer.encode(prompt.fed("once"))) for prompt in prompts]
    found = generate_llama_cpp(
        path, ids, max_new_tokens=TOKENS, ignore_stop=True, options=LlamaOptions(threads=1, **options)
    )
    rows = []
    for prompt, fed, run in zip(prompts, ids, found.runs, strict=True):
        tokens = [int(token) for token in run.tokens]
        rows.append(
            {
                **about,
                "engine": {
                    key: found.engine[key] for key in ("llama_cpp_python", "ggml_version") if key in found.engine
                },
                "prompt": prompt.name,
                "fed": fed,
                "tokens": tokens,
                **judged(tokenizer, tokens, prompt),
            }
        )
    return rows


def judged(tokenizer: Any, tokens: Sequence[int], prompt: Any) -> dict[str, Any]:
    """A text's beginnings as the gate and our measure of loops see them, special tokens written out, and left out."""
    from aprjax.bisect.chatml.facts import decode_text

    ends = [index for index, token in enumerate(tokens) if token in tokenizer.stop_ids]
    found = {}
    for count in JUDGED:
        kept = [token for token in tokens[:count] if token not in tokenizer.special_ids]
        written = judged_text(decode_text(tokenizer, tokens[:count]), tokens[:count], prompt, "once")
        found[str(count)] = written, judged_text(decode_text(tokenizer, kept), kept, prompt, "once")
    whole, plain = found[str(TOKENS)]
    return {
        "first_stop": ends[0] if ends else None,
        "states": {count: one["state"] for count, (one, _) in found.items()},
        "left_out": {count: one["state"] for count, (_, one) in found.items()},
        "gate": whole["gate"],
        "gate_left_out": plain["gate"],
        "repetition": whole["repetition"],
        "text": whole["text"],
    }


def drift(file: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Our two arithmetics along the engine's text: cosine by position, and where the engine's choice is another's."""
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.qwen2.model import Qwen2

    print(f"drift: {row['prompt']}", file=sys.stderr, flush=True)
    enable_compilation_cache()
    ids, first = [*row["fed"], *row["tokens"]], len(row["fed"]) - 1
    logits = {}
    for name in ("llama.cpp", "float32"):
        found = Qwen2(file, PRESETS[name])(ids[:-1])
        logits[name] = np.asarray(found)[first:].astype(np.float32)
    ours, other = logits["llama.cpp"], logits["float32"]
    dots = np.einsum("pv,pv->p", ours, other, dtype=np.float64)
    sizes = [np.sqrt(np.einsum("pv,pv->p", one, one, dtype=np.float64)) for one in (ours, other)]
    chosen = np.asarray(row["tokens"])
    top = np.partition(ours, -2, axis=1)[:, -2:]
    return {
        "prompt": row["prompt"],
        "cosine": [round(float(value), 7) for value in dots / sizes[0] / sizes[1]],
        "not_ours": [int(index) for index in np.flatnonzero(ours.argmax(axis=1) != chosen)],
        "not_float32": [int(index) for index in np.flatnonzero(other.argmax(axis=1) != chosen)],
        "margin": [round(float(value), 5) for value in top[:, 1] - top[:, 0]],
    }


def windows(cosines: Sequence[float]) -> list[tuple[int, float, float]]:
    """Begin, median and least of 1 - cosine, of each window."""
    found = []
    for begin in range(0, len(cosines), WINDOW):
        away = [1 - value for value in cosines[begin : begin + WINDOW]]
        found.append((begin, median(away), max(away)))
    return found


def section(document: dict[str, Any]) -> list[str]:
    """What the long texts say, for the page."""
    rows, sound = document["texts"], {r["prompt"]: r for r in document["texts"] if r["fault"] == SOUND}
    engine = " and ".join(f"{name.replace('_', '-')} {number}" for name, number in rows[0]["engine"].items())
    lines = [
        f"## {TOKENS} tokens that nothing ends",
        "",
        f"Greedy texts of llama.cpp ({engine}); stop tokens are written and passed over. The gate",
        "and our measure of loops judge the beginnings, special tokens written out as text / left out. A text parts",
        "from the plain engine's at the token named.",
        "",
        "| fault | prompt | first stop token | parts at | "
        + " | ".join(map(str, JUDGED))
        + " | the gate on all, written out |",
        "|---|---|---:|---:|" + "---|" * len(JUDGED) + "---|",
    ]
    for row in rows:
        at = parts_at(row["tokens"], sound[row["prompt"]]["tokens"])
        states = " | ".join(f"{row['states'][str(count)]} / {row['left_out'][str(count)]}" for count in JUDGED)
        refused = _escaped(row["gate"]["detail"]).replace("|", "\\|")
        lines.append(
            f"| {row['fault']} | {row['prompt']} | {_dash(row['first_stop'])} | {_dash(at)} | {states} | {refused} |"
        )
    for row in sound.values():
        lines += ["", f"The plain engine's first tokens of {row['prompt']}:", "", *_quoted(row["text"][:SHOWN])]
    lines += ["", *_drift_section(document["drift"])]
    return lines


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii").replace("\\\\", "\\")


def _quoted(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in text.split("\n")]


def _drift_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "Along the plain engine's texts, our arithmetics `llama.cpp` and `float32`, each position with the whole text",
        "behind it: how far the cosine of their logits falls short of 1, as median and most of a window of positions.",
        "",
        "| positions | " + " | ".join(f"{row['prompt']}, median | most" for row in rows) + " |",
        "|---|" + "---:|---:|" * len(rows),
    ]
    for parts in zip(*(windows(row["cosine"]) for row in rows), strict=True):
        begin = parts[0][0]
        cells = " | ".join(f"{middle:.1e} | {most:.1e}" for _, middle, most in parts)
        lines.append(f"| {begin} to {begin + WINDOW - 1} | {cells} |")
    for row in rows:
        near = [row["margin"][index] for index in row["not_float32"]]
        rest = f", which it leaves where its margin is {max(near):.3f} logits at most" if near else ""
        lines += [
            "",
            f"{row['prompt']}: the engine's choice is that of our `llama.cpp` at "
            f"{TOKENS - len(row['not_ours'])} of {TOKENS} positions, and that of `float32` at "
            f"{TOKENS - len(row['not_float32'])}{rest}.",
        ]
    return [*lines, ""]


def findings(document: dict[str, Any]) -> list[str]:
    """The answer in a few lines."""
    lines = []
    honest = [row for row in document["texts"] if not row["noise"]]
    ends = [row["first_stop"] for row in honest if row["first_stop"] is not None]
    loops = sum(row["repetition"]["grade"] == "degenerate" for row in honest)
    lines.append(
        f"- **{TOKENS} tokens, nothing planted**, stop tokens passed over: of {len(honest)} texts of llama.cpp the "
        f"gate refuses {_counted(honest, 'states')} tokens where special tokens are written out, and "
        f"{_counted(honest, 'left_out')} where they are left out; {loops} end in a loop. {len(ends)} of {len(honest)} "
        f"first write a stop token, at {max(ends)} at the latest."
    )
    last = str(TOKENS)
    both = [r for r in honest if r["states"][last] in BAD and r["left_out"][last] not in BAD]
    if both:
        told = "; ".join(dict.fromkeys(f"{r['prompt']}: {_escaped(r['gate']['detail'])}" for r in both))
        lines.append(
            "- **So a sound model on a sound engine gives a refused text** where two things come together: nothing "
            f"stops it, and special tokens are written out ({told}). Neither alone does, and no drift is needed."
        )
    for size in dict.fromkeys(row["noise"] for row in document["texts"] if row["noise"]):
        rows = [row for row in document["texts"] if row["noise"] == size]
        lines.append(
            f"- **{TOKENS} tokens, noise of {size:.0%} on every scale**: of {len(rows)} texts the gate refuses "
            f"{_counted(rows, 'states')} tokens, and with special tokens left out {_counted(rows, 'left_out')}."
        )
    for row in document["drift"]:
        parts = windows(row["cosine"])
        lines.append(
            f"- **Drift along {row['prompt']}**: the median cosine of the two arithmetics' logits falls short of 1 by "
            f"{parts[0][1]:.1e} over the first {WINDOW} tokens and by {parts[-1][1]:.1e} over the last {WINDOW}."
        )
    if not document["drift"]:
        lines.append("- Not measured: how far two arithmetics drift apart along such a text (`--part long` goes on).")
    return lines


def _counted(rows: Sequence[dict[str, Any]], key: str) -> str:
    """`0 within 24, 1 within 96`: without what a rule of known false positives refuses."""
    bad = {count: sum(row[key][str(count)] in BAD for row in rows) for count in JUDGED}
    return ", ".join(f"{number} within {count}" for count, number in bad.items())


def parts_at(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first token in which two texts differ; None where none does."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def _dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def until(minutes: float) -> Callable[[], bool]:
    """Whether so many minutes are over."""
    end = time.monotonic() + 60 * minutes
    return lambda: time.monotonic() > end
