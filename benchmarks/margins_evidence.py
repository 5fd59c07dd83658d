"""Margins of a real pair under equal and under two arithmetics, as evidence.

    python benchmarks/margins_evidence.py [--model qwen2.5-coder-1.5b] --out evidence/margins-DATE

Converts the model to `.apr` and runs `python -m bisect margins` four times: a direct and a ChatML prompt, 128 tokens
that the reference chooses greedily, first `float32` against `llama.cpp` arithmetic, then `llama.cpp` on both sides.
Why position 0 flips is asked of `python -m bisect attribute`. It writes each run's JSON as the command gave it, and a
README whose every number comes from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NEW_TOKENS = 128
PROMPTS: dict[str, tuple[str, ...]] = {
    "direct": ("--prompt", "def fib(n):"),
    "chatml": (
        "--prompt",
        "Write a Python function that returns the n-th Fibonacci number, and explain it.",
        "--wrap",
        "once",
    ),
}


def main() -> int:
    """Runs the four comparisons and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from aprjax.checkpoint.convert import convert
    from aprjax.checkpoint.fetch import fetch

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aprjax-") as name:
        folder = Path(name)
        (folder / "B.gguf").symlink_to(Path(fetch(options.model, None, lambda what, done, total: None)).resolve())
        convert(folder / "B.gguf", folder / "A.apr")
        for prompt, asked in PROMPTS.items():
            mixed = margins(folder, [*asked, *TWO, "--generate", str(NEW_TOKENS)])
            write(options.out / f"{prompt}-two-arithmetics.json", mixed)
            chosen = ",".join(map(str, mixed["fed"]["continuation"]))
            equal = margins(folder, [*asked, *ONE, "--continuation-tokens", chosen, "--no-noise"])
            write(options.out / f"{prompt}-equal-arithmetic.json", equal)
        write(options.out / f"{CAUSE}.json", cause(folder))
    (options.out / "README.md").write_text(readme(found_in(options.out)), encoding="utf-8")
    return 0


TWO = ("--model-arithmetic", "float32", "--ref-arithmetic", "llama.cpp")
ONE = ("--arithmetic", "llama.cpp")


# The run that says why position 0 flips, and the contributions of it that the README shows.
CAUSE = "direct-position-0"
SHOWN = 8
# Made by `recheck_evidence.py`; may not be there.
RECHECK = "recheck"


def cause(folder: Path) -> dict[str, Any]:
    """What makes the direct prompt's position 0 flip: one file's drift of arithmetic, shared out over its stages."""
    asked = [*PROMPTS["direct"], "--model-arithmetic", "llama.cpp", "--ref-arithmetic", "float32"]
    return run_command(folder, "attribute", "B.gguf", [*asked, "--positions", "0..0", "--steps", "16", "--verify", "3"])


def margins(folder: Path, options: list[str]) -> dict[str, Any]:
    """One run of `margins` on the pair."""
    return run_command(folder, "margins", "A.apr", options)


def run_command(folder: Path, name: str, model: str, options: list[str]) -> dict[str, Any]:
    """One run of a command, from inside `folder`, so that the report names the files and no machine's paths."""
    root = Path(__file__).resolve().parent.parent
    sides = ["--model", model, "--ref", "B.gguf"]
    command = [sys.executable, "-m", "aprjax", name, *sides, *options, "--json", "-"]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=False
    )
    # 1 is a verdict: the two arithmetics part at position 0.
    if run.returncode not in (0, 1):
        raise SystemExit(f"error: {name} ended with exit code {run.returncode}")
    return {"command": " ".join(options), "exit_code": run.returncode, **json.loads(run.stdout)}


def write(path: Path, document: dict[str, Any]) -> None:
    """The run's JSON, a line for each position."""
    text = json.dumps(document, ensure_ascii=True)
    path.write_text(text.replace('{"chunk": ', '\n{"chunk": ') + "\n", encoding="utf-8")


def found_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs of a folder by name, in the order of the README."""
    names = [f"{prompt}-{kind}" for prompt in PROMPTS for kind in ("equal-arithmetic", "two-arithmetics")] + [CAUSE]
    names += [RECHECK] if (folder / f"{RECHECK}.json").exists() else []
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def readme(runs: dict[str, dict[str, Any]]) -> str:
    """What the JSON files say."""
    first = next(iter(runs.values()))
    lines = [
        "# Margins of a real pair",
        "",
        "`python benchmarks/margins_evidence.py --out` (this folder) writes it; every number is from the JSON files.",
        "",
        f"`B.gguf` is the official file, SHA-256 `{first['sides']['ref']['sha256']}`; `A.apr` is made of it by",
        f"`python -m aprjax convert`, SHA-256 `{first['sides']['model']['sha256']}`.",
        "",
        "Under two arithmetics position 0 parts. No fault of the files is the cause: under one arithmetic",
        "they agree to the bit. The last section has the cause: the inputs of layer 26's feed-forward, where",
        "a massive activation shares a Q8_K block with 255 small ones (`evidence/massive-activation-2026-11-23`).",
    ]
    for name, run in runs.items():
        if name == CAUSE:
            lines += ["", *section_of_cause(run)]
            continue
        if name == RECHECK:
            lines += ["", *section_of_recheck(run)]
            continue
        lines += ["", f"## {name.replace('-', ' ')}", "", f"`margins --model A.apr --ref B.gguf {short(run)}`", ""]
        lines += [f"Exit code {run['exit_code']}, **{run['verdict']}**: {run['reason']}.", ""]
        fed = run["fed"]
        lines.append(f"{len(fed['prompt'])} prompt tokens and {len(fed['continuation'])} of the continuation.")
        lines += ["", *table_of_summary(run)]
        if run["noise"] is not None:
            lines += ["", *table_of_noise(run["noise"]), "", *table_of_flips(run), "", *table_of_bounds(run)]
        lines += [f"\nFinding: {f['message']}." for f in run["findings"] if f["id"] == "drift-beyond-noise"]
    return "\n".join(lines).rstrip() + "\n"


def short(run: dict[str, Any]) -> str:
    """The options without 128 token ids."""
    words = run["command"].split(" ")
    return " ".join("…" if word.count(",") > 8 else word for word in words)


def table_of_summary(run: dict[str, Any]) -> list[str]:
    """One row, as llama.cpp's KL-divergence table has it."""
    summary, kl = run["summary"], run["summary"]["kl"]
    row = (
        f"| {summary['positions']} | {kl['mean']:.2e} | {kl['median']:.2e} | {kl['percent_99']:.2e} | "
        f"{kl['maximum']:.2e} | {summary['same_top']:.2%} | {summary['model_perplexity']:.5f} | "
        f"{summary['ref_perplexity']:.5f} |"
    )
    head = "| positions | KL mean | median | 99 % | max | same top-1 | perplexity, model | ref |"
    return [head, "|---:|---:|---:|---:|---:|---:|---:|---:|", row]


