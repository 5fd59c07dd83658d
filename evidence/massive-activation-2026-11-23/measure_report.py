"""From what was run to `result.json`: every number, and what it says to each upstream claim."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import numpy as np
from measure_run import CHANNEL, KEPT, LAYER, MASSIVE, PROMPT, Batch, Layers

from aprjax import __version__
from aprjax.bisect.margins.top_two import margins
from aprjax.bisect.metrics import distance
from aprjax.checkpoint import Checkpoint
from aprjax.qwen2 import Stage

SCHEMA = "aprjax.evidence.massive-activation/1"
COMMAND = "python evidence/massive-activation-2026-11-23/measure.py"
PROMPTS = ("raw", "ChatML")
NOT_MEASURED = (
    "realizar and the GPU kernels themselves: their activation blocks are emulated, everything else is float64",
    "the 7B model, and upstream's own files: this is the official q4_k_m GGUF of the 1.5B",
    "which prompt upstream used: every first token tried is listed instead",
    "FP8 and float16 activations",
    "the rounding of the float32 sums (llama.cpp's order of operations): it is some 1e-7 of a node",
)


def assemble(
    checkpoint: Checkpoint,
    batch: Batch,
    kept: dict[str, Layers],
    heads: dict[str, np.ndarray],
    blocks: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The whole document; `heads` has the logits of the prompts' rows, `blocks` what `feed_forward` found."""
    exact = kept["float64"]
    norm = exact[LAYER][Stage.FFN_NORM]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": COMMAND,
        "date": "2026-11-23",
        "platform": {"machine": platform.machine(), "system": platform.system(), "device": "cpu"},
        "versions": {
            "python": platform.python_version(),
            "aprjax": __version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        },
        "model": {
            "name": checkpoint.path.name,
            "sha256": checkpoint.sha256(),
            "bytes": checkpoint.path.stat().st_size,
            "block_types_of_the_layer": {
                name: checkpoint.tensors[f"model.layers.{LAYER}.mlp.{name}_proj.weight"].block_type
                for name in ("gate", "up", "down")
            },
        },
        "site": {"layer": LAYER, "channel": CHANNEL, "stage": "ffn_norm", "position": 0},
        "prompts": {
            name: {"text": PROMPT, "tokens": [batch.tokens[row] for row in batch.rows(name)]} for name in PROMPTS
        },
        "value": {name: norm[batch.first(name), CHANNEL] for name in PROMPTS},
        "rest": {name: _rest(norm[batch.first(name)]) for name in PROMPTS},
        "peaks": _peaks(batch, exact),
        "channel_by_layer": {
            name: {
                str(stage): [layer[stage][batch.first(name), CHANNEL] for layer in exact]
                for stage in KEPT[:1] + KEPT[2:3] + KEPT[4:]
            }
            for name in PROMPTS
        },
        "other_positions": {name: [norm[row, CHANNEL] for row in batch.rows(name)] for name in PROMPTS},
        "first_tokens": {
            name: {
                "token": batch.tokens[batch.first(name)],
                "value": norm[batch.first(name), CHANNEL],
                "massive": bool(abs(norm[batch.first(name), CHANNEL]) >= MASSIVE),
            }
            for name in batch.names
            if name not in PROMPTS
        },
        "feed_forward": {name: blocks[name] for name in PROMPTS if name in blocks},
        "largest_neuron": {
            kind: {name: block[kind]["ffn_swigl"]["largest"]["change"] for name, block in blocks.items()}
            for kind in ("Q8_K", "Q8_0", "per 32, scale not rounded")
        },
        "layer_output": {name: _outputs(batch, kept, name) for name in PROMPTS},
        "logits": _logits(batch, heads),
        "not_measured": list(NOT_MEASURED),
    }
    for kind, values in document["largest_neuron"].items():
        alone = [value for name, value in values.items() if name not in PROMPTS]
        document.setdefault("largest_neuron_over_first_tokens", {})[kind] = {
            "least": max(alone),
            "most": min(alone),
            "median": float(np.median(alone)),
            "count": len(alone),
        }
    document["claims"] = _claims(document)
    return _plain(document)


