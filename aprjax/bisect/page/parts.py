"""What sections are put together from: tables, strips, waterfalls, search paths; each from data, by one template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aprjax.bisect.page import formats
from aprjax.bisect.page.scales import legend

FOLDER = Path(__file__).with_name("templates")
# Rows that a table shows at once; the others are folded away, the JSON has all of them.
SHOWN_ROWS = 24
# Rows that a page keeps of one table, folded or not: beyond it a browser becomes slow.
MOST_ROWS = 600


@dataclass(frozen=True)
class Block:
    """A titled part of a section.

    Attributes:
        title: its heading; "" for none.
        body: HTML.
        note: a sentence under the heading.
        folded: whether it is closed at first.
        plain: whether it stands without style sheet and script, as in a notebook.
    """

    title: str
    body: Markup
    note: str = ""
    folded: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Token:
    """A token of a strip.

    Attributes:
        text: readable.
        verdict: agree, near-tie, divergence or unmeasured.
        words: its numbers in a sentence.
        risk: whether it was listed as one that may flip.
    """

    text: str
    verdict: str
    words: str
    risk: bool = False


@dataclass(frozen=True)
class Step:
    """A bar of a waterfall, from one value to another.

    Attributes:
        name: whose share it is.
        start, size: in the metric's unit; a `size` of None marks an end: a value, not a change.
        note: more about it.
        kind: "end", "up", "down", "rest" or "gap".
        words: all of it in a sentence.
    """

    name: str
    start: float
    size: float | None
    note: str
    kind: str
    words: str = ""


@dataclass(frozen=True)
class Bar:
    """A labelled bar whose length stands on a logarithmic scale.

    Attributes:
        name: its label.
        value: what is written behind it.
        share: its length, 0 to 1.
        kind: the tone.
        sign: a character before the label.
        note: smaller, under the label.
        threshold: where a mark stands on the bar's scale, 0 to 1; None for none.
    """

    name: str
    value: str
    share: float
    kind: str
    sign: str = ""
    note: str = ""
    threshold: float | None = None


@dataclass(frozen=True)
class Column:
    """A table's column: its heading, what its cells hold ("text", "number", "code", "verdict"), a class of width."""

    name: str
    kind: str = "text"
    width: str = ""


@dataclass(frozen=True)
class Row:
    """A table's row: its cells, and a tone for all of it."""

    cells: Sequence[Any]
    tone: str = field(default="")


@cache
def environment() -> jinja2.Environment:
    """The templates: everything that is put in is escaped, and a name that is missing is an error."""
    loaded = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loaded.filters |= {
        "prose": formats.prose,
        "tone": formats.tone,
        "sign": formats.sign,
        "number": formats.number,
        "file_name": formats.file_name,
    }
    loaded.globals["embedded"] = embedded
    return loaded


def embedded(value: Any) -> Markup:
    """JSON for a script block: no text in it can end the block, open another or break a line of script."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _part(name: str, **values: Any) -> Markup:
    return Markup(getattr(environment().get_template("parts.html").module, name)(**values))


def columns(*names: str) -> list[Column]:
    """Columns by heading; `#` before a heading means numbers, `'` code, `?` a verdict."""
    kinds = {"#": "number", "'": "code", "?": "verdict"}
    return [Column(name[1:], kinds[name[0]]) if name[:1] in kinds else Column(name) for name in names]


def table(
    heads: Sequence[Column], rows: Iterable[Row | Sequence[Any]], *, label: str, shown: int = SHOWN_ROWS
) -> Markup:
    """A table that scrolls sideways where it must; what is beyond `shown` rows is folded away."""
    made = [row if isinstance(row, Row) else Row(row) for row in rows]
    kept = made[:MOST_ROWS]
    # A column in which no row says anything is left out.
    told = [n for n, _ in enumerate(heads) if any(row.cells[n] not in ("", None) for row in kept)]
    kept = [Row([row.cells[n] for n in told], row.tone) for row in kept]
    heads = [heads[n] for n in told]
    heads = [replace(head, width=_width([row.cells[index] for row in kept])) for index, head in enumerate(heads)]
    # Where a row holds sentences, a narrow screen shows its cells one under the other.
    stack = any(head.width == "long" for head in heads)
    left = len(made) - len(kept)
    return _part("table", columns=heads, rows=kept[:shown], more=kept[shown:], left=left, stack=stack, label=label)


def _width(cells: Sequence[Any]) -> str:
    """Short cells stay on one line, long ones get room: a narrow screen scrolls sideways rather than down."""
    longest = max((len(str(cell)) for cell in cells), default=0)
    return "short" if longest <= 26 else ("long" if longest > 60 else "middle")


def strip(tokens: Sequence[Token], *, label: str) -> Markup:
    """Tokens one after the other; colour, border and sign say how each fared."""
    present = [v for v in ("agree", "near-tie", "divergence", "unmeasured") if any(t.verdict == v for t in tokens)]
    risky = any(token.risk for token in tokens)
    return _part("strip", tokens=tokens, verdicts=present, risky=risky, label=label)


def waterfall(steps: Sequence[Step], *, label: str) -> Markup:
    """Bars from one value to another, each beginning where the last one ended."""
    edges = [edge for step in steps for edge in (step.start, step.start + (step.size or 0.0))]
    low, high = min(edges), max(edges)
    span = (high - low) or 1.0
    low, span = low - 0.03 * span, 1.06 * span
    bars = []
    for step in steps:
        left = min(step.start, step.start + (step.size or 0.0))
        # What is too small to see keeps a hair's breadth.
        bars.append(
            (step, round(100 * (left - low) / span, 2), round(max(0.35, 100 * abs(step.size or 0.0) / span), 2))
        )
    return _part("waterfall", bars=bars, label=label)


def bars(found: Sequence[Bar], *, label: str) -> Markup:
    """Labelled bars, one under the other, in order."""
    return _part("bars", found=found, label=label)


def heat_map(found: Any) -> Markup:
    """A heat map with its legend, its switch of measures and the place for a cell's details."""
    return _part("heat_map", map=found, ramp=legend())


def texts(found: Sequence[tuple[str, str, str]], *, label: str) -> Markup:
    """Texts side by side: (name, what is common, where they part)."""
    return _part("texts", found=found, label=label)


def difference(text: str, *, label: str) -> Markup:
    """A unified diff."""
    return _part("difference", lines=text.splitlines()[2:], label=label)


def sides(found: Sequence[Mapping[str, str]]) -> Markup:
    """The files and engines, a card each."""
    return _part("sides", found=found)


def provenance(found: Sequence[Mapping[str, Any]]) -> Markup:
    """What made each report, line by line."""
    return _part("provenance", found=found)


def prompts(found: Sequence[Mapping[str, Any]]) -> Markup:
    """What was fed; long texts are folded."""
    return _part("prompts", found=found)


def paragraph(text: str) -> Markup:
    """A sentence."""
    return Markup("<p>{}</p>").format(formats.prose(text))


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names and values, in a row."""
    return _part("facts", pairs=[(name, value) for name, value in pairs if value not in (None, "")])