def table_of_noise(noise: dict[str, Any]) -> list[str]:
    """Sigma, and what each change came to."""
    lines = [
        f"Sigma {noise['sigma']:.4f} logits; a gap is put down to noise up to {noise['near_tie_gap']:.3f}.",
        "",
        "| change | side | sigma | of all tokens | of the top-2 gap | flips |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for change in noise["changes"]:
        flips = f"{change['flips']} of {change['positions']}"
        lines.append(
            f"| {change['change']} | {change['side']}, {change['arithmetic']} | {change['sigma']:.2e} | "
            f"{change['sigma_vocabulary']:.2e} | {change['sigma_top2']:.2e} | {flips} |"
        )
    return lines


def table_of_flips(run: dict[str, Any]) -> list[str]:
    """Every flip, with its gaps in logits and in sigma."""
    flips = [row for row in run["tokens"] if row["flip"]]
    if not flips:
        return ["No flip."]
    lines = [
        "| flip at | fed | ref | model | ref's gap | model's gap | widest in sigma | rank | verdict |",
        "|---:|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in flips:
        words = " | ".join(code(row[key]) for key in ("text", "ref_text", "model_text"))
        lines.append(
            f"| {row['position']} | {words} | {row['gap']:.3f} | {row['model_gap']:.3f} | {row['gap_sigmas']:.2f} | "
            f"{row['rank']} | {row['verdict']} |"
        )
    return lines


def table_of_bounds(run: dict[str, Any]) -> list[str]:
    """How many flips were foreseen."""
    lines = ["| foreseen by | reach | listed | flips | of them listed |", "|---|---:|---:|---:|---:|"]
    for bound in run["flip_bounds"]:
        listed = len(bound["listed"])
        lines.append(f"| {bound['source']} | {bound['reach']:.3f} | {listed} | {bound['flips']} | {bound['caught']} |")
    return lines


def section_of_cause(run: dict[str, Any]) -> list[str]:
    """The largest shares of the margin's change at position 0, and the real runs that check them."""
    metric = run["metric"]
    lines = [
        "## why the direct prompt's position 0 flips",
        "",
        f"`attribute --model B.gguf --ref B.gguf {run['command']}`",
        "",
        f"The margin of token {metric['chosen'][0]} over token {metric['rival'][0]} is {metric['ref']:.4f} in float32",
        f"and {metric['model']:.4f} in llama.cpp arithmetic. The shares miss {run['gap']:.3%} of the change, the",
        f"first-order estimates {run['first_order_gap']:.1%}. In a real run the error alone is put into the reference",
        "(infects), or taken out of the model (heals); the two differ where errors amplify each other.",
        "",
        "| stage | share | first order | infects | heals | most of it in channels |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for found in run["contributions"][:SHOWN]:
        where = found["stage"] if found["layer"] < 0 else f"layer {found['layer']}, {found['stage']}"
        checks = " | ".join("" if found[key] is None else f"{found[key]:+.3f}" for key in ("infects", "heals"))
        name, part = found["parts"][0]
        shares = f"{found['integrated']:+.3f} | {found['first_order']:+.3f}"
        lines.append(f"| {where} | {shares} | {checks} | {name} ({part:+.3f}) |")
    rest = run["contributions"][SHOWN:]
    lines.append(f"| {len(rest)} more | {sum(c['integrated'] for c in rest):+.3f} | | | | |")
    return lines


def section_of_recheck(run: dict[str, Any]) -> list[str]:
    """What one of the runs comes to by the code of a later commit."""
    return [
        "## computed again",
        "",
        f"All numbers above are by the code of commit `{run['made_at']}`. The preset `llama.cpp` has had better sums",
        f"since (`evidence/fast-preset-bound-2026-11-23`), so its last bits are others. `{run['of']}` again at commit",
        f"`{run['again_at']}` (`python benchmarks/recheck_evidence.py`): the same best token at {run['same_top1']} of",
        f"{run['positions']} positions, margins within {run['largest_margin_change']:.3f} logits",
        f"({run['rms_margin_change']:.3f} in the root mean square), perplexity {run['perplexity']:.5f} after "
        f"{run['perplexity_then']:.5f}.",
    ]


def code(text: str) -> str:
    """A token's text in a table's cell."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|")
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


if __name__ == "__main__":
    sys.exit(main())
