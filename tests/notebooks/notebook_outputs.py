"""What a reader sees of a notebook's outputs, cell by cell, and whether two runs show the same."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

# A number as reports write it: 4.77e−7 has a typographic minus. What is glued to a word (Q4_K, sha256) is text.
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-−+]?\d+)?(?![\w])")
# Other processors and versions of XLA add in another order. Where activations are quantized, a value on the edge of a
# code then takes the next one, a step of a 127th of its block's largest value. A planted fault is far larger: a
# change by a twentieth is another result.
RELATIVE = 0.05
# What is itself rounding may be anything of its size, zero included: float32's unit roundoff is 6e-8, a sum over a
# width of 768 can lose 768 of it, and logits are some ten of what is summed.
ROUNDING = 5e-4
# Numbers in units of the noise, and errors of fitted numbers, are quotients of the two kinds; and how many values are
# equal to the bit hangs on the processor. They are held only to being there.
OF_NOISE = re.compile(r"[\d.,e+−-]+\s*(?:sigma|σ)|±\s*[\d.,e+−-]+|\d+ exact|\d+ within rounding")


class _Text(HTMLParser):
    """The text of an HTML output, with a space between elements, and without what is told in units of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = 0
        self.headings: list[str] = []
        self.column, self.cell = -1, ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.skipped += tag in ("style", "script")
        if tag == "table":
            self.headings = []
        elif tag == "tr":
            self.column = -1
        elif tag in ("th", "td"):
            self.column, self.cell = self.column + 1, tag
            if tag == "th":
                self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in ("style", "script")
        if tag in ("th", "td"):
            self.cell = ""

    def handle_data(self, data: str) -> None:
        if self.skipped:
            return
        if self.cell == "th":
            self.headings[-1] += data
        of_noise = self.cell == "td" and self.column < len(self.headings) and "σ" in self.headings[self.column]
        self.parts.append("(of noise)" if of_noise and data.strip() else data)


@dataclass(frozen=True)
class Shown:
    """One output: the kinds of data that it holds, and its words."""

    kinds: tuple[str, ...]
    text: str


@dataclass
class Cell:
    """A code cell's outputs."""

    source: str
    outputs: list[Shown] = field(default_factory=list)


def shown(notebook: Any) -> list[Cell]:
    """The code cells with what they show; errors are outputs of the kind `error`."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        found = Cell("".join(cell["source"]))
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                found.outputs.append(Shown((output["name"],), "".join(output["text"])))
            elif output["output_type"] == "error":
                found.outputs.append(Shown(("error",), f"{output['ename']}: {output['evalue']}"))
            else:
                data = output["data"]
                found.outputs.append(Shown(tuple(sorted(data)), _words(data)))
        cells.append(found)
    return cells


def _words(data: Any) -> str:
    # A figure is held to be there: its pixels hang on fonts and on the version of matplotlib.
    if "image/png" in data:
        return ""
    if "text/html" not in data:
        return "".join(data.get("text/plain", ""))
    parser = _Text()
    parser.feed("".join(data["text/html"]))
    return " ".join(parser.parts)


def differences(committed: list[Cell], again: list[Cell]) -> list[str]:
    """Sentences: where two runs of one notebook show other things. Empty where they agree."""
    found = []
    for number, (ours, theirs) in enumerate(zip(committed, again, strict=True), 1):
        where = f"code cell {number} ({ours.source.splitlines()[0] if ours.source else 'empty'})"
        if ours.source != theirs.source:
            found.append(f"{where}: the source is another")
            continue
        if [o.kinds for o in ours.outputs] != [o.kinds for o in theirs.outputs]:
            kinds = [[", ".join(o.kinds) for o in cell.outputs] for cell in (ours, theirs)]
            found.append(f"{where}: committed are outputs of the kinds {kinds[0]}, now come {kinds[1]}")
            continue
        for left, right in zip(ours.outputs, theirs.outputs, strict=True):
            found += [f"{where}: {difference}" for difference in differing(left.text, right.text)]
    return found


def differing(committed: str, again: str) -> list[str]:
    """Where two texts differ: in words at all, or in numbers by more than the tolerance."""
    left, right = (_plain(text) for text in (committed, again))
    words = [" ".join(NUMBER.sub(" # ", text).split()) for text in (left, right)]
    if words[0] != words[1]:
        at = next((i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b), min(map(len, words)))
        begin = max(0, at - 40)
        return [f"committed is …{words[0][begin : at + 60]!r}, now comes …{words[1][begin : at + 60]!r}"]
    numbers = [NUMBER.findall(text) for text in (left, right)]
    return [f"committed is the number {a}, now comes {b}" for a, b in zip(*numbers, strict=True) if not agree(a, b)]


def agree(a: str, b: str) -> bool:
    """Whether two numbers are the same result of two runs: counts and places exactly, measures within tolerance."""
    if a.lstrip("-−+").replace(",", "").isdigit() and b.lstrip("-−+").replace(",", "").isdigit():
        return a == b
    return math.isclose(_value(a), _value(b), rel_tol=RELATIVE, abs_tol=ROUNDING)


def _plain(text: str) -> str:
    return OF_NOISE.sub("(of noise)", text)


def _value(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))
