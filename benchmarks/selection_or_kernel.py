"""How much of upstream's layer ratio is the choice of tokens, and how much the kernel, as evidence.

    python benchmarks/selection_or_kernel.py [--model qwen2.5-coder-1.5b] --out evidence/selection-or-kernel-DATE

The statistic is upstream's (contracts.md 2.1): the sample standard deviation (ddof = 1) of a stage's values,
flattened, after the prompt "What is 2+2?" without a template. Upstream divided a side that multiplied decoded weights,
over all tokens, by a side that multiplied quantized activations, over the last token: 18.23 in layer 3 of the 7B. Here
both sides run one file, and each choice is varied alone. The ratio of both at once is the product of the two single
ratios, so that the logarithms of the factors add up to that of the whole.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "What is 2+2?"
# Upstream's two paths: apr's traced one, and realizar's with Q8_K activations; and the arbiter beside them.
TRACED, QUANTIZED = "realizar-f32", "realizar"
ARITHMETICS = (TRACED, QUANTIZED, "float64")
STAGES = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out", "post_ffn_residual")
STAGE = "ffn_swigl"
# AVGFP and apr-vs-gguf-forward-parity-v1: a layer ratio outside is a failure.
BAND = (0.5, 2.0)
# Tokens are chosen so: upstream's two, and all but the one that carries the massive activation.
SELECTIONS = {"all": slice(None), "last": slice(-1, None), "all but the first": slice(1, None)}


def main() -> int:
    """Measures and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from aprjax.checkpoint import open_checkpoint
    from aprjax.checkpoint.fetch import fetch
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.qwen2.model import Qwen2
    from aprjax.text import Tokenizer

    enable_compilation_cache()
    checkpoint = open_checkpoint(fetch(options.model, None, lambda what, done, total: None))
    tokens = list(Tokenizer.from_checkpoint(checkpoint).encode(PROMPT))
    model = Qwen2(checkpoint)
    document = {
        "schema": "aprjax.selection-or-kernel/1",
        "command": f"python benchmarks/selection_or_kernel.py --out evidence/{options.out.name}",
        "model": {"name": options.model, "sha256": checkpoint.sha256(), "layers": checkpoint.config.num_layers},
        "prompt": PROMPT,
        "tokens": tokens,
        "arithmetics": {name: statistics(model, tokens, name) for name in ARITHMETICS},
    }
    document["ratios"] = ratios(document)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=True, indent=1)
    (options.out / "result.json").write_text(text + "\n", encoding="ascii")
    (options.out / "README.md").write_text(readme(document), encoding="utf-8")
    with (options.out / "result.png").open("wb") as target:
        save_plot(document, target)
    return 0


def statistics(model: Any, tokens: list[int], name: str) -> dict[str, Any]:
    """By stage and selection, upstream's statistic of every layer; and each position's part in the pooled one."""
    from aprjax.qwen2 import PRESETS, Stage

    # The weights are the same for every arithmetic.
    model.arithmetic = PRESETS[name]
    _, cache = model.run_with_cache(tokens)
    found: dict[str, Any] = {}
    for stage in STAGES:
        layers = [np.asarray(cache[layer, Stage(stage)], float) for layer in range(model.config.num_layers)]
        found[stage] = {
            "std": {
                selection: [float(np.std(value[rows], ddof=1)) for value in layers]
                for selection, rows in SELECTIONS.items()
            },
            # Of the sum of squares about the pooled mean, the part of position 0.
            "share_of_the_first": [first_share(value) for value in layers],
        }
    return found


def first_share(value: np.ndarray) -> float:
    """Position 0's part of the sum of squares about the mean of all positions."""
    squares = (value - value.mean()) ** 2
    return float(squares[0].sum() / squares.sum())


