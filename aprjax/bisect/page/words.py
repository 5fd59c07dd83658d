"""Sections of what is fed and what is said: `tokens`, `generate`, `chatml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from aprjax.bisect.page.charts import Band, Mark, Series, line_chart
from aprjax.bisect.page.formats import number
from aprjax.bisect.page.margins_view import noise_table
from aprjax.bisect.page.parts import Block, Row, columns, difference, paragraph, table, texts

# Rows before the first differing token that show where in the text it is.
_BEFORE = 6


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


def _step_margins(report: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> Markup:
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
    text = f"{report['files']['files_sentence']} {runs['computed']} runs of {factors['max_new_tokens']} tokens "
    text += f"on {report['backend']}"
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
