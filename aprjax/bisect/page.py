"""What the report folders of all commands are made of: one self-contained page, its pictures as files beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

from aprjax.checkpoint.atomic import atomic_file

_STYLE = """
:root{color-scheme:light dark;--ok:#1a7f37;--bad:#cf222e;--warn:#9a6700;--line:#8884}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem}
.divergence{color:var(--bad)}.agree{color:var(--ok)}.near-tie,.unmeasured{color:var(--warn)}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}img{max-width:100%;height:auto;background:#fff;border-radius:6px}
code{font-size:.85em;overflow-wrap:anywhere}td code{display:inline-block;min-width:10rem}
"""


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML, `title` text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def table(head: Iterable[str], rows: str, *, numbers: bool = False) -> str:
    """A table that scrolls sideways on a narrow screen; `rows` are ready-made."""
    kind = ' class="number"' if numbers else ""
    cells = "".join(f"<th{kind}>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{cells}</tr>{rows}</table></div>'


def number(value: float | None) -> str:
    """Four digits, counts in full; a dash for what was not measured."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def number_cells(values: Iterable[float | None]) -> str:
    """Cells of numbers."""
    return "".join(f'<td class="number">{number(value)}</td>' for value in values)


def write_picture(path: Path, save: Callable[[BinaryIO], None], description: str) -> str:
    """Writes a PNG file and returns it as an element that needs no file."""
    with atomic_file(path) as stream:
        save(stream)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{data}"></p>'


def write_folder(folder: Path, name: str, document: dict[str, Any], content: str) -> Path:
    """Writes `NAME.json` and `index.html`; returns the page's path."""
    for path, text in (
        (folder / f"{name}.json", json.dumps(document, indent=1, allow_nan=False)),
        (folder / "index.html", content),
    ):
        with atomic_file(path) as stream:
            stream.write(text.encode())
    return folder / "index.html"