def _rest(row: np.ndarray) -> dict[str, float]:
    """What the channel stands out from: the other channels of its row, and those that share its scale."""
    others = np.delete(row, CHANNEL)
    begin = CHANNEL // 256 * 256
    block = np.delete(row[begin : begin + 256], CHANNEL - begin)
    return {
        "median": float(np.median(np.abs(others))),
        "rms": float(np.sqrt(np.mean(others**2))),
        "rms_of_the_other_255_in_its_block": float(np.sqrt(np.mean(block**2))),
        "step_of_its_block_of_256": float(np.abs(row[CHANNEL]) / 127),
        "share_of_the_other_255_that_become_zero": float(np.mean(np.abs(block) < np.abs(row[CHANNEL]) / 254)),
    }


def _peaks(batch: Batch, exact: Layers) -> dict[str, Any]:
    """The largest magnitude of every kept stage over all layers and rows: where it is."""
    found = {}
    for stage in KEPT:
        values = np.stack([layer[stage] for layer in exact])
        layer, row, channel = (int(i) for i in np.unravel_index(int(np.abs(values).argmax()), values.shape))
        found[str(stage)] = {
            "value": values[layer, row, channel],
            "layer": layer,
            "channel": channel,
            "position": int(batch.position[row]),
            "prompt": batch.names[batch.sequence[row]],
        }
    return found


def _outputs(batch: Batch, kept: dict[str, Layers], name: str) -> dict[str, Any]:
    """How far every layer's output at position 0 is from float64, and the channel in it."""
    row = batch.first(name)
    report: dict[str, Any] = {}
    for arithmetic in ("per 256", "per 32"):
        pairs = [
            (a[Stage.POST_FFN_RESIDUAL][row], b[Stage.POST_FFN_RESIDUAL][row])
            for a, b in zip(kept[arithmetic], kept["float64"], strict=True)
        ]
        report[arithmetic] = {
            "cosine": [distance(a[None], b[None]).cosine for a, b in pairs],
            "channel_change": [a[CHANNEL] / b[CHANNEL] - 1 for a, b in pairs],
        }
    between = zip(kept["per 32"], kept["per 256"], strict=True)
    report["per 32 against per 256"] = {
        "cosine": [
            distance(a[Stage.POST_FFN_RESIDUAL][[row]], b[Stage.POST_FFN_RESIDUAL][[row]]).cosine for a, b in between
        ]
    }
    return report


def _logits(batch: Batch, heads: dict[str, np.ndarray]) -> dict[str, Any]:
    """By prompt and run: the logits against float64's, at position 0 and over the others."""
    report: dict[str, Any] = {}
    begin = 0
    for name in PROMPTS:
        count = len(batch.rows(name))
        lines = slice(begin, begin + count)
        begin += count
        report[name] = {}
        for kind, values in heads.items():
            if kind == "float64":
                continue
            ours, exact = values[lines], heads["float64"][lines]
            found = margins(ours, exact, list(range(count)))
            report[name][kind] = {
                "position_0": {
                    "cosine": distance(ours[:1], exact[:1]).cosine,
                    "rms_delta": found[0].rms_delta,
                    "kl": found[0].kl,
                    "flip": found[0].flip,
                },
                "others": {
                    "cosine": distance(ours[1:], exact[1:]).cosine,
                    "rms_delta": max(m.rms_delta for m in found[1:]),
                    "kl": max(m.kl for m in found[1:]),
                    "flips": sum(m.flip for m in found[1:]),
                    "positions": count - 1,
                },
            }
    return report


