"""Line and bar charts as inline SVG; every text is escaped, every colour is a class of the style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from aprjax.bisect.page.formats import is_number, number
from aprjax.bisect.page.scales import LogAxis

_WIDTH, _HEIGHT = 920, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 34
# Labels under an axis that still stand apart.
_MOST_LABELS = 30
# What a bar's tone stands for, and the sign on top of it.
_KINDS = {"good": "agree", "near": "near-tie", "bad": "divergence"}
_SIGNS = {"bad": "M0 0L5-8H-5Z", "near": "M0-1L4-5L0-9L-4-5Z"}
_MARKERS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Series:
    """A line: its name, its values by index (None leaves a gap), the number of its style."""

    name: str
    values: Sequence[float | None]
    style: int


@dataclass(frozen=True)
class Band:
    """A range of the vertical axis that is shaded; `low` and `high` alike draw a line."""

    name: str
    low: float
    high: float
    style: int = 0


@dataclass(frozen=True)
class Mark:
    """A vertical line at an index, with its words."""

    index: int
    name: str


class _Frame:
    """The axes that all charts have."""

    def __init__(
        self, labels: Sequence[str], values: Sequence[float], *, ticks: Sequence[float] = (), slanted: bool = False
    ) -> None:
        self.bottom = _BOTTOM + (56 if slanted else 0)
        self.height = _HEIGHT + (56 if slanted else 0)
        self.plot = self.height - _TOP - self.bottom
        self.axis = LogAxis(values, self.plot, marks=ticks)
        self._labels, self._slanted = labels, slanted
        self.step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(labels))

    def x(self, index: float) -> float:
        """The middle of an index's column."""
        return round(_LEFT + (index + 0.5) * self.step, 1)

    def y(self, value: float) -> float:
        """The height of a value."""
        return round(_TOP + self.plot - self.axis.at(value), 1)

    def axes(self, x_name: str, y_name: str) -> list[Markup]:
        """Grid, ticks and names."""
        base = _TOP + self.plot
        parts = [
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="tick" x="{}" y="{}">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, _LEFT - 6, round(base - at + 4, 1), label, y=round(base - at, 1))
            for at, label in self.axis.ticks()
        ]
        every = max(1, math.ceil(len(self._labels) / _MOST_LABELS))
        for index in range(0, len(self._labels), every):
            x, y = self.x(index), base + 16
            turn = Markup(' transform="rotate(-40 {} {})"').format(x, y) if self._slanted else ""
            kind = "tick" if self._slanted else "tick middle"
            parts.append(
                Markup('<text class="{}" x="{}" y="{}"{}>{}</text>').format(kind, x, y, turn, self._labels[index])
            )
        parts.append(
            Markup('<text class="axis middle" x="{}" y="{}">{}</text>').format(
                (_LEFT + _WIDTH) / 2, self.height - 4, x_name
            )
        )
        parts.append(
            Markup('<text class="axis middle" transform="translate(11 {}) rotate(-90)">{}</text>').format(
                _TOP + self.plot / 2, y_name
            )
        )
        return parts

    def band(self, band: Band) -> Markup:
        """A shaded range, or a line."""
        top, bottom = self.y(band.high), self.y(band.low)
        if band.low == band.high:
            return Markup('<line class="bound b{}" x1="{}" x2="{}" y1="{y}" y2="{y}"><title>{}</title></line>').format(
                band.style, _LEFT, _WIDTH - _RIGHT, band.name, y=top
            )
        return Markup('<rect class="band b{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            band.style, _LEFT, top, _WIDTH - _LEFT - _RIGHT, round(bottom - top, 1), band.name
        )

    def mark(self, mark: Mark) -> Markup:
        """A vertical line with its words."""
        x = self.x(mark.index)
        near_end = x > _WIDTH - 220
        return Markup(
            '<line class="mark" x1="{x}" x2="{x}" y1="{}" y2="{}"/><text class="marked{}" x="{}" y="{}">{}</text>'
        ).format(
            _TOP, _TOP + self.plot, " end" if near_end else "", x + (-5 if near_end else 5), _TOP + 11, mark.name, x=x
        )

    def svg(self, about: str, parts: Sequence[Markup]) -> Markup:
        """The whole picture."""
        return Markup(
            '<div class="scroll chart"><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></div>'
        ).format(_WIDTH, self.height, about, Markup("").join(parts))


