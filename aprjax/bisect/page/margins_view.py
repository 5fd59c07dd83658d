"""Section of `margins`: how safe each choice of the next token is; and how the noise was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from aprjax.bisect.page.charts import Band
from aprjax.bisect.page.formats import number, percent
from aprjax.bisect.page.measured import margin_bars
from aprjax.bisect.page.parts import Block, Token, columns, facts, paragraph, strip, table

# Tokens of a strip: beyond it a page becomes slow to scroll; the JSON has all.
_STRIP = 4000
# Positions that the table has: flips first, then the smallest margins.
_LISTED = 48


def margins_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of one prompt's `margins` report."""
    rows, noise = report["tokens"], report.get("noise")
    summary, fed = report["summary"], report["fed"]
    flips = [row for row in rows if row["flip"]]
    blocks = [
        Block(
            "",
            facts(
                [
                    ("positions", summary["positions"]),
                    ("same choice", percent(summary.get("same_top"))),
                    ("flips", len(flips)),
                    ("σ of the noise", f"{number(noise['sigma'], 3)} logits" if noise else "not measured"),
                    ("near-tie up to", f"{number(noise['near_tie_gap'], 3)} logits" if noise else None),
                    ("perplexity", _perplexity(summary)),
                ]
            ),
            plain=True,
        )
    ]
    words = [_token_words(row) for row in rows[:_STRIP]]
    shown = [
        Token(row["text"], row["verdict"], said, bool(row.get("at_risk")))
        for row, said in zip(rows, words, strict=False)
    ]
    where = "in contexts" if fed.get("context") else "prompt and continuation"
    note = f"What both sides were fed ({where}); each token is marked by what the two say after it. "
    note += "By keyboard: left and right move, up and down go to the next flip."
    blocks.append(Block("Tokens by verdict", strip(shown, label=f"Tokens of {fed['name']} by verdict"), note))
    bands = [
        Band(f"reach of {bound['source']}: {number(bound['reach'], 2)} logits", bound["reach"], bound["reach"], index)
        for index, bound in enumerate(report.get("flip_bounds") or [])
        if bound.get("reach")
    ]
    margins = [(row.get("ref") or {}).get("margin") for row in rows]
    chart = margin_bars([str(row["position"]) for row in rows], margins, [row["verdict"] for row in rows], words, bands)
    blocks.append(
        Block("Margin of the reference’s choice", chart, "A flip needs the margin to be overcome; signs mark flips.")
    )
    blocks.append(Block("Positions that matter: flips, then the smallest margins", _positions(rows), plain=True))
    blocks.append(Block("All positions together", _summary(summary), folded=True))
    blocks.append(Block("Flips foreseen", _bounds(report), folded=True))
    if noise:
        blocks.append(Block("How the noise was measured", noise_table(noise), folded=True))
    return blocks


def _perplexity(summary: Mapping[str, Any]) -> str | None:
    if summary.get("ref_perplexity") is None:
        return None
    return f"{number(summary['model_perplexity'])} against {number(summary['ref_perplexity'])}"


def _token_words(row: Mapping[str, Any]) -> str:
    if not row.get("ref") or not row.get("model"):
        return f"position {row['position']}, {row['verdict']}: logits that are not finite"
    return (
        f"position {row['position']}, {row['verdict']}: after “{row['text']}” the reference says "
        f"“{row['ref_text']}” by {number(row['ref']['margin'], 3)}, the model “{row['model_text']}” by "
        f"{number(row['model']['margin'], 3)}, KL {number(row['kl'], 2)}"
    )


def _positions(rows: list[Mapping[str, Any]]) -> Markup:
    def order(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        if not row.get("ref"):
            return False, False, 0.0
        gap = max(row.get("gap") or 0.0, row.get("model_gap") or 0.0)
        return True, not row["flip"], -gap if row["flip"] else row["ref"]["margin"]

    chunks = any(row.get("chunk") for row in rows)
    listed = [
        [
            f"{row['chunk'] + 1}:{row['position']}" if chunks else row["position"],
            row["text"],
            row["ref_text"],
            row["model_text"],
            number((row.get("ref") or {}).get("margin")),
            number(row.get("margin_sigmas"), 3),
            number(max(row.get("gap") or 0.0, row.get("model_gap") or 0.0)) if row["flip"] else "",
            number(row.get("gap_sigmas"), 3) if row["flip"] else "",
            row["rank"] if row.get("rank") is not None else "–",
            number(row.get("kl"), 3),
            row["verdict"],
        ]
        for row in sorted(rows, key=order)[:_LISTED]
    ]
    heads = columns(
        "#at", "'fed", "'ref says", "'model says", "#margin", "#in σ", "#gap", "#in σ", "#rank", "#KL", "?verdict"
    )
    return table(heads, listed, label="Positions that matter")


_MOMENTS = (
    "mean",
    "error",
    "rms",
    "minimum",
    "percent_1",
    "median",
    "percent_95",
    "percent_99",
    "percent_99_9",
    "maximum",
)


def _summary(summary: Mapping[str, Any]) -> Markup:
    names = (
        ("KL(ref‖model), nats", "kl"),
        ("Δp of the next token", "probability_change"),
        ("max |Δlogit|", "max_delta"),
    )
    rows = [[name, *(number(summary[key].get(m)) for m in _MOMENTS)] for name, key in names if summary.get(key)]
    heads = columns(
        "", *(f"#{n}" for n in ("mean", "± error", "rms", "min", "1 %", "median", "95 %", "99 %", "99.9 %", "max"))
    )
    ratio = summary.get("log_ratio")
    text = (
        ""
        if ratio is None
        else f"ln of the perplexities’ ratio: {number(ratio)} ± {number(summary.get('log_ratio_error'))}."
    )
    return table(heads, rows, label="Distributions") + (paragraph(text) if text else "")


def _bounds(report: Mapping[str, Any]) -> Markup:
    rows = [
        [b["source"], number(b.get("reach")), len(b["listed"]), number(b.get("expected")), b["flips"], b["caught"]]
        for b in report.get("flip_bounds") or []
    ]
    heads = columns("by the reach of", "#reach, logits", "#listed", "#expected", "#flips", "#of them listed")
    return table(heads, rows, label="Flips foreseen")


def noise_table(noise: Mapping[str, Any]) -> Markup:
    """How sigma was measured, change by change."""
    rows = [
        [
            c["change"],
            c["side"],
            c["arithmetic"],
            *(number(c.get(k)) for k in ("sigma", "sigma_vocabulary", "sigma_top2")),
            f"{c['flips']} of {c['positions']}",
        ]
        for c in noise.get("changes") or []
    ]
    heads = columns("change", "side", "arithmetic", "#σ", "#σ, all tokens", "#σ, top 2", "#flips")
    return paragraph(f"σ is the {noise['method']}.") + table(heads, rows, label="Changes that measure the noise")
