"""Does aprjax's llama.cpp arithmetic generate llama.cpp's own tokens? 128 greedy tokens for each of 24 prompts.

llama.cpp (the installed plain build, live) generates; aprjax verifies all 128 in one pass over prompt and
continuation. Stop tokens are ignored, so that each prompt has its 128. A first difference is judged against the
measured noise of this file's logits. An interrupted run goes on where it was: prompts that are done are not run again.

python benchmarks/generation_parity.py [--models 0.5b 1.5b] [--arithmetic llama.cpp-exact] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOKENS = 128
MODELS = {"0.5b": "qwen2.5-coder-0.5b", "1.5b": "qwen2.5-coder-1.5b"}
# Name, how often it is wrapped in ChatML, text.
PROMPTS = (
    ("python", "none", "def fib(n):"),
    (
        "python-class",
        "none",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    ),
    ("rust", "none", "fn largest(values: &[i32]) -> Option<i32> {\n"),
    ("javascript", "none", "// Debounce: call `fn` only after `wait` ms of silence.\nfunction debounce(fn, wait) {\n"),
    ("sql", "none", "-- The ten customers who spent most in 2023\nSELECT "),
    ("c", "none", "#include <stdio.h>\n\n/* Reverse a string in place. */\nvoid reverse(char *text) {\n"),
    ("html", "none", '<!DOCTYPE html>\n<html lang="en">\n<head>\n  <meta charset="utf-8">\n  <title>'),
    ("json", "none", '{"name": "lighthouse", "height_m": 38.5, "lamps": ['),
    ("shell", "none", "#!/bin/sh\n# Delete log files older than 30 days, but keep the newest five\n"),
    ("prose", "none", "The lighthouse keeper kept two ledgers. In the first she wrote"),
    ("numbers", "none", "1, 1, 2, 3, 5, 8, 13, 21, 34, 55,"),
    ("arithmetic", "none", "17 * 23 = 391\n19 * 21 = 399\n18 * 22 ="),
    ("german", "none", "Vergleiche nie zwei Dinge, bevor du weißt, ob"),
    ("french", "none", "Pour faire une bonne soupe à l'oignon, il faut d'abord"),
    ("chinese", "none", "请用三句话解释什么是快速排序："),
    ("russian", "none", "Столица Франции —"),
    ("arabic", "none", "كتب الطالب برنامجا يحسب"),
    ("japanese", "none", "むかしむかし、あるところに"),
    ("emoji", "none", "🙂🙃 = smile, 🚀 = rocket, 🐍 ="),
    ("chat-sum", "once", "What is 2+2?"),
    ("chat-code", "once", "Write a Python function that checks whether a number is prime."),
    ("chat-twice", "twice", "def fib(n):"),
    ("chat-spanish", "once", "¿Cuál es la diferencia entre una lista y una tupla en Python?"),
    ("long", "none", ""),
)


def prompt_text(name: str, text: str) -> str:
    """The text; the long one is aprjax's own probe of about 500 tokens."""
    from aprjax.text.probes import PROBES

    return next(probe.text for probe in PROBES if probe.name == "long") if name == "long" else text


def write(path: Path, document: dict[str, Any]) -> None:
    """JSON with a line for each prompt."""
    from aprjax.checkpoint.atomic import atomic_file

    head = {key: value for key, value in document.items() if key != "prompts"}
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    rows = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in document["prompts"]]
    joined = ",\n  ".join(rows)
    with atomic_file(path) as stream:
        stream.write(f'{text},\n "prompts": [\n  {joined}\n ]\n}}\n'.encode())