def line_chart(
    about: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    ticks: Sequence[float] = (),
    slanted: bool = False,
) -> Markup:
    """Lines over a logarithmic axis, with a legend; values that are not positive leave a gap.

    With `ticks` the axis reaches from the least to the largest of them and of the values, in place of whole decades.
    """
    values = [v for one in series for v in one.values if is_number(v)]
    values += [edge for band in bands for edge in (band.low, band.high)]
    frame = _Frame(labels, values, ticks=ticks, slanted=slanted)
    parts = [*map(frame.band, bands), *frame.axes(x_name, y_name), *map(frame.mark, marks)]
    for one in series:
        parts += _line(frame, one, labels)
    shown = [one for one in series if any(is_number(v) for v in one.values)]
    return frame.svg(about, parts) + _legend(shown, bands)


def _line(frame: _Frame, series: Series, labels: Sequence[str]) -> list[Markup]:
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(series.values):
        if is_number(value) and value > 0:
            runs[-1].append((index, value))
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in runs:
        path = " ".join(f"{frame.x(index)},{frame.y(value)}" for index, value in run)
        if len(run) > 1:
            parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(series.style, path))
        # Beyond a hundred points signs would cover the line.
        if len(labels) > 100 and len(run) > 1:
            continue
        for index, value in run:
            words = f"{series.name}, {labels[index]}: {number(value)}"
            parts.append(_marker(frame.x(index), frame.y(value), series.style, words))
    return parts


def _marker(x: float, y: float, style: int, words: str = "") -> Markup:
    shape = _MARKERS[style % len(_MARKERS)]
    title = Markup("<title>{}</title>").format(words) if words else Markup("")
    if shape == "circle":
        return Markup('<circle class="dot s{}" cx="{}" cy="{}" r="3">{}</circle>').format(style, x, y, title)
    paths = {"square": "M-3-3H3V3H-3Z", "triangle": "M0-4L4 3H-4Z", "diamond": "M0-4L4 0L0 4L-4 0Z"}
    return Markup('<path class="dot s{}" transform="translate({} {})" d="{}">{}</path>').format(
        style, x, y, paths[shape], title
    )


def bar_chart(
    about: str,
    labels: Sequence[str],
    values: Sequence[float | None],
    kinds: Sequence[str],
    words: Sequence[str],
    *,
    x_name: str,
    y_name: str,
    bands: Sequence[Band] = (),
) -> Markup:
    """A bar for each index over a logarithmic axis; `kinds` (a verdict's tone each) decide colour and sign."""
    numbers = [v for v in values if is_number(v)] + [edge for band in bands for edge in (band.low, band.high)]
    frame = _Frame(labels, numbers)
    parts = [*map(frame.band, bands), *frame.axes(x_name, y_name)]
    base, width = _TOP + frame.plot, max(1.2, min(22.0, 0.8 * frame.step))
    for index, (value, kind, text) in enumerate(zip(values, kinds, words, strict=True)):
        x = frame.x(index)
        if not is_number(value):
            parts.append(
                Markup('<text class="tick middle" x="{}" y="{}">?<title>{}</title></text>').format(x, base - 3, text)
            )
            continue
        # An exact tie has no height on a logarithmic axis: it keeps a foot.
        top = min(frame.y(value), base - 2)
        parts.append(
            Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                kind, round(x - width / 2, 1), top, round(width, 1), round(base - top, 1), text
            )
        )
        if kind in _SIGNS:
            sign = _SIGNS[kind]
            parts.append(
                Markup('<path class="sign {}" transform="translate({} {})" d="{}"/>').format(
                    kind, x, max(top - 2, _TOP + 9), sign
                )
            )
    return frame.svg(about, parts) + _legend([], bands, [kind for kind in _KINDS if kind in kinds])


def _bar_key(kind: str) -> Markup:
    bar = Markup('<rect class="bar {}" x="2" width="9" height="10"/>').format(kind)
    if kind not in _SIGNS:
        return bar
    return bar + Markup('<path class="sign {}" transform="translate(20 9)" d="{}"/>').format(kind, _SIGNS[kind])


def _legend(series: Sequence[Series], bands: Sequence[Band], kinds: Sequence[str] = ()) -> Markup:
    items = [
        Markup('<li><svg viewBox="0 0 26 10" aria-hidden="true">{}{}</svg>{}</li>').format(
            Markup('<polyline class="line s{}" points="0,5 26,5"/>').format(one.style),
            _marker(13, 5, one.style),
            one.name,
        )
        for one in series
    ]
    items += [
        Markup('<li><svg viewBox="0 0 26 10" aria-hidden="true">{}</svg>{}</li>').format(_bar_key(kind), _KINDS[kind])
        for kind in kinds
    ]
    items += [
        Markup('<li><svg viewBox="0 0 26 10" aria-hidden="true">{}</svg>{}</li>').format(
            Markup('<line class="bound b{}" x1="0" x2="26" y1="5" y2="5"/>').format(band.style)
            if band.low == band.high
            else Markup('<rect class="band b{}" width="26" height="10"/>').format(band.style),
            band.name,
        )
        for band in bands
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
