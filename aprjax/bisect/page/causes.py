"""Sections of causes: `files`, `locate`, `attribute`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from aprjax.bisect.page.formats import number, percent, place, signed
from aprjax.bisect.page.parts import Bar, Block, Step, bars, columns, facts, paragraph, table, waterfall

_TENSORS = 60
# Bars of a waterfall: what a screen shows, of those that are more than a hair's breadth; the others are one bar.
_STEPS = 16
_HAIR = 1 / 500
# The gap is computed from the same numbers: beyond a tenth of a per cent of the change something is missing.
_CUT = 1e-3


def files_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of a `files` report."""
    total, same, decoded = report["compared"], report["identical_bytes"], report["decoded"]
    blocks = [
        Block(
            "", facts([("tensors", total), ("identical bytes", same), ("decoded on both sides", decoded)]), plain=True
        )
    ]
    causes = report.get("causes") or []
    if causes:
        rows = [
            [
                c["id"] or "unexplained",
                len(c["tensors"]),
                c["sentence"],
                "nothing" if c.get("residual") == 0 else number(c.get("residual")),
                c.get("basis") or "",
                confidence(c),
                c.get("next_step") or "",
            ]
            for c in causes
        ]
        heads = columns("'explained by", "#tensors", "what happened", "#left", "measured on", "how sure", "next")
        blocks.append(Block("What explains the difference", table(heads, rows, label="Causes"), plain=True))
    config = report.get("config") or {}
    if config:
        rows = [[key, repr(pair["model"]), repr(pair["ref"])] for key, pair in config.items()]
        blocks.append(
            Block("Config keys that differ", table(columns("'key", "'model", "'ref"), rows, label="Config"), plain=True)
        )
    differing = [t for t in report["tensors"] if not t.get("same_values")]
    if differing:
        differing.sort(key=lambda t: -math.inf if t.get("rel_l2") is None else -t["rel_l2"])
        rows = [
            [
                t["name"],
                *(str(kind) for kind in t["block_types"]),
                *(number(t.get(k)) for k in ("rel_l2", "cosine", "max_abs", "rows")),
                t.get("explanation_id") or "nothing",
                _excluded(t.get("excluded") or []),
            ]
            for t in differing[:_TENSORS]
        ]
        heads = columns(
            "'tensor",
            "'model",
            "'ref",
            "#rel L2",
            "#cosine",
            "#max |Δ|",
            "#rows",
            "'explained by",
            "tried and excluded",
        )
        blocks.append(
            Block("Tensors that differ in value", table(heads, rows, label="Tensors that differ"), plain=True)
        )
    types = sorted({kind for side in report["sides"].values() for kind in side.get("block_types") or {}})
    if types:
        sides = report["sides"]
        rows = [[kind, *(_held(side["block_types"].get(kind)) for side in sides.values())] for kind in types]
        blocks.append(Block("Block types", table(columns("'type", *sides), rows, label="Block types"), folded=True))
    return blocks


def _held(found: Any) -> str:
    return f"{found[0]} tensors, {number(found[1] / 2**20)} MiB" if found else "none"


def _excluded(found: list[Any]) -> str:
    return "; ".join(f"{name} leaves {number(left, 2)}" for name, left in found[:3])


def confidence(holder: Mapping[str, Any]) -> str:
    """A confidence in words; "" where the report says none."""
    found = holder.get("confidence")
    if not isinstance(found, Mapping):
        return str(found or "")
    return f"{found.get('level')}: {found.get('basis')}" if found.get("basis") else str(found.get("level"))