def generated(path: Path, model: Any, threads: int | None) -> dict[str, Any]:
    """llama.cpp's continuations, from an earlier run if it was of the same file."""
    from aprjax.text import Tokenizer, wrap
    from aprjax.trace.llama_cpp import LlamaOptions
    from aprjax.trace.llama_cpp_generate import generate_llama_cpp

    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["sha256"] == model.sha256() and [p["name"] for p in document["prompts"]] == [p[0] for p in PROMPTS]:
            write(path, document)
            return document
    tokenizer = Tokenizer.from_checkpoint(model)
    ids = [tokenizer.encode(wrap(prompt_text(name, text), times)) for name, times, text in PROMPTS]
    options = LlamaOptions(threads=threads)
    done = generate_llama_cpp(model.path, ids, max_new_tokens=TOKENS, ignore_stop=True, options=options)
    prompts = []
    for (name, times, text), prompt, run in zip(PROMPTS, ids, done.runs, strict=True):
        prompts.append(
            {
                "name": name,
                "wrap": times,
                "text": text or "the probe `long` of aprjax.text.probes",
                "prompt_tokens": prompt,
                "tokens": list(run.tokens),
                "continuation": tokenizer.decode(run.tokens),
                "logits": [[float(x) for x in row] for row in run.likeliest.logits[:, :2]],
                "seconds": round(run.passes.seconds, 2),
            }
        )
    document = {
        "model": model.path.name,
        "sha256": model.sha256(),
        "new_tokens": TOKENS,
        "engine": done.engine,
        "prompts": prompts,
    }
    write(path, document)
    return document


def verify(document: dict[str, Any], side: Any) -> dict[str, Any]:
    """One prompt: how many tokens are equal, and what is at the first that is not."""
    prompt, tokens = tuple(document["prompt_tokens"]), tuple(document["tokens"])
    scored = side.score(prompt, tokens)
    at = scored.first_difference(tokens)
    ours = scored.likeliest.logits[:, :2].astype(float).tolist()
    found = {
        "name": document["name"],
        "equal_tokens": len(tokens) if at is None else at,
        "steps_with_equal_top_two_logits": sum(a == b for a, b in zip(ours, document["logits"], strict=True)),
        "smallest_margin": min(a - b for a, b in document["logits"]),
        "first_difference": None,
        "passes": {**asdict(scored.passes), "seconds": round(scored.passes.seconds, 2)},
    }
    if at is not None:
        found["first_difference"] = difference(side, document, scored, at)
    return found


def difference(side: Any, document: dict[str, Any], scored: Any, at: int) -> dict[str, Any]:
    """The gap that separates the two choices, in logits and in the noise's sigma, as this side sees it."""
    from aprjax.bisect.lockstep import Runner
    from aprjax.bisect.noise.logits import measure_logit_noise

    tokens, theirs = document["tokens"], document["logits"]
    fed = [*document["prompt_tokens"], *tokens[:at]]
    noise = measure_logit_noise(Runner(side.checkpoint, side.arithmetic), None, fed)
    gap = float(scored.likeliest.logits[at, 0] - scored.logits[at])
    return {
        "step": at,
        "token": tokens[at],
        "ours": scored.likeliest.best[at],
        "rank": int(scored.ranks[at]),
        "gap": gap,
        "margin_of_llama_cpp": theirs[at][0] - theirs[at][1],
        "sigma": noise.sigma,
        "gap_in_sigmas": noise.in_sigmas(gap),
        "near_tie": noise.is_near_tie(gap, int(scored.ranks[at])),
    }


def rechecked(folder: Path) -> dict[str, Any] | None:
    """What `recheck_evidence.py` found; it may not have been run."""
    path = folder / "recheck.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def readme(
    references: list[dict[str, Any]], results: list[dict[str, Any]], recheck: dict[str, Any] | None = None
) -> str:
    """Markdown: what ran, and for each model and arithmetic what it came to, with a row per prompt."""
    lines = [
        "# 128 greedy tokens against llama.cpp",
        "",
        "`python benchmarks/generation_parity.py --out evidence/generation-parity-2026-11-23` writes this folder.",
        "llama.cpp (plain build, live, stop tokens ignored) decodes; aprjax verifies each continuation in one pass.",
        "`llama.cpp-0.5b.json` and `-1.5b.json` hold prompts, tokens and the two best logits of every step; the others",
        "what the pass came to.",
        "",
    ]
    for reference in references:
        engine = reference["engine"]
        lines.append(
            f"- {reference['model']} (SHA-256 `{reference['sha256']}`): llama-cpp-python {engine['llama_cpp_python']}, "
            f"ggml {engine['ggml_version']} ({engine['system_info']}), {len(reference['prompts'])} prompts"
        )
    lines.append("")
    generated = {reference["sha256"]: len(reference["prompts"]) for reference in references}
    for result in results:
        lines += section(result, generated[result["sha256"]])
    if recheck is not None:
        rows, again = recheck["prompts"], TOKENS * len(recheck["prompts"])
        equal, bits = (sum(row[key] for row in rows) for key in ("equal_tokens", "steps_with_equal_top_two_logits"))
        lines += [
            "## Computed again",
            "",
            f"The tables are by commit `{recheck['made_at']}`. Since then the fast presets' bits have changed;",
            f"`{recheck['arithmetic']}` is to have the same. `{recheck['of']}` again at commit",
            f"`{recheck['again_at']}`, the prompts {', '.join(row['name'] for row in rows)}",
            f"(`python benchmarks/recheck_evidence.py`): {equal} of {again} tokens equal, both best logits",
            f"equal to the bit at {bits} of {again} steps.",
            "",
        ]
    return "\n".join(lines)


