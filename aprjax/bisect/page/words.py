"""Sections of what is fed and what is said: `tokens`, `margins`, `generate`, `chatml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aprjax.bisect.page.charts import Band, Mark, Series, line_chart
from aprjax.bisect.page.formats import number, percent
from aprjax.bisect.page.measured import margin_bars
from aprjax.bisect.page.parts import (
    Block,
    Row,
    Token,
    columns,
    difference,
    facts,
    paragraph,
    strip,
    table,
    texts,
)

# Rows before the first differing token that show where in the text it is.
_BEFORE = 6
# Tokens of a strip: beyond it a page becomes slow to scroll; the JSON has all.
_STRIP = 4000
_SMALLEST = 24


def tokens_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of a `tokens` report."""
    blocks = []
    if report.get("causes"):
        blocks.append(Block("To blame", paragraph(", ".join(report["causes"])), plain=True))
    for prompt in report["prompts"]:
        blocks.append(_alignment(prompt))
    vocabulary = report.get("vocabulary")
    if vocabulary and (vocabulary["ids"] or vocabulary["special"] or vocabulary["merges"]):
        rows = [[*map(_shown, row)] for row in vocabulary["examples"]]
        special = [[*map(_shown, row)] for row in vocabulary["special"]]
        body = paragraph(f"{vocabulary['ids']} ids stand for other tokens, {vocabulary['merges']} merges differ.")
        body += table(columns("#id", "'model", "'ref"), rows, label="Ids that differ") if rows else ""
        body += table(columns("'special token", "#model", "#ref"), special, label="Special tokens") if special else ""
        blocks.append(Block("Vocabularies", body, plain=True))
    template = report.get("template") or {}
    for title, key in (
        ("Chat templates, reference → model", "diff"),
        ("What --wrap once makes → the template", "wrap_diff"),
    ):
        if template.get(key):
            blocks.append(Block(title, difference(template[key], label=title), folded=key == "wrap_diff"))
    sides = {name: side for name, side in report["sides"].items() if side}
    if sides:
        keys = ("tokens", "padding", "merges", "bos", "eos", "pad", "add_bos", "pre_tokenizer", "template", "stop_ids")
        rows = [[key, *(_shown(side.get(key)) for side in sides.values())] for key in keys]
        blocks.append(
            Block(
                "Tokenizer settings",
                table(columns("setting", *(f"'{name}" for name in sides)), rows, label="Tokenizers"),
                folded=True,
            )
        )
    return blocks


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _alignment(prompt: Mapping[str, Any]) -> Block:
    rows, first_differing = [], None
    for index, (ours, theirs) in enumerate(prompt["rows"]):
        a = None if ours is None else prompt["model"]["tokens"][ours]
        b = None if theirs is None else prompt["ref"]["tokens"][theirs]
        same = a is not None and b is not None and a["id"] == b["id"]
        if not same and first_differing is None:
            first_differing = index
        byte = (b or a or {}).get("start", "")
        cells = [byte, *_token_cells(a), *_token_cells(b), "" if same else "divergence"]
        rows.append(Row(cells, "" if same else "bad"))
    start = max(0, (first_differing or 0) - _BEFORE)
    heads = columns("#byte", "#model", "'", "#ref", "'", "?")
    counts = ", ".join(
        f"{name}: {len(prompt[name]['tokens'])} tokens from {prompt[name]['source']}" for name in ("model", "ref")
    )
    note = f"wrapped {prompt['wrap']}; {counts}" + (f"; the first {start} rows are the same" if start else "")
    label = f"Alignment of {prompt['name']}"
    body = table(heads, rows[start:], label=label)
    difference_found = prompt.get("first_difference")
    if difference_found:
        body = paragraph(f"Token {difference_found['position']}: {difference_found['explanation']}.") + body
    if start:
        body += table(heads, rows[:start], label=f"{label}, the rows before", shown=0)
    return Block(f"{prompt['name']}: what is fed", body, note, plain=True)


def _token_cells(token: Mapping[str, Any] | None) -> list[Any]:
    if token is None:
        return ["", ""]
    kind = "" if token["kind"] == "normal" else f" [{token['kind']}]"
    return [token["id"], f"{token['text'].replace(' ', '·')}{kind}"]


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
    note = f"What both sides were fed ({where}); each token is marked by what the two say after it."
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
        f"position {row['position']}, {row['verdict']}: after “{row['text']}” the reference says “{row['ref_text']}” by "
        f"{number(row['ref']['margin'], 3)}, the model “{row['model_text']}” by {number(row['model']['margin'], 3)}, "
        f"KL {number(row['kl'], 2)}"
    )


def _positions(rows: list[Mapping[str, Any]]) -> Any:
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
        for row in sorted(rows, key=order)[: 2 * _SMALLEST]
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


def _summary(summary: Mapping[str, Any]) -> Any:
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


def _bounds(report: Mapping[str, Any]) -> Any:
    rows = [
        [b["source"], number(b.get("reach")), len(b["listed"]), number(b.get("expected")), b["flips"], b["caught"]]
        for b in report.get("flip_bounds") or []
    ]
    heads = columns("by the reach of", "#reach, logits", "#listed", "#expected", "#flips", "#of them listed")
    return table(heads, rows, label="Flips foreseen")


def noise_table(noise: Mapping[str, Any]) -> Any:
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