def locate_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of a `locate` report."""
    floor = report.get("floor")
    blocks = [
        Block(
            "",
            facts(
                [
                    ("drift of the logits", number(report.get("drift"))),
                    ("noise explains", number(floor) if floor else "nothing: equal to the bit or not"),
                    ("flips", report.get("flips")),
                    ("half of it by layer", report.get("half_at")),
                    *(
                        (f"passes of the {side}", f"{number(p['passes'])} in {p['runs']} runs")
                        for side, p in report["passes"].items()
                    ),
                ]
            )
            + paragraph(f"The floor: {report['floor_basis']}." if report.get("floor_basis") else ""),
            plain=True,
        )
    ]
    faults = report.get("faults") or []
    if faults:
        rows = [
            [
                place(f["layer"], f["stage"]),
                *(number(f.get(key)) for key in ("before", "after")),
                percent(f.get("healed")),
                number(f.get("infects")),
                _parts(f.get("parts")),
                ". ".join(filter(None, (f["cause"], confidence(f)))),
            ]
            for f in faults
        ]
        heads = columns("place", "#drift before", "#after", "#healed", "#infects", "part of it", "cause, and how sure")
        blocks.append(Block("What causes the drift", table(heads, rows, label="Causes"), plain=True))
        steps = list(dict.fromkeys(f["next_step"] for f in faults if f.get("next_step")))
        if len(steps) > 1:
            blocks.append(Block("What to do, place by place", Markup("").join(map(paragraph, steps)), plain=True))
    if report.get("choices"):
        rows = [
            [c["name"], c["model"], c["ref"], *(number(c.get(key)) for key in ("before", "after", "infects"))]
            for c in report["choices"]
        ]
        heads = columns(
            "choice", "the model", "the reference", "#drift before", "#put right", "#put into the reference"
        )
        note = "One choice of the arithmetics at a time, switched in all layers at once."
        blocks.append(Block("What the arithmetics’ choices do", table(heads, rows, label="Choices"), note, plain=True))
    runs = report.get("runs") or []
    if runs:
        note = (
            "Each run puts values of one side into the other; the bar is the drift that is left, on a logarithmic "
            "scale; the line is what noise explains."
        )
        blocks.append(Block("The search, run by run", _runs(runs, floor), note))
    return blocks


def _parts(parts: Mapping[str, Any] | None) -> str:
    if not parts:
        return "all of it"
    healed = "" if parts.get("healed") is None else f"; alone they heal {percent(parts['healed'])}"
    names = ", ".join(parts["names"][:6]) + (" …" if len(parts["names"]) > 6 else "")
    shown = parts["positions"]
    where = f"positions {', '.join(map(str, shown[:6]))}{' …' if len(shown) > 6 else ''}"
    return f"{names} ({len(parts['names'])} of {parts['of']} {parts['kind']}), {where}{healed}"


def _runs(runs: list[Mapping[str, Any]], floor: float | None) -> Markup:
    drifts = [run["drift"] for run in runs if run.get("drift")]
    edges = [math.log10(value) for value in (*drifts, *([floor] if floor else []))]
    low, high = (min(edges) - 0.3, max(edges)) if edges else (0.0, 1.0)

    def length(value: float | None) -> float:
        return 0.0 if not value else max(0.01, (math.log10(value) - low) / ((high - low) or 1.0))

    found = []
    for index, run in enumerate(runs, 1):
        into_ref = run["side"] == "ref"
        # The model's value put into the reference is to show the drift: there "healed" would be the surprise.
        if into_ref:
            sign, kind, word = ("→", "none", "infects") if not run["healed"] else ("○", "none", "does not infect")
        else:
            sign, kind, word = ("✓", "good", "healed") if run["healed"] else ("≠", "bad", "not healed")
        drift = "not finite" if run.get("drift") is None else number(run["drift"], 3)
        note = f"{word}; {run['side']} ran {run['layers']} layers" + (
            "" if run["measured"] == "logits" else f", measured at {run['measured']}"
        )
        share = 1.0 if run.get("drift") is None else length(run["drift"])
        found.append(
            Bar(f"{index}. {run['question']}", drift, share, kind, sign, note, length(floor) if floor else None)
        )
    return bars(found, label="Runs of the search")


def attribute_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of an `attribute` report."""
    metric, shares = report["metric"], report.get("contributions") or []
    unit = "nats" if metric["kind"] == "kl" else "logits"
    blocks = [
        Block(
            "",
            facts(
                [
                    (metric["kind"], f"{number(metric['ref'])} → {number(metric['model'])} {unit}"),
                    ("change", signed(metric["change"], 4)),
                    ("shares miss", percent(report.get("gap"), 2)),
                    ("first-order estimates miss", percent(report.get("first_order_gap"), 0)),
                    ("gradients", report.get("steps")),
                ]
            ),
            plain=True,
        )
    ]
    if not shares:
        return blocks
    note = f"From the reference’s {metric['kind']} to the model’s, one bar for each stage’s own error, in {unit}."
    blocks.append(Block("Waterfall", _waterfall(report, shares), note))
    by_source: dict[str, float] = {}
    for c in shares:
        by_source[c["source"]] = by_source.get(c["source"], 0.0) + c["integrated"]
    if report.get("causes"):
        note_of = "“Put in” and “taken out” are real runs of this one thing: into the reference, and out of the model."
        blocks.append(Block("What makes the change", _cause_table(report["causes"]), note_of, plain=True))
        steps = list(dict.fromkeys(c["next_step"] for c in report["causes"] if c.get("next_step")))
        if len(steps) > 1:
            blocks.append(Block("What to do, cause by cause", Markup("").join(map(paragraph, steps)), folded=True))
    rows = [
        [
            place(c["layer"], c["stage"]),
            c["source"],
            *(signed(c.get(k)) for k in ("integrated", "first_order", "infects", "heals")),
            "; ".join(f"{name}: {signed(part, 2)}" for name, part in (c.get("parts") or [])[:2] if part),
            "; ".join(f"{at}: {signed(part, 2)}" for at, part in (c.get("positions") or [])[:3] if part),
        ]
        for c in shares
    ]
    heads = columns(
        "place", "from the", "#share", "#first order", "#put in", "#taken out", "most of it", "at positions"
    )
    note = "; ".join(f"from the {source}: {signed(value, 4)}" for source, value in by_source.items())
    note += (
        ". “Put in” and “taken out” are real runs: the error alone put into the reference, and taken out of the model."
    )
    blocks.append(Block("Shares", table(heads, rows, label="Shares of the change", shown=8), note, plain=True))
    return blocks