def section(result: dict[str, Any], generated: int) -> list[str]:
    """One model under one arithmetic, for which llama.cpp has continued so many prompts."""
    rows, count = result["prompts"], result["new_tokens"]
    equal = sum(row["equal_tokens"] == count for row in rows)
    ties = sum(bool(row["first_difference"] and row["first_difference"]["near_tie"]) for row in rows)
    steps = sum(row["steps_with_equal_top_two_logits"] for row in rows)
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"## {result['model']}, `{result['arithmetic']}`",
        "",
        f"{versions}. {len(rows)} of {generated} prompts are verified.",
        f"All {count} tokens are equal for {equal} of {len(rows)} prompts; of the first differences {ties}",
        f"are near-ties and {len(rows) - equal - ties} divergences. Both best logits are equal to the bit at {steps}",
        f"of {len(rows) * count} steps.",
        "",
        "| prompt | equal tokens | bit-equal steps | smallest margin | gap at the first difference | in sigma |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        first = row["first_difference"]
        gap = "–" if first is None else f"{first['gap']:.4f}"
        sigmas = "–" if first is None or first["gap_in_sigmas"] is None else f"{first['gap_in_sigmas']:.1f}"
        lines.append(
            f"| {row['name']} | {row['equal_tokens']} | {row['steps_with_equal_top_two_logits']} "
            f"| {row['smallest_margin']:.4f} | {gap} | {sigmas} |"
        )
    return [*lines, ""]


def found_in(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What llama.cpp generated, and what verifying came to, as the folder has them."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("llama.cpp*.json"))]
    return [one for one in found if "arithmetic" not in one], [one for one in found if "arithmetic" in one]


def measure(name: str, arguments: argparse.Namespace) -> None:
    """One model: what llama.cpp generates, then what is left to verify; every prompt is written as it is done."""
    from aprjax.bisect.generate.sides import LocalGenerator
    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.fetch import model_location
    from aprjax.qwen2.arithmetic import preset

    out, arithmetic = arguments.out, arguments.arithmetic
    model = open_checkpoint(model_location(MODELS[name]))
    reference = generated(out / f"llama.cpp-{name}.json", model, arguments.threads)
    target = out / f"{arithmetic}-{name}.json"
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    if result.get("sha256") != reference["sha256"]:
        result = {
            "model": reference["model"],
            "sha256": reference["sha256"],
            "new_tokens": TOKENS,
            "arithmetic": arithmetic,
            "versions": {package: version(package) for package in ("jax", "jaxlib", "numpy")},
            "prompts": [],
        }
    side = LocalGenerator(model, preset(arithmetic))
    done = {row["name"] for row in result["prompts"]}
    for prompt in reference["prompts"]:
        if prompt["name"] in done:
            continue
        start = time.perf_counter()
        row = verify(prompt, side)
        result["prompts"].append(row)
        write(target, result)
        seconds = f"{time.perf_counter() - start:.0f} s"
        print(f"{name} {arithmetic} {row['name']}: {row['equal_tokens']} equal, {seconds}", flush=True)
    write(target, result)
    (out / "README.md").write_text(readme(*found_in(out), rechecked(out)), encoding="utf-8")


def main() -> None:
    from aprjax.qwen2.compilation import enable_compilation_cache

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--arithmetic", default="llama.cpp-exact")
    parser.add_argument("--threads", type=int, help="of llama.cpp; its tokens do not depend on it")
    parser.add_argument("--out", type=Path, default=Path("out/generation-parity"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    enable_compilation_cache()
    for name in arguments.models:
        measure(name, arguments)
    print(f"{arguments.out / 'README.md'} is written")


if __name__ == "__main__":
    main()