def generate_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of one prompt's `generate` report."""
    first, sides = report.get("first_difference"), report["continuations"]
    blocks = []
    if report.get("shared"):
        blocks.append(Block("", paragraph(f"{report['shared']}."), plain=True))
    if report.get("common_text") is not None:
        found = [(name, report["common_text"], sides[name].get("rest") or "") for name in ("ref", "model")]
        blocks.append(
            Block(
                "What they say",
                texts(found, label="Continuations"),
                "Marked: from the first difference on.",
                plain=True,
            )
        )
    if first and first["kind"] == "another token":
        pieces = first.get("pieces") or ["", ""]
        rows = [
            [
                name,
                f"{view['margin']['top1']} “{piece}”",
                number(view["margin"]["margin"]),
                view["rank"],
                number(view["gap"]),
            ]
            for name, view, piece in (("ref", first["ref"], pieces[1]), ("model", first["model"], pieces[0]))
            if view.get("margin") and view.get("gap") is not None
        ]
        heads = columns("side", "'chooses", "#by", "#rank of the other’s choice", "#gap")
        note = f"At new token {first['step'] + 1}, computed {first['confirmed']}."
        blocks.append(Block("The first difference", table(heads, rows, label="First difference"), note, plain=True))
    steps = report.get("steps") or []
    if steps:
        blocks.append(Block("Margins of the common part", _step_margins(report, steps)))
    rows = [
        [name, len(side["tokens"]), side["stop"], f"{p['batched']} batched, {p['steps']} steps, {p['tokens']} tokens"]
        for name, side in sides.items()
        for p in [side["passes"]]
    ]
    blocks.append(
        Block(
            "Computed", table(columns("side", "#new tokens", "ended by", "passes"), rows, label="Passes"), folded=True
        )
    )
    if report.get("noise"):
        blocks.append(Block("How the noise was measured", noise_table(report["noise"]), folded=True))
    return blocks


def _step_margins(report: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> Any:
    first, noise = report.get("first_difference"), report.get("noise")
    # The step at which they part has its column, too: there the margins are those of two choices.
    ends = [(first[side].get("margin") or {}).get("margin") for side in ("ref", "model")] if first else []
    labels = [str(step["step"] + 1) for step in steps] + ([str(first["step"] + 1)] if first else [])
    lines = [
        Series(name, [*(step.get(key) for step in steps), *ends[index : index + 1]], index)
        for index, (name, key) in enumerate((("reference", "ref_margin"), ("model", "model_margin")))
    ]
    bands = []
    if noise and noise["near_tie_gap"] > 0:
        reach = noise["near_tie_gap"]
        bands.append(Band(f"reach of the noise: {number(reach, 2)} logits", reach, reach))
    marks = [Mark(len(labels) - 1, "first difference")] if first else []
    about = "Both sides' margins at every new token, in logits, on a logarithmic scale"
    return line_chart(about, labels, lines, x_name="new token", y_name="margin, logits", bands=bands, marks=marks)


_STATES = {
    "clean": "agree",
    "wrong": "divergence",
    "loops": "divergence",
    "degenerate": "divergence",
    "flagged": "near-tie",
}
_CLAIMS = {"supported": "bad", "refuted": "good"}


def chatml_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of a `chatml` report."""
    factors, runs = report["factors"], report["runs"]
    shared = "; ".join(f"{count} shared with {proof}" for proof, count in runs["shared"].items())
    text = f"{report['files']['files_sentence']} {runs['computed']} runs of {factors['max_new_tokens']} tokens on {report['backend']}"
    blocks = [Block("", paragraph(text + (f"; {shared}." if shared else ".")), plain=True)]
    rows = [
        Row(
            [c["claim"], c["verdict"], c["reason"], f"{len(c['evidence'])} cells" if c["evidence"] else ""],
            _CLAIMS.get(c["verdict"], ""),
        )
        for c in report["claims"]
    ]
    blocks.append(
        Block(
            "Upstream’s claims, on these files",
            table(columns("claim", "these files", "why", "evidence"), rows, label="Claims"),
            plain=True,
        )
    )
    partings = report["causes"].get("partings") or []
    if partings:
        rows = [
            [_comparison(p["comparison"]), p["kind"], p.get("step"), number(p.get("gap")), number(p.get("sigmas"), 3)]
            for p in partings
        ]
        heads = columns("compared", "parts by", "#at token", "#gap, logits", "#in σ")
        blocks.append(Block("Where the sides part", table(heads, rows, label="Partings"), plain=True))
    cells = [
        Row(
            [
                c["side"],
                c["prompt"],
                c["wrap"],
                c["arithmetic"],
                c["stop"],
                c["state"],
                _end(c),
                "" if c["repetition"].get("onset") is None else c["repetition"]["onset"],
                number(c["first_margin"]),
                number(c["least_margin"]),
                c["text"],
            ],
            {"divergence": "bad", "near-tie": "near"}.get(_STATES.get(c["state"], ""), ""),
        )
        for c in report["cells"]
    ]
    heads = columns(
        "side",
        "prompt",
        "wrap",
        "arithmetic",
        "stop",
        "state",
        "ends",
        "#repeats from",
        "#first margin",
        "#least",
        "'text",
    )
    blocks.append(Block("Cells", table(heads, cells, label="Cells of the factorial")))
    return blocks


def _comparison(found: Mapping[str, Any]) -> str:
    sides = [
        f"{found[side]['side']} ({found[side]['wrap']}, {found[side]['arithmetic']}, stop {found[side]['stop']})"
        for side in ("model", "ref")
    ]
    return f"{found['prompt']}: {' and '.join(sides)}"


def _end(cell: Mapping[str, Any]) -> str:
    count = len(cell["tokens"])
    return f"{count} tokens, budget" if cell.get("stop_token") is None else f"{count} tokens, then {cell['stop_token']}"