def _cause_table(found: list[Mapping[str, Any]]) -> Markup:
    rows = [
        [
            c["kind"],
            ". ".join(filter(None, (c["sentence"], confidence(c)))),
            *(signed(c.get(key)) for key in ("integrated", "infects", "heals")),
            "; ".join(f"{where}: {signed(part, 2)}" for where, part in (c.get("places") or [])[:3]),
        ]
        for c in found
    ]
    heads = columns("kind", "what differs, and how sure", "#share", "#put in", "#taken out", "most of it arises at")
    return table(heads, rows, label="Causes of the change", shown=8)


def _waterfall(report: Mapping[str, Any], shares: list[Mapping[str, Any]]) -> Markup:
    metric = report["metric"]
    steps = [Step("reference", metric["ref"], None, "", "end", number(metric["ref"]))]
    level = metric["ref"]
    largest = max(abs(c["integrated"]) for c in shares)
    seen = sum(abs(c["integrated"]) >= _HAIR * largest for c in shares)
    shown, rest = shares[: min(seen, _STEPS)], shares[min(seen, _STEPS) :]
    for c in shown:
        size, name = c["integrated"], place(c["layer"], c["stage"])
        steps.append(Step(name, level, size, f"from the {c['source']}", _direction(size), signed(size)))
        level += size
    if rest:
        size = sum(c["integrated"] for c in rest)
        steps.append(Step(f"{len(rest)} more stages", level, size, "", "rest", signed(size)))
        level += size
    gap = metric["model"] - level
    missed = f"{percent(report.get('gap'), 2)} of the change"
    # Committed evidence may have been cut to its largest shares: the rest of them is no gap.
    cut = abs(abs(gap) - (report.get("gap") or 0.0) * abs(metric["change"])) > _CUT * abs(metric["change"])
    name = "stages that this file leaves out" if cut else "what the shares miss"
    steps.append(Step(name, level, gap, "" if cut else missed, "gap", signed(gap)))
    steps.append(Step("model", metric["model"], None, "", "end", number(metric["model"])))
    return waterfall(steps, label="The change, stage by stage")


def _direction(size: float) -> str:
    return "up" if size >= 0 else "down"
