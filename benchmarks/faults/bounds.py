"""Which of upstream's bounds sees which planted fault: evidence, from the fault bench's measurements.

    python benchmarks/faults/bench.py --out RESULTS.jsonl --model 0.5b --group file --group computation --group clean
    python benchmarks/faults/bounds.py RESULTS.jsonl --out evidence/fault-bounds-DATE

Writes `result.json` and a README whose every number is made of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from table import MODELS, machine, versions

SCHEMA = "aprjax.fault-bounds/1"
# The band of upstream's forward parity and the floors of its cosines (contracts.md 1.2, 2.1).
BAND = (0.5, 2.0)
FLOORS = (0.98, 0.99, 0.999)
Row = dict[str, Any]
# From a row: whether a bound is broken.
Bound = Callable[[Row], bool]


def bounds(rows: Sequence[Row]) -> list[Row]:
    """What the bounds look at, of every single fault and of two arithmetics on one file."""
    found = []
    for row in rows:
        case, measured = row["case"], row.get("measures", {})
        control = str(case["fault"]).startswith("control")
        if "std_ratio" not in measured or case["group"] not in ("file", "computation", "clean") or control:
            continue
        ratios, cosines = measured["std_ratio"], measured["cosine"]
        judged = [row[key] for key in ("localised", "explained") if row.get(key) is not None]
        found.append(
            {
                "model": case["model"],
                "group": case["group"],
                "fault": case["fault"],
                "strength": case.get("strength"),
                "where": case.get("tensor") or ("" if case.get("layer") is None else f"layer {case['layer']}"),
                "least_ratio": _ends(ratios)[0],
                "greatest_ratio": _ends(ratios)[1],
                "least_cosine": _ends(cosines)[0],
                "logit_cosine": measured["logit_cosine"],
                "flips": measured["flips"],
                "positions": measured["positions"],
                "toolkit": all(judged) if judged and case["group"] != "clean" else None,
            }
        )
    return sorted(found, key=lambda one: (MODELS.index(one["model"]), one["group"]))


def _ends(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Least and greatest; none where a value is not finite, which breaks every bound."""
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if len(known) == len(values) else (None, None)


def outside(row: Row, band: tuple[float, float]) -> bool:
    """Whether a layer's std ratio lies outside a band, or is none."""
    least, greatest = row["least_ratio"], row["greatest_ratio"]
    return least is None or not (band[0] <= least and greatest <= band[1])


def below(row: Row, key: str, floor: float) -> bool:
    """Whether a cosine lies below a floor, or is none."""
    return row[key] is None or row[key] < floor


def clean_spread(rows: Sequence[Row]) -> dict[str, float]:
    """How far two arithmetics on one file drive what the bounds look at."""
    clean = [row for row in rows if row["group"] == "clean"]
    ends = [row[key] for row in clean for key in ("least_ratio", "greatest_ratio")]
    return {
        "ratio": max((abs(math.log(value)) for value in ends), default=0.0),
        "cosine": 1.0 - min((row["least_cosine"] for row in clean), default=1.0),
        "logit_cosine": 1.0 - min((row["logit_cosine"] for row in clean), default=1.0),
    }


def checks(rows: Sequence[Row]) -> dict[str, Bound]:
    """Upstream's bounds, and the tightest that two arithmetics on one file keep."""
    spread = clean_spread(rows)
    found: dict[str, Bound] = {"std ratio of every layer in [0.5, 2.0]": lambda row: outside(row, BAND)}
    for floor in FLOORS:
        found[f"cosine of the logits at least {floor}"] = lambda row, f=floor: below(row, "logit_cosine", f)
    for floor in FLOORS:
        found[f"cosine of every layer's output at least {floor}"] = lambda row, f=floor: below(row, "least_cosine", f)
    found["no position's best token flips"] = lambda row: row["flips"] > 0
    if spread["ratio"]:
        band = math.exp(-spread["ratio"]), math.exp(spread["ratio"])
        found["std ratios no farther from 1 than under two arithmetics"] = lambda row: outside(row, band)
        least = 1 - spread["cosine"]
        found["layers' cosines no lower than under two arithmetics"] = lambda row: below(row, "least_cosine", least)
        logits = 1 - spread["logit_cosine"]
        found["logits' cosine no lower than under two arithmetics"] = lambda row: below(row, "logit_cosine", logits)
    return found