def _claims(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Each upstream statement, what was found here, and the rule that makes it an agreement."""
    over = document["largest_neuron_over_first_tokens"]
    value, outputs = document["value"]["raw"], document["layer_output"]
    before = range(1, LAYER)
    channel = max(abs(outputs[p]["per 32"]["channel_change"][i]) for p in PROMPTS for i in before)
    flat = min(outputs[p]["per 32"]["cosine"][i] for p in PROMPTS for i in before)
    after = [min(outputs[p]["per 32"]["cosine"][i] for p in PROMPTS) for i in (LAYER, LAYER + 1)]
    residual = document["channel_by_layer"]["raw"]
    cancelled = abs(residual["post_ffn_residual"][LAYER]) / abs(residual["post_attn_residual"][LAYER])
    gate = [document["feed_forward"][p]["Q8_K"]["ffn_gate"]["cosine"] for p in PROMPTS]

    def claim(name: str, source: str, said: str, found: Any, rule: str, *, agrees: bool) -> dict[str, Any]:
        verdict = "agrees" if agrees else "contradicted"
        return {"id": name, "source": source, "claim": said, "found": found, "rule": rule, "verdict": verdict}

    return [
        claim(
            "value",
            "paiml/aprender docs/audits/l0-1b-arms.md, PR #3032",
            "channel 408, layer 26, position 0: -146.68 in ffn_norm",
            value,
            "within 1 % for the raw prompt",
            agrees=abs(value / -146.68 - 1) < 0.01,
        ),
        claim(
            "per-256",
            "paiml/aprender docs/audits/l0-1b-arms.md, PR #3032",
            "Q8_K, one scale for 256: up to -12.7 % on FFN neurons",
            over["Q8_K"],
            "-12.7 % lies within the range of the largest ffn_swigl neuron over the first tokens",
            agrees=over["Q8_K"]["most"] <= -0.127 <= over["Q8_K"]["least"],
        ),
        claim(
            "per-32",
            "paiml/aprender L0-1b (2026-09-06)",
            "per-32 lies within 0.5 % of float64",
            over["Q8_0"],
            "the same neuron changes by at most 0.5 % with every first token",
            agrees=max(abs(over["Q8_0"]["most"]), abs(over["Q8_0"]["least"])) <= 0.005,
        ),
        claim(
            "inaccurate-side",
            "paiml/aprender docs/audits/l0-1b-arms.md, PR #3032",
            "of the two, the Q8_K side is the inaccurate one",
            over["Q8_K"]["median"] / over["Q8_0"]["median"],
            "its median error is the larger by a factor of 2",
            agrees=over["Q8_K"]["median"] / over["Q8_0"]["median"] > 2,
        ),
        claim(
            "hidden-by-cosine",
            "paiml/aprender PMAT-800B (2026-06-16)",
            "a cosine of 0.9998 beside such errors",
            gate,
            "0.9998 to four digits, ffn_gate under Q8_K, for one of the prompts",
            agrees=any(round(c, 4) == 0.9998 for c in gate),
        ),
        claim(
            "flat-then-drop",
            "paiml/aprender PMAT-800B (2026-06-16)",
            "per-32: cosine flat to layer 25, then .9327 and .9043",
            {"least_before": flat, "layers_26_27": after},
            "above 0.999 before, below 0.999 and falling after (the sizes depend on the first token)",
            agrees=flat > 0.999 and 0.999 > after[0] > after[1],
        ),
        claim(
            "fifteen-per-cent",
            "paiml/aprender PMAT-800B (2026-06-16)",
            "channel 408 is off by about 15 % from layer 1 on",
            channel,
            "5 % or more somewhere in layers 1 to 25 under per-32 activations",
            agrees=channel >= 0.05,
        ),
        claim(
            "cancellation",
            "paiml/aprender PMAT-800B (2026-06-16)",
            "exposed when the feed-forward block of layer 26 cancels the channel",
            cancelled,
            "less than a fifth of the residual's channel is left after it",
            agrees=cancelled < 0.2,
        ),
    ]


def _plain(value: Any) -> Any:
    """NumPy scalars as plain ones, numbers to ten digits: 1 - cosine goes down to 1e-8."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.10g}")
    return value.item() if isinstance(value, np.generic) else value
