"""Heat maps, layers by stages, as rows of cells with the numbers behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aprjax.bisect.page.formats import is_number, number, place, rounded
from aprjax.bisect.page.scales import colour_bin
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

_LEADING = (Stage.EMBEDDING,)
_TRAILING = (Stage.FINAL_NORM, Stage.LM_HEAD)
_KNOWN = {str(stage) for stage in Stage}

# The details beside a heat map are as high as about thirty rows; half of that is no hole.
_FEW_ROWS = 14


@dataclass(frozen=True)
class Cell:
    """One stage of one layer.

    Attributes:
        layer, stage: its place.
        bins: by measure, the class of its colour.
        words: what a reader hears who does not see colours.
        mark: "first", "beyond" or "".
        data: what the detail view shows.
    """

    layer: int
    stage: str
    bins: dict[str, str]
    words: str
    mark: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeatMap:
    """A table of cells.

    Attributes:
        key: distinguishes the heat maps of one page.
        title: what it shows.
        measures: (name, words) of what its colours can stand for; the first is shown.
        stages: the columns.
        rows: (layer, its cells by column).
        before, after: cells of the stages outside the layers.
        shown: the (layer, stage) whose details are open at first; None where there is nothing to show.
        context: what the details need beside the cells: positions and the tokens' texts.
        marks: the marks that occur.
    """

    key: str
    title: str
    measures: list[tuple[str, str]]
    stages: list[str]
    rows: list[tuple[int, list[Cell]]]
    before: list[Cell]
    after: list[Cell]
    shown: tuple[int, str] | None
    context: dict[str, Any]
    marks: dict[str, str]

    @property
    def low(self) -> bool:
        """Whether the details stand below it: beside a few rows they would leave a hole under them."""
        return len(self.rows) <= _FEW_ROWS

    def cells(self) -> Iterable[Cell]:
        """Every cell, in execution order."""
        yield from self.before
        for _, row in self.rows:
            yield from row
        yield from self.after

    def data(self) -> dict[str, Any]:
        """The JSON that the script reads."""
        cells = {f"{cell.layer}:{cell.stage}": cell.data for cell in self.cells()}
        return {
            "cells": cells,
            "shown": None if self.shown is None else f"{self.shown[0]}:{self.shown[1]}",
        } | self.context


def of_layers(report: Mapping[str, Any], key: str, texts: Mapping[int, str]) -> HeatMap | None:
    """The heat map of a `layers` report; None where no layer was run."""
    first = report.get("first_divergence") or {}
    accused = (first.get("layer"), first.get("stage"))
    cells = {
        (layer["layer"], stage): _layers_cell(layer["layer"], stage, found, (layer["layer"], stage) == accused)
        for layer in report["layers"]
        for stage, found in layer["stages"].items()
        if stage in _KNOWN
    }
    prompt = report["prompt"]
    context = {
        "positions": prompt["positions"],
        "tokens": [texts.get(token, f"[{token}]") for token in prompt["tokens"]],
    }
    measures = [
        ("local", "local: from the reference’s own inputs"),
        ("free", "running: local and inherited"),
        ("ratio", "std ratio, as |ratio − 1|"),
    ]
    marks = {"first": "first divergence", "beyond": "more than rounding explains"}
    return _built(
        key,
        "Relative L2 by layer and stage",
        measures=measures,
        cells=cells,
        accused=accused,
        context=context,
        marks=marks,
    )


def _layers_cell(layer: int, stage: str, found: Mapping[str, Any], accused: bool) -> Cell:
    local, free, ratio = found.get("local_rel_l2"), found.get("rel_l2"), found.get("std_ratio")
    tolerance, unmeasured = found.get("tolerance"), found.get("unmeasured")
    # Between two arithmetics only what the file itself adds is judged; the report does not say that number.
    mixed = found.get("arithmetic_rel_l2") is not None
    beyond = not mixed and is_number(local) and is_number(tolerance) and local > tolerance
    at = found.get("max_abs_at") or [None, None]
    keys = ("rms_ratio", "cosine", "max_abs", "share_1e3", "share_5e3", "arithmetic_rel_l2", "tolerance")
    data: dict[str, Any] = {name: rounded(found.get(name)) for name in keys}
    data |= {"local": rounded(local), "free": rounded(free), "ratio": rounded(ratio)}
    data |= {"at": at, "massive": found.get("massive_channels") or [], "spread": found.get("spread") or {}}
    rest = found.get("without_massive")
    data["rest"] = None if rest is None else rounded(rest.get("rel_l2"))
    if unmeasured or (local is None and free is None):
        data["unmeasured"] = unmeasured or "no value that could be compared"
        words = f"{place(layer, stage)}: unmeasured"
    else:
        words = f"{place(layer, stage)}: local {number(local, 2)}, running {number(free, 2)}, std ratio {number(ratio)}"
    bins = {"local": colour_bin(local), "free": colour_bin(free)}
    bins["ratio"] = colour_bin(None if ratio is None else ratio - 1)
    mark = "first" if accused else ("beyond" if beyond else "")
    return Cell(
        layer,
        stage,
        bins,
        words + {"first": ", first divergence", "beyond": ", beyond rounding"}.get(mark, ""),
        mark,
        data,
    )


def of_replay(report: Mapping[str, Any], key: str) -> HeatMap | None:
    """The heat map of a `replay` report: the worst position of every node."""
    cells = {}
    accused = next(
        ((node["layer"], node["stage"]) for node in report["nodes"] if node["verdict"] == "unexplained"), None
    )
    for node in report["nodes"]:
        layer, stage, verdict = node["layer"], node["stage"], node["verdict"]
        worst = None if verdict == "unmeasured" else node.get("worst_row")
        broken = verdict == "unexplained" and worst is None
        keys = ("mismatches", "count", "tolerance", "rel_l2", "max_abs", "max_ulps")
        data: dict[str, Any] = {name: rounded(node.get(name)) for name in keys}
        data |= {"local": rounded(worst), "at": node.get("max_abs_at") or [None, None], "verdict": verdict}
        data |= {
            "by": node.get("arithmetic", ""),
            "reason": node.get("reason", ""),
            "through": node.get("through") or [],
        }
        if verdict == "unmeasured":
            data["unmeasured"] = node.get("reason") or "not measured"
        mark = "beyond" if verdict == "unexplained" else ""
        words = f"{place(layer, stage)}: {verdict}, worst position {number(worst, 2)}"
        shade = colour_bin(float("inf") if broken else worst)
        cells[layer, stage] = Cell(layer, stage, {"local": shade}, words, mark, data)
    title = "Distance of every node from what the file gives, worst position"
    measures = [("local", "relative L2 of the worst position")]
    unexplained = {"beyond": "unexplained by the file"}
    return _built(key, title, measures=measures, cells=cells, accused=accused, context={}, marks=unexplained)


def _absent(layer: int, stage: str, measures: list[tuple[str, str]]) -> Cell:
    bins = {name: "none" for name, _ in measures}
    return Cell(layer, stage, bins, f"{place(layer, stage)}: unmeasured", data={"unmeasured": "not in the report"})


def _built(
    key: str,
    title: str,
    *,
    measures: list[tuple[str, str]],
    cells: dict[tuple[int, str], Cell],
    accused: tuple[Any, Any] | None,
    context: dict[str, Any],
    marks: dict[str, str],
) -> HeatMap | None:
    if not cells:
        return None
    stages = [str(stage) for stage in LAYER_STAGES]
    layers = sorted({layer for layer, _ in cells if layer != OUTSIDE})
    rows = [
        (layer, [cells.get((layer, stage)) or _absent(layer, stage, measures) for stage in stages]) for layer in layers
    ]
    before = [cells[OUTSIDE, stage] for stage in map(str, _LEADING) if (OUTSIDE, stage) in cells]
    after = [cells[OUTSIDE, stage] for stage in map(str, _TRAILING) if (OUTSIDE, stage) in cells]
    shown = accused if accused in cells else None
    if shown is None:
        shown = max(cells, key=lambda at: cells[at].data.get("local") or 0.0)
    present = {cell.mark for cell in cells.values()}
    kept = {mark: words for mark, words in marks.items() if mark in present}
    return HeatMap(key, title, measures, stages, rows, before, after, shown, context, kept)