def ratios(document: dict[str, Any]) -> dict[str, Any]:
    """Every ratio by stage: upstream's, and with one factor varied at a time."""
    found = {}
    for stage in STAGES:

        def std(arithmetic: str, selection: str, stage: str = stage) -> np.ndarray:
            return np.array(document["arithmetics"][arithmetic][stage]["std"][selection])

        both = std(TRACED, "all") / std(QUANTIZED, "last")
        selection = std(QUANTIZED, "all") / std(QUANTIZED, "last")
        arithmetic = std(TRACED, "all") / std(QUANTIZED, "all")
        found[stage] = {
            "both": both.tolist(),
            "selection alone": selection.tolist(),
            "selection alone, decoded": (std(TRACED, "all") / std(TRACED, "last")).tolist(),
            "arithmetic alone, all tokens": arithmetic.tolist(),
            "arithmetic alone, without the first token": (
                std(TRACED, "all but the first") / std(QUANTIZED, "all but the first")
            ).tolist(),
            "arithmetic alone, last token": (std(TRACED, "last") / std(QUANTIZED, "last")).tolist(),
            "arithmetic alone, against float64": (std(QUANTIZED, "last") / std("float64", "last")).tolist(),
            "selection alone, without the first token": (
                std(QUANTIZED, "all but the first") / std(QUANTIZED, "last")
            ).tolist(),
        }
    return found


def extremes(values: list[float]) -> str:
    """The smallest and the largest, with their layers."""
    low, high = int(np.argmin(values)), int(np.argmax(values))
    return f"{values[low]:.4f} (layer {low}) to {values[high]:.4f} (layer {high})"


def outside(values: list[float]) -> int:
    """How many layers the band refuses."""
    return sum(not BAND[0] <= value <= BAND[1] for value in values)


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """What the text says, from the ratios."""
    found = document["ratios"][STAGE]
    layer = int(np.argmax(np.abs(np.log(found["both"]))))
    whole = math.log(found["both"][layer])
    return {
        "layer": layer,
        "both": found["both"][layer],
        "selection": found["selection alone"][layer],
        "arithmetic": found["arithmetic alone, all tokens"][layer],
        "selection_share": math.log(found["selection alone"][layer]) / whole,
        "arithmetic_share": math.log(found["arithmetic alone, all tokens"][layer]) / whole,
        "first": document["arithmetics"][QUANTIZED][STAGE]["share_of_the_first"][layer],
        "without_the_first": found["selection alone, without the first token"][layer],
        "last": found["arithmetic alone, last token"][layer],
    }


def readme(document: dict[str, Any]) -> str:
    """What the JSON says."""
    found, main_ = document["ratios"][STAGE], summary(document)
    model, layer = document["model"], main_["layer"]
    lines = [
        "# An 18-fold layer ratio: the choice of tokens, or the kernel?",
        "",
        f"    {document['command']}",
        "",
        "writes [result.json](result.json), [result.png](result.png) and this page, which is made of the JSON",
        "(`tests/evidence/test_answers_evidence.py` holds that).",
        "",
        f"{model['name']}, SHA-256 `{model['sha256']}`, prompt `{document['prompt']}` without",
        f"a template, {len(document['tokens'])} tokens. The statistic is upstream's (contracts.md 2.1): the sample",
        f"standard deviation (ddof = 1) of `{STAGE}`, flattened. Both sides run this one file: `{TRACED}` (decoded",
        f"weights, as apr's traced path) over all tokens, divided by `{QUANTIZED}` (Q8_K activations) over the last",
        "token, is what upstream divided.",
        "",
        "## The answer",
        "",
        f"The ratio that upstream read as a kernel bug is here largest in layer {layer}: **{main_['both']:.2f}**. It",
        f"is the product of **{main_['selection']:.2f}** for the choice of tokens under equal arithmetic and",
        f"**{main_['arithmetic']:.4f}** for the arithmetic under an equal choice. On the scale of logarithms",
        f"{main_['selection_share']:.2%} of it is the choice of tokens and {main_['arithmetic_share']:.2%} the kernel.",
        f"Position 0 alone has {main_['first']:.2%} of the pooled sum of squares there; without it the choice of",
        f"tokens makes a ratio of {main_['without_the_first']:.2f}. (A negative part pulls the other way.)",
        "",
        "The kernel alone, under an equal choice of tokens, makes",
        f"{extremes(found['arithmetic alone, all tokens'])} over all tokens,",
        f"{extremes(found['arithmetic alone, without the first token'])} over all but the first, and",
        f"{extremes(found['arithmetic alone, last token'])} over the last. What the first range has and the others",
        "have not is position 0 once more, whose massive value shares a Q8_K block in layer 26",
        "(`evidence/massive-activation-2026-11-23`).",
        "",
        f"![Ratios of {STAGE} by layer](result.png)",
        "",
        f"| ratio of `{STAGE}` | tokens | arithmetic | layer {layer} | all layers | outside [0.5, 2] |",
        "|---|---|---|---:|---|---:|",
    ]
    described = {
        "both": ("all / last", f"{TRACED} / {QUANTIZED}"),
        "selection alone": ("all / last", QUANTIZED),
        "selection alone, decoded": ("all / last", TRACED),
        "arithmetic alone, all tokens": ("all", f"{TRACED} / {QUANTIZED}"),
        "arithmetic alone, without the first token": ("all but the first", f"{TRACED} / {QUANTIZED}"),
        "arithmetic alone, last token": ("last", f"{TRACED} / {QUANTIZED}"),
        "arithmetic alone, against float64": ("last", f"{QUANTIZED} / float64"),
        "selection alone, without the first token": ("all but the first / last", QUANTIZED),
    }
    for name, (tokens, arithmetic) in described.items():
        values = found[name]
        lines.append(
            f"| {name} | {tokens} | {arithmetic} | {values[layer]:.4f} | {extremes(values)} | {outside(values)} |"
        )
    lines += ["", *other_stages(document, layer), "", *carries_over(document)]
    return "\n".join(lines) + "\n"


