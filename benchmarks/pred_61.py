"""PRED-61-A and PRED-61-B with one backend for both formats, as evidence.

    python benchmarks/pred_61.py [--model qwen2.5-coder-1.5b] --out evidence/pred-61-DATE

Upstream (contracts.md section 4) predicted A: a GGUF with a ChatML prompt answers cleanly, and found "ampiezza"; and
B: an APR with the prompt "What is 2+2? The answer is " answers cleanly, and found "4". Its raw logs have A on wgpu and
B on a CPU. Here every prompt of both is run from both formats, on one backend in one process: each prediction by the
format that it names, and by the other one. A prompt is fed as it was meant and as `apr run` fed it, wrapped once more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

# The budget of `apr run` (contracts.md section 8).
BUDGET = 32
ARITHMETICS = ("llama.cpp",)
# What upstream asked of each: the format, the prompts, and how they were wrapped: as meant, and as `apr run` fed them.
PREDICTIONS: dict[str, dict[str, Any]] = {
    "PRED-61-A": {
        "format": "gguf",
        "prompts": ("two-plus-two", "hello", "my-name-is"),
        "wraps": ("once", "twice"),
        "upstream": "red: three texts of “ampiezza”",
    },
    "PRED-61-B": {
        "format": "apr",
        "prompts": ("the-answer-is",),
        "wraps": ("none", "once"),
        "upstream": "green: “4”",
    },
}
CLEAN = ("clean",)


def main() -> int:
    """Runs both formats and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from greedy_texts import greedy_texts

    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.convert import convert
    from aprjax.checkpoint.fetch import fetch
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.qwen2.model import Qwen2
    from aprjax.trace.trace import this_platform

    enable_compilation_cache()
    asked = [(name, wrap) for p in PREDICTIONS.values() for name in p["prompts"] for wrap in p["wraps"]]
    rows, files = [], {}
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        gguf = Path(fetch(options.model, None, lambda what, done, total: None))
        apr = Path(folder) / "A.apr"
        convert(gguf, apr)
        for path in (gguf, apr):
            checkpoint = open_checkpoint(path)
            files[checkpoint.format] = checkpoint.sha256()
            for arithmetic in ARITHMETICS:
                texts = greedy_texts(Qwen2(checkpoint, PRESETS[arithmetic]), asked, budget=BUDGET)
                rows += [{"format": checkpoint.format, "arithmetic": arithmetic, **row} for row in texts]
    document = {
        "schema": "aprjax.pred-61/1",
        "command": f"python benchmarks/pred_61.py --out evidence/{options.out.name}",
        "model": options.model,
        "files": files,
        "backend": this_platform(),
        "budget": BUDGET,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=True).replace('{"format": ', '\n{"format": ')
    (options.out / "result.json").write_text(text + "\n", encoding="ascii")
    (options.out / "README.md").write_text(readme(document), encoding="utf-8")
    with (options.out / "result.png").open("wb") as target:
        save_plot(document, target)
    return 0


def of_prediction(document: dict[str, Any], name: str, kind: str) -> list[dict[str, Any]]:
    """The rows of a prediction's prompts, from files of one format."""
    asked = PREDICTIONS[name]
    return [
        row
        for row in document["rows"]
        if row["format"] == kind and row["prompt"] in asked["prompts"] and row["wrap"] in asked["wraps"]
    ]


def verdict(rows: list[dict[str, Any]]) -> str:
    """Green where every text is clean, red where one is not."""
    return "green" if all(row["state"] in CLEAN for row in rows) else "red"


def unequal(document: dict[str, Any]) -> int:
    """How many texts differ between the formats, token by token, all else equal."""
    by_key: dict[tuple[str, ...], list[list[int]]] = {}
    for row in document["rows"]:
        by_key.setdefault((row["arithmetic"], row["prompt"], row["wrap"]), []).append(row["tokens"])
    return sum(any(tokens != all_[0] for tokens in all_) for all_ in by_key.values())


def readme(document: dict[str, Any]) -> str:
    """What the JSON says."""
    lines = [
        "# PRED-61-A and PRED-61-B at equal backend",
        "",
        f"    {document['command']}",
        "",
        "writes [result.json](result.json), [result.png](result.png) and this page, which is made of the JSON",
        "(`tests/evidence/test_answers_evidence.py` holds that).",
        "",
        f"{document['model']}: the GGUF file, SHA-256 `{document['files']['gguf']}`, and the APR file that",
        f"`python -m aprjax convert` makes of it, `{document['files']['apr']}`. One backend for both:",
        f"{document['backend']}. Greedy, {document['budget']} tokens, stop tokens on. “Green” is what",
        "upstream asks: the golden gate lets the text pass, and a wrapped prompt's answer has an expected word;",
        "beside it our own measure sees no loop.",
        "",
        "| prediction | upstream | here, the format it names | the other format |",
        "|---|---|---|---|",
    ]
    for name, asked in PREDICTIONS.items():
        cells = []
        for kind in (asked["format"], "apr" if asked["format"] == "gguf" else "gguf"):
            rows = of_prediction(document, name, kind)
            clean = sum(row["state"] in CLEAN for row in rows)
            cells.append(f"**{verdict(rows)}** ({kind}: {clean} of {len(rows)} texts clean)")
        lines.append(f"| {name} | {asked['upstream']} | {cells[0]} | {cells[1]} |")
    different = unequal(document)
    pairs = len(document["rows"]) // 2
    lines += [
        "",
        f"Of {pairs} pairs of texts that differ in the format alone, {different} differ in a token. Upstream compared",
        "two backends, not two formats.",
        "",
        "![State of every text, by format, arithmetic and prompt](result.png)",
        "",
        "| prompt | wrap | arithmetic | format | state | ended | text |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        ended = "stop token" if row["stopped"] else "budget"
        lines.append(
            f"| {row['prompt']} | {row['wrap']} | {row['arithmetic']} | {row['format']} | {row['state']} | {ended} | "
            f"{shown(row['text'])} |"
        )
    lines += [
        "",
        "## What carries over to the 7B, and what does not",
        "",
        "- That the format decides nothing carries over: both files hold the same bytes of weights and the same ids,",
        "  whatever the size of the model, and the program is one.",
        "- The texts do not: another model writes others. Which prompts are green on the 7B was not run here.",
        "- Nothing is said of wgpu, whose fault upstream records as open: no GPU was used.",
    ]
    return "\n".join(lines) + "\n"


def shown(text: str, most: int = 60) -> str:
    """The beginning of a text in a table's cell, escaped."""
    cut = text[:most].encode("unicode_escape").decode("ascii").replace("|", "\\|").replace("`", "'")
    return f"`{cut}{'…' if len(text) > most else ''}`" if cut else ""


def save_plot(document: dict[str, Any], target: Any) -> None:
    """Writes the plot as PNG: one square per text."""
    from greedy_texts import state_picture

    state_picture(
        document["rows"],
        lambda row: f"{row['prompt']}, wrapped {row['wrap']}",
        lambda row: f"{row['format']} {row['arithmetic']}",
        f"{document['model']}, one backend: {document['backend']}",
        target,
    )


if __name__ == "__main__":
    sys.exit(main())