def document(cases: Sequence[Row], commands: Sequence[str], **about: Any) -> dict[str, Any]:
    """The cases, with the machine and versions at hand."""
    head = {"schema": SCHEMA, "commands": list(commands), "machine": machine(), "versions": versions()}
    return {**head, **about, "cases": list(cases)}


def write(folder: Path, doc: dict[str, Any]) -> None:
    """The JSON, a line for each case, and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in doc.items() if key != "cases"}, indent=1).removesuffix("\n}")
    body = ",\n".join("  " + json.dumps(row) for row in doc["cases"])
    (folder / "result.json").write_text(f'{head},\n "cases": [\n{body}\n ]\n}}\n', encoding="ascii")
    (folder / "README.md").write_text(readme(doc), encoding="utf-8")


def readme(doc: dict[str, Any]) -> str:
    """The answer to questions (e) and (f), in words and tables."""
    rows = doc["cases"]
    faults, clean = [row for row in rows if row["group"] != "clean"], [row for row in rows if row["group"] == "clean"]
    models = [model for model in MODELS if any(row["model"] == model for row in faults)]
    spread, tests = clean_spread(rows), checks(rows)
    blind = [row for row in faults if not outside(row, BAND)]
    told = sum(bool(row["toolkit"]) for row in faults)
    words = ", ".join(f"{name} {version}" for name, version in doc["versions"].items())
    through = {floor: _through(faults, "logit_cosine", floor) for floor in FLOORS}
    still = sum(not outside(row, (0.99, 1.01)) for row in faults)
    wide = 100 * (math.exp(spread["ratio"]) - 1)
    text = [
        "# Which bound sees which fault",
        "",
        "Questions (e) and (f): can a band of [0.5, 2.0] on the standard deviation of each layer's `ffn_swigl` see any",
        "of the planted faults, and which bound would; and which faults do cosine floors of 0.98, 0.99 and 0.999 let",
        "through?",
        "",
        "```",
        *doc["commands"],
        "```",
        "",
        f"{doc['machine']}; {words}.",
        "",
        f"{len(faults)} single faults of {', '.join(models)} of Qwen2.5-Coder, planted one at a time in a file or in",
        f'an engine, compared over every position of "What is 2+2?" ({rows[0]["positions"]} tokens), both sides under',
        f"one arithmetic; and {len(clean)} pairs of one file under two arithmetics, which are no faults.",
        *doc.get("selection", []),
        *_kinds(doc),
        "",
        f"**(e)** The band sees {len(faults) - len(blind)} of {len(faults)} faults and lets {len(blind)} through;",
        f"{still} leave the ratio of every layer within a per cent of 1. Under two arithmetics a layer's ratio",
        f"is at most {wide:.2g} % from 1, so a band that narrow raises no alarm here; the table has what it sees.",
        "",
        f"**(f)** A floor of 0.98 on the logits' cosine lets {through[0.98]} of {len(faults)} faults through, 0.99",
        f"{through[0.99]}, 0.999 {through[0.999]}. Under two arithmetics the logits' cosine falls short of 1 by",
        f"{spread['logit_cosine']:.1e} at most, a layer's by {spread['cosine']:.1e}.",
        "",
        *_told(doc, told, len(faults)),
        "",
        "| bound | faults seen | let through | false alarms under two arithmetics |",
        "|---|---|---|---|",
    ]
    for name, broken in tests.items():
        seen, alarms = sum(map(broken, faults)), sum(map(broken, clean))
        text.append(f"| {name} | {seen} | {len(faults) - seen} | {alarms} of {len(clean)} |")
    text += [
        *_by_place(faults),
        "",
        "## What carries over to 7B",
        "",
        "That a bound on a statistic is blind to faults that keep the statistic is no property of a size, and carries",
        "over. The numbers do not: how far a fault of one layer moves the logits hangs on the depth and on the",
        "residual stream, and how far two arithmetics are apart on the width. Nothing was measured on a 7B model;",
        f"all numbers are of {', '.join(models)}.",
        "",
        "## Every fault",
        "",
        "Ratios are those of the layer where they are least and greatest; a dash: not finite.",
        "",
        "| model | fault | strength | where | std ratio | layers' cosine | logits' cosine | flips | let through by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in [*faults, *clean]:
        strength = "" if row["strength"] is None else f"{row['strength']:g}"
        ratio = f"{_shown(row['least_ratio'])} to {_shown(row['greatest_ratio'])}"
        flips = f"{row['flips']} of {row['positions']}"
        text.append(
            f"| {row['model']} | {row['fault']} | {strength} | {row['where']} | {ratio} | "
            f"{_shown(row['least_cosine'])} | {_shown(row['logit_cosine'])} | {flips} | {_blind_bounds(row)} |"
        )
    return "\n".join(text) + "\n"


def _kinds(doc: dict[str, Any]) -> list[str]:
    """How many kinds of the register are among the cases; nothing where the document does not say."""
    if "kinds" not in doc:
        return []
    words = {"file": "of files", "computation": "of computations"}
    told = [f"{have} of {known} kinds of faults {words[group]}" for group, (have, known) in doc["kinds"].items()]
    return [f"Measured are {' and '.join(told)}; a kind that is missing was refused by the reader, or not reached."]


def _told(doc: dict[str, Any], told: int, count: int) -> list[str]:
    if doc.get("judged") != "place":
        return [
            "The comparison stage by stage from the reference's own inputs (`layers`, `explain`) names",
            f"{told} of {count} at their place and by their cause.",
        ]
    return [
        "The bound that sees them is APRJAX-FORWARD-001's: each stage, computed from the reference's own inputs,",
        f"differs by no more than rounding explains. Of the planted layer it names the planted stage in {told} of",
        f"{count}. The cause was not asked for here (the fault bench asks for it).",
    ]


# Where a fault lies: name, and whether a row's layer is there (of all layers that faults lie in).
_PLACES: dict[str, Callable[[int | None, list[int], Row], bool]] = {
    "first layer": lambda layer, known, row: layer == known[0],
    "a middle layer": lambda layer, known, row: layer in known[1:-1],
    "last layer": lambda layer, known, row: layer == known[-1],
    "all layers": lambda layer, known, row: layer is None and not row["where"],
    "embedding, final norm, head": lambda layer, known, row: layer is None and bool(row["where"]),
}


def _by_place(faults: Sequence[Row]) -> list[str]:
    """What the band and the floors see, by where the fault lies; nothing where the rows do not say."""
    known = sorted({row["layer"] for row in faults if row.get("layer") is not None})
    if len(known) < 3:
        return []
    names = ", ".join(map(str, known))
    lines = [
        "",
        "## By where the fault lies",
        "",
        f"Layers {names}. Faults seen, of those that lie there:",
        "",
        "| where | faults | band | 0.98 | 0.99 | 0.999 | planted stage beyond rounding |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, lies in _PLACES.items():
        there = [row for row in faults if lies(row["layer"], known, row)]
        floors = " | ".join(str(sum(below(row, "logit_cosine", floor) for row in there)) for floor in FLOORS)
        band, told = (sum(outside(row, BAND) for row in there), sum(bool(row["toolkit"]) for row in there))
        lines.append(f"| {name} | {len(there)} | {band} | {floors} | {told} |")
    return lines


def _through(rows: Sequence[Row], key: str, floor: float) -> int:
    return sum(not below(row, key, floor) for row in rows)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _blind_bounds(row: Row) -> str:
    if row["group"] == "clean":
        return ""
    found = [] if outside(row, BAND) else ["band"]
    found += [str(floor) for floor in FLOORS if not below(row, "logit_cosine", floor)]
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="lines of bench.py")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = [line for path in options.results for line in path.read_text(encoding="utf-8").splitlines()]
    latest = {row["case"]["key"]: row for row in map(json.loads, lines)}
    commands = (__doc__ or "").split("\n\n")[1].split("\n")
    write(options.out, document(bounds(list(latest.values())), [line.removeprefix("    ") for line in commands]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