def other_stages(document: dict[str, Any], layer: int) -> list[str]:
    """The same layer's other stages, as upstream listed those of its layer 3."""
    lines = [
        f"The other stages of layer {layer}, as upstream listed those of its layer 3:",
        "",
        "| stage | both | selection alone | arithmetic alone, all tokens | arithmetic alone, last token |",
        "|---|---:|---:|---:|---:|",
    ]
    names = ("both", "selection alone", "arithmetic alone, all tokens", "arithmetic alone, last token")
    for stage in STAGES:
        numbers = " | ".join(f"{document['ratios'][stage][name][layer]:.4f}" for name in names)
        lines.append(f"| {stage} | {numbers} |")
    return lines


def carries_over(document: dict[str, Any]) -> list[str]:
    """What the 1.5B says of the 7B."""
    equal = document["ratios"][STAGE]["arithmetic alone, last token"]
    return [
        "## What carries over to the 7B, and what does not",
        "",
        "- The identity carries over: the ratio is the product of the two factors on any model, so that no ratio of",
        "  different token sets says anything of a kernel.",
        "- That position 0 holds the pooled deviation is a property of the family (massive activations at the first",
        "  token); upstream's own numbers of the 7B fit it: 1.2216 over all tokens, 0.0670 and 0.0834 over the last.",
        "- The layer does not carry over: in which one the first token's neurons become massive is a matter of the",
        "  weights. Nor do the values. No 7B was run here.",
        f"- With equal tokens two honest kernels stay within {extremes(equal)} here. Upstream's own",
        "  last-token ratios of the 7B, 0.7130 to 1.2452 under what was to be one kernel, are to be held against that;",
        "  the band [0.5, 2] passes both.",
    ]


def save_plot(document: dict[str, Any], target: Any) -> None:
    """Writes the plot as PNG."""
    from matplotlib.figure import Figure

    found = document["ratios"][STAGE]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    styles = {
        "both": "k-o",
        "selection alone": "C0--s",
        "arithmetic alone, all tokens": "C1-^",
        "arithmetic alone, last token": "C3-v",
        "selection alone, without the first token": "C2:d",
    }
    for name, style in styles.items():
        axes.plot(found[name], style, markersize=4, label=name)
    axes.axhspan(*BAND, color="grey", alpha=0.15, label="upstream's band [0.5, 2]")
    axes.axhline(18.23, color="C4", linestyle=":", label="upstream: 18.23 (7B, layer 3)")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"ratio of the standard deviations of {STAGE}")
    axes.set_title(f"{document['model']['name']}, {document['prompt']!r}: one factor at a time")
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=110, format="png")


if __name__ == "__main__":
    sys.exit(main())
