r"""What makes a text degenerate: drift, special tokens, double wrapping or missing stop tokens, as evidence.

    python benchmarks/degenerate_text.py [--model qwen2.5-coder-1.5b] --out evidence/degenerate-text-DATE

Upstream's golden gate once refused "\ns\ns" (contracts.md section 0, item 5), and four explanations were never told
apart. Two measurements do: the factorial of `python -m bisect chatml` on the sound pair (every factor varied alone),
and a fault planted per factor: no stop tokens, special tokens' rows overwritten, the prompt wrapped twice, and a drift
of growing size, as noise on every block scale of the layers. Faults are planted here, by code that knows nothing of
what judges the texts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from degenerate_long import findings, measure, section, until
from greedy_texts import greedy_texts, shown, state_picture

PROMPTS = ("two-plus-two", "hello")
ARITHMETICS = ("llama.cpp", "float32")
ARITHMETIC = ARITHMETICS[0]
BUDGET = 24
# Of the text that nothing ends; upstream's golden gate gave more (contracts.md section 0, item 5).
BEYOND, GATE_BUDGET = 96, 512
DRIFTS = (0.1, 0.3)
SPECIAL = ("<|im_start|>", "<|im_end|>")
# What the gate lets pass and does not loop; `flagged` is refused by a rule that has false positives.
SOUND = ("clean",)
# Bytes of the float16 scales of a block (`aprjax.blocks.k_quants`): what a drift is planted into.
_SCALES = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,)), "Q5_K": (176, (0, 2)), "Q5_0": (22, (0,)), "Q8_0": (34, (0,))}


def main() -> int:
    """Measures what is missing in the folder, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--out", type=Path, required=True)
    parts = ("factorial", "planted", "long", "page")
    parser.add_argument("--part", choices=parts, help="Only this; the others are kept.")
    parser.add_argument("--beyond", type=int, default=BEYOND, help="Tokens of the texts that nothing ends.")
    parser.add_argument("--minutes", type=float, default=1e9, help="Stop `long` then; the same command goes on.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part in (None, "factorial"):
        write(options.out / "factorial.json", factorial(options.model))
    if options.part in (None, "planted"):
        # Faults that the file has are not run again: an interrupted measurement goes on.
        path = options.out / "planted.json"
        rows = json.loads(path.read_text("ascii"))["rows"] if path.exists() else []
        for fault in planted(options.model, {row["fault"] for row in rows}, options.beyond):
            rows += fault
            write(path, {"model": options.model, "rows": rows})
    if options.part in (None, "long"):
        measure(options.model, PROMPTS, options.out / "long.json", with_noise, until(options.minutes))
    if options.part in (None, "page"):
        documents = found_in(options.out)
        (options.out / "README.md").write_text(readme(documents, options.out.name), encoding="utf-8")
        with (options.out / "result.png").open("wb") as target:
            save_plot(documents, target)
    return 0


def write(path: Path, document: dict[str, Any]) -> None:
    """The JSON, a line for each text."""
    text = json.dumps(document, ensure_ascii=True)
    for key in ("side", "fault"):
        text = text.replace(f'{{"{key}": ', f'\n{{"{key}": ')
    path.write_text(text + "\n", encoding="ascii")


def found_in(folder: Path) -> dict[str, Any]:
    """The measurements of a folder; the factorial and the long texts may not be there."""
    paths = {name: folder / f"{name}.json" for name in ("factorial", "planted", "long")}
    return {name: json.loads(path.read_text("ascii")) for name, path in paths.items() if path.exists()}


def factorial(model: str) -> dict[str, Any]:
    """`python -m bisect chatml` on the model and its conversion to `.apr`."""
    from aprjax.checkpoint.convert import convert
    from aprjax.checkpoint.fetch import fetch

    with tempfile.TemporaryDirectory(prefix="aprjax-") as name:
        folder = Path(name)
        (folder / "B.gguf").symlink_to(Path(fetch(model, None, lambda what, done, total: None)).resolve())
        convert(folder / "B.gguf", folder / "A.apr")
        asked = ["--prompts", ",".join(PROMPTS), "--arithmetics", ",".join(ARITHMETICS)]
        asked += ["--max-new-tokens", str(BUDGET), "--no-noise"]
        command = [sys.executable, "-m", "aprjax", "chatml", "--model", "A.apr", "--ref", "B.gguf", *asked]
        root = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        run = subprocess.run(
            [*command, "--json", "-"], cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=-1, check=False
        )
    if run.returncode not in (0, 1, 3):
        raise SystemExit(f"error: chatml ended with exit code {run.returncode}")
    return {"command": "chatml --model A.apr --ref B.gguf " + " ".join(asked), **json.loads(run.stdout)}


def planted(model: str, done: set[str], beyond: int) -> Iterator[list[dict[str, Any]]]:
    """The texts of every fault that is not done, and how far the first logits of the first prompt move."""
    from aprjax.bisect.chatml.prompts import chosen_prompts
    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.fetch import fetch
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.qwen2.model import Qwen2
    from aprjax.text import Tokenizer

    enable_compilation_cache()
    sound = open_checkpoint(fetch(model, None, lambda what, done, total: None))
    tokenizer = Tokenizer.from_checkpoint(sound)
    ids = list(tokenizer.encode(chosen_prompts(PROMPTS[:1])[0].fed("once")))
    loaded = Qwen2(sound, PRESETS[ARITHMETIC])
    first = np.asarray(loaded(ids)[-1], float)
    for factor, fault, plant, wrap, stop, budget in faults(tokenizer, beyond):
        if fault in done:
            continue
        print(f"{factor}: {fault}", file=sys.stderr, flush=True)
        runner = loaded if plant is None else Qwen2(plant(sound), PRESETS[ARITHMETIC])
        logits = np.asarray(runner(ids)[-1], float)
        about = {
            "fault": fault,
            "factor": factor,
            "stop": "on" if stop else "off",
            "budget": budget,
            "logits_cosine": float(logits @ first / np.linalg.norm(logits) / np.linalg.norm(first)),
            "same_first_token": bool(logits.argmax() == first.argmax()),
        }
        asked = [(name, wrap) for name in PROMPTS]
        yield [{**about, **row} for row in greedy_texts(runner, asked, budget=budget, stop=stop)]


def faults(tokenizer: Any, beyond: int) -> Iterator[tuple[str, str, Callable[[Any], Any] | None, str, bool, int]]:
    """Factor, fault, what it does to the file if anything, the wrap, whether stop tokens end it, and the budget."""
    start, end = (next(iter(tokenizer.encode(text))) for text in SPECIAL)
    yield "none", "none", None, "once", True, BUDGET
    yield "double wrapping", "wrapped twice", None, "twice", True, BUDGET
    yield "stop tokens", "none ends the text", None, "once", False, beyond
    rows = {"rows zeroed": (start, None), "row of another token": (start, 42)}
    for name, (at, other) in rows.items():

        def special(checkpoint: Any, at: int = at, other: int | None = other) -> Any:
            return with_rows(checkpoint, at, other, end)

        yield "special tokens", name, special, "once", True, BUDGET
    for size in DRIFTS:

        def drift(checkpoint: Any, size: float = size) -> Any:
            return with_noise(checkpoint, size)

        yield "drift", f"noise of {size:.0%} on every scale", drift, "once", True, BUDGET


def with_rows(checkpoint: Any, at: int, other: int | None, end: int) -> Any:
    """Embedding rows of both special tokens zeroed, exchanged, or that of the first overwritten by another's.

    Where the head is the embedding, its rows change with it.
    """
    name = "model.embed_tokens.weight"
    tensor = checkpoint.tensors[name]
    data = tensor.data.copy().reshape(tensor.shape[0], -1)
    if other is None:
        data[[at, end]] = 0
    elif other == end:
        data[[at, end]] = data[[end, at]]
    else:
        data[at] = data[other]
    return replace(checkpoint, tensors={**checkpoint.tensors, name: replace(tensor, data=data.reshape(-1))})


def with_noise(checkpoint: Any, size: float) -> Any:
    """Every float16 scale of the layers' matrices times 1 + size * normal noise."""
    random = np.random.default_rng(61)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.block_type not in _SCALES or ".layers." not in name:
            tensors[name] = tensor
            continue
        width, places = _SCALES[tensor.block_type]
        blocks = tensor.data.copy().reshape(-1, width)
        for place in places:
            scales = np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2")
            noisy = scales * (1 + size * random.standard_normal(scales.shape, np.float32))
            blocks[:, place : place + 2] = noisy.astype("<f2").view(np.uint8)
        tensors[name] = replace(tensor, data=blocks.reshape(-1))
    return replace(checkpoint, tensors=tensors)


def readme(documents: dict[str, Any], folder: str) -> str:
    """What the JSON says."""
    table, rows = documents.get("factorial"), documents["planted"]["rows"]
    lines = [
        "# What makes a text degenerate",
        "",
        f"    python benchmarks/degenerate_text.py --out evidence/{folder}",
        "",
        f"writes {', '.join(f'[{name}.json]({name}.json)' for name in documents)}, [result.png](result.png)",
        "and this page, which is made of the JSON (`tests/evidence/test_answers_evidence.py` holds that).",
        "",
        f"{documents['planted']['model']}, greedy, `{ARITHMETIC}` arithmetic. Prompts: {', '.join(PROMPTS)},",
        "upstream's old golden cases, in ChatML.",
        "",
        "## The answer",
        "",
        *answer(documents),
        "",
        "![State of every text, by planted fault](result.png)",
        "",
        *([] if table is None else sound_pair(table)),
        "## A fault planted per factor",
        "",
        "The cosine is that of the logits after the first prompt with those of the sound run: how large the fault is.",
        "",
        "| factor | fault | stop | cosine | prompt | tokens | ended | state | gate | text |",
        "|---|---|---|---:|---|---:|---|---|---|---|",
    ]
    for row in rows:
        ended = "stop token" if row["stopped"] else "budget"
        lines.append(
            f"| {row['factor']} | {row['fault']} | {row['stop']} | {row['logits_cosine']:.4f} | {row['prompt']} | "
            f"{len(row['tokens'])} | {ended} | {row['state']} | {row['gate']['rule'] or 'passes'} | "
            f"{shown(row['text'])} |"
        )
    if "long" in documents:
        lines += ["", *section(documents["long"])[:-1]]
    return "\n".join([*lines, "", *carries_over()]) + "\n"


def sound_pair(table: dict[str, Any]) -> list[str]:
    """What `chatml` says of the pair without a fault."""
    return [
        "## The sound pair: every factor alone",
        "",
        f"`{table['command']}`: verdict **{table['verdict']}**, {len(table['cells'])} cells, on {table['backend']}.",
        f"The reference is SHA-256 `{table['sides']['ref']['sha256']}`, the model its conversion to `.apr`.",
        "",
        "| claim | verdict | reason |",
        "|---|---|---|",
        *(f"| {claim['claim']} | {claim['verdict']} | {claim['reason']} |" for claim in table["claims"]),
        "",
    ]


def answer(documents: dict[str, Any]) -> list[str]:
    """One line for each factor: what its planted fault does, and that the sound pair has none of it."""
    rows = documents["planted"]["rows"]
    table = documents.get("factorial")
    lines = []
    if table is not None:
        bad = [cell for cell in table["cells"] if cell["state"] not in SOUND]
        lines.append(f"- **Sound pair**: {len(bad)} of {len(table['cells'])} cells refused or looping.")
    for factor in dict.fromkeys(row["factor"] for row in rows if row["factor"] != "none"):
        of_factor = [row for row in rows if row["factor"] == factor]
        hit = [row for row in of_factor if row["state"] not in SOUND]
        names = ", ".join(dict.fromkeys(row["fault"] for row in hit))
        verdict = f"reproduces a bad text ({names})" if hit else "does not reproduce one"
        tokens = max(row["budget"] for row in of_factor)
        lines.append(
            f"- **{factor[0].upper()}{factor[1:]}** {verdict}: {len(hit)} of {len(of_factor)} texts refused by the "
            f"gate or looping, within {tokens} tokens."
        )
        if factor == "stop tokens" and "long" in documents:
            lines += findings(documents["long"])
    drifts = [row for row in rows if row["factor"] == "drift"]
    sound = [row for row in drifts if row["state"] in SOUND]
    if sound and len(sound) < len(drifts):
        least = min(row["logits_cosine"] for row in sound)
        most = max(row["logits_cosine"] for row in drifts if row["state"] not in SOUND)
        lines.append(
            f"- Texts under drift are sound down to a cosine of {least:.4f} of the first logits; the first bad one has "
            f"{most:.4f}."
        )
    honest = [] if table is None else [pair["cosine"] for pair in table["first_logits"]]
    if honest:
        lines.append(f"- Two honest arithmetics of one file have a cosine of {min(honest):.6f} or more there.")
    if table is None:
        lines.append("- Not measured: the factorial of `chatml` on the sound pair (`--part factorial`).")
    if "long" not in documents and rows and max(row["budget"] for row in rows) < GATE_BUDGET:
        lines.append(
            f"- Not measured: what follows up to the {GATE_BUDGET} tokens that upstream's gate gave (`--beyond`)."
        )
    return lines


def carries_over() -> list[str]:
    """What the 1.5B says of the 7B."""
    return [
        "## What carries over to the 7B, and what does not",
        "",
        "- The method carries over: each factor's fault is planted alone, and the same gate judges.",
        "- That a text without stop tokens runs on after its end carries over: nothing in a model ends it. What it",
        "  then writes is another model's text, and may loop sooner or later than here.",
        "- The cosines at which texts break do not carry over: they hang on this model's margins. No 7B was run here.",
        "- What upstream's own legacy path did cannot be run here; that it had no stop tokens is read from its source.",
    ]


def save_plot(documents: dict[str, Any], target: Any) -> None:
    """Writes the plot as PNG: one square per planted text."""
    state_picture(
        documents["planted"]["rows"],
        lambda row: f"{row['factor']}: {row['fault']}",
        lambda row: row["prompt"],
        f"{documents['planted']['model']}: texts under planted faults",
        target,
    )


if __name__ == "__main__":
    sys.exit(main())
