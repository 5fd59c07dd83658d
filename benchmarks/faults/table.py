"""The fault bench's table, from the lines that `bench.py` wrote.

    python benchmarks/faults/table.py RESULTS.jsonl --out benchmarks/results/DATE-faults

Writes `DATE-faults.json` (every case, with what was measured where) and `DATE-faults.md`, whose numbers are all made of
that JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = "aprjax.fault-bench/1"
MODELS = ("tiny", "tiny-mha", "0.5b", "1.5b")
SINGLE = ("file", "computation", "trace")
GROUP_WORDS = {
    "file": "a right engine with a faulty file",
    "computation": "a faulty engine with a right file",
    "trace": "a right engine, its dump mislabelled",
    "pair": "two faults at once",
    "locate": "one fault, by `locate`",
    "clean": "nothing planted",
}
_LIBRARIES = ("aprjax", "jax", "jaxlib", "flax", "numpy", "gguf", "llama-cpp-python")
Row = dict[str, Any]


def document(results: list[Row], command: str) -> dict[str, Any]:
    """All results, with the machine and versions at hand."""
    return {"schema": SCHEMA, "command": command, "machine": machine(), "versions": versions(), "results": results}


def machine() -> str:
    """Processor, cores and system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Of Python and of what computed, as far as it is installed."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def lean(row: Row) -> Row:
    """A result as it is committed: without what is empty or says nothing new, seconds to the millisecond."""
    case = {key: value for key, value in row["case"].items() if value not in (None, [], "")}
    case.pop("parts", None)
    kept = {key: value for key, value in row.items() if value not in (None, "", {}, [], False)}
    measures = {k: v for k, v in row.get("measures", {}).items() if k not in _BOUNDS}
    flags = {key: row[key] for key in ("localised", "explained", "both") if row.get(key) is not None}
    seconds = {key: round(value, 3) for key, value in row.get("seconds", {}).items()}
    kept |= {"case": case, "seconds": seconds, **flags}
    kept.pop("measures", None)
    if not row.get("reason"):
        # Where nothing is to be said, what was found is what was expected.
        kept.pop("found", None)
    return {**kept, "measures": measures} if measures else kept


# Kept in the evidence about bounds, not here.
_BOUNDS = ("std_ratio", "cosine", "logit_cosine", "flips", "positions", "rivals", "verdict")


def write_json(path: Path, doc: dict[str, Any]) -> None:
    """One line per result, so that a change of one shows as one."""
    head = {key: value for key, value in doc.items() if key != "results"}
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in doc["results"])
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{text},\n "results": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def share(rows: Iterable[Row], flag: str) -> str:
    """`12 of 13`, of the rows that have the flag."""
    known = [row[flag] for row in rows if row.get(flag) is not None]
    return f"{sum(known)} of {len(known)}" if known else "-"


def percent(rows: Iterable[Row], flag: str) -> str:
    """The same in per cent."""
    known = [row[flag] for row in rows if row.get(flag) is not None]
    return f"{100 * sum(known) / len(known):.1f} %" if known else "-"


def right(row: Row) -> bool:
    """Of a single fault: it is localised, where it has a place, and explained."""
    return row.get("localised") is not False and row.get("explained") is not False


def wrong(rows: Iterable[Row]) -> int:
    """Cases with wrong blame."""
    return sum(bool(row.get("wrong_blame")) for row in rows)


def middle(rows: Iterable[Row], field: str, part: Callable[[str], bool] = lambda name: True) -> str:
    """The median, over cases, of what one case took in all."""
    sums = [sum(value for key, value in row.get(field, {}).items() if part(key)) for row in rows if row.get(field)]
    return f"{statistics.median(sums):.2g}" if sums else "-"


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose case has these fields."""
    return [row for row in rows if all(row["case"].get(key) == value for key, value in wanted.items())]


_WORDS = (
    "Faults are planted by code that shares nothing with what detects them: bytes changed by NumPy and gguf-py, and",
    "encoded by ggml; computations by a NumPy engine of their own.",
    "",
    "- *Localised*: the first divergence is the planted layer and stage; in a mislabelled dump: the first finding",
    "  names exactly the layers and stages; of a file that is refused: the refusal names the tensor.",
    "- *Explained*: the first explanation is the planted fault, with its parameters, of every tensor that it touched,",
    "  and no other tensor is accused. Of controls, faults that no hypothesis is about, the right explanation is none.",
    "  Explanations that no trace can tell apart (a product times a factor, its matrix times it) are both right.",
    "- *Wrong blame*: another place, tensor or cause is named, first or beside the right one.",
    "- Passes are forward passes, seconds wall time, of one case; medians.",
)


def markdown(doc: dict[str, Any]) -> str:
    """The table, with a summary, and every miss with its reason."""
    rows = doc["results"]
    singles = [row for row in rows if row["case"]["group"] in SINGLE]
    clean, pairs = of(rows, group="clean"), of(rows, group="pair")
    located = of(rows, group="locate")
    good = sum(map(right, singles))
    alarms = sum(bool(row.get("false_alarm")) for row in clean)
    text = [
        "# The fault bench",
        "",
        "Made by `python benchmarks/faults/table.py` of what this wrote:",
        "",
        "```",
        doc["command"],
        "```",
        "",
        f"{doc['machine']}; {', '.join(f'{name} {version}' for name, version in doc['versions'].items())}.",
        "Other work ran on the machine, so seconds are upper bounds.",
        *([doc["judged_by"]] if doc.get("judged_by") else []),
        "",
        f"- **Single faults**: {good} of {len(singles)} ({100 * good / max(1, len(singles)):.1f} %) are localised to",
        "  the exact layer and stage and explained by the right hypothesis first.",
        f"- **Clean pairs**: {alarms} false alarms in {len(clean)}.",
        f"- **Two faults at once**: both found in {share(pairs, 'both')} ({percent(pairs, 'both')}).",
        "",
        *_WORDS,
        "",
        "## By model",
        "",
        "| model | faults | cases | localised | explained | both right | wrong blame | passes | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for group in SINGLE:
            part = of(rows, model=model, group=group)
            if part:
                text.append(
                    f"| {model} | {GROUP_WORDS[group]} | {len(part)} | {share(part, 'localised')} | "
                    f"{share(part, 'explained')} | {sum(map(right, part))} of {len(part)} | "
                    f"{wrong(part)} | {middle(part, 'passes')} | "
                    f"{middle(part, 'seconds')} |"
                )
    text += ["", "## Clean pairs", "", "| model | pairs | false alarms | seconds |", "|---|---|---|---|"]
    for model in MODELS:
        part = of(clean, model=model)
        if part:
            false = sum(bool(row.get("false_alarm")) for row in part)
            text.append(f"| {model} | {len(part)} | {false} | {middle(part, 'seconds')} |")
    text += [
        "",
        "## Two faults at once",
        "",
        "Drawn at random from the single faults. Of files: `files` explains both, `layers` finds the first place and,",
        "that one mended, the second. Of a computation: `explain` names both, each at its place.",
        "",
        "| model | faults | pairs | both found | wrong blame | both by one `locate` | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for kind in ("file pair", "computation pair"):
            part = of(pairs, model=model, fault=kind)
            if part:
                both = [row["measures"] for row in part if "located both" in row.get("measures", {})]
                told = f"{sum(m['located both'] for m in both)} of {len(both)}" if both else "-"
                text.append(
                    f"| {model} | {kind.removesuffix(' pair')} | {len(part)} | {share(part, 'both')} | "
                    f"{wrong(part)} | {told} | {middle(part, 'seconds')} |"
                )
    text += [
        "",
        "## `locate`",
        "",
        "| model | cases | right place | wrong places | most passes: model | reference | linear scan | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        part = of(located, model=model)
        if part:
            most = [
                max((row.get("passes", {}).get(f"locate {s}", 0.0) for row in part), default=0.0)
                for s in ("model", "ref")
            ]
            text.append(
                f"| {model} | {len(part)} | {share(part, 'localised')} | {wrong(part)} | "
                f"{most[0]:.1f} | {most[1]:.1f} | {part[0]['measures']['linear']} | {middle(part, 'seconds')} |"
            )
    text += _large(doc.get("explain", [])) + _by_fault(singles) + _misses(rows)
    return "\n".join(text) + "\n"


def _large(measured: list[Row]) -> list[str]:
    """What `explain_cost.py` measured on a large model."""
    if not measured:
        return []
    text = [
        "",
        "## `explain` on a large model",
        "",
        "By `python benchmarks/faults/explain_cost.py`: a saved trace of a copy with another epsilon, and llama.cpp",
        "run live with another rotary base. Memory is the largest resident set; the live engine is another process and",
        "not in it.",
        "",
        "| model | side | found | right | residual | wall s | processor s | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        residuals = ", ".join(f"{before:.1g} -> {after:.1g}" for before, after in row["residuals"])
        right, seconds = ("yes" if row["right"] else "no"), row["seconds"]
        text.append(
            f"| {row['model']} | {row['side']} | {'; '.join(row['found'])} | {right} | {residuals} | "
            f"{seconds['wall']:.0f} | {seconds['processor']:.0f} | {row['gib']} |"
        )
    return text


def _by_fault(singles: list[Row]) -> list[str]:
    text = []
    for group in SINGLE:
        part = of(singles, group=group)
        text += ["", f"## Every fault: {GROUP_WORDS[group]}", ""]
        text += [
            "| fault | strengths | cases ("
            + ", ".join(MODELS)
            + ") | localised | explained | wrong blame | passes | seconds |"
        ]
        text += ["|---|---|---|---|---|---|---|---|"]
        for fault in dict.fromkeys(row["case"]["fault"] for row in part):
            these = of(part, fault=fault)
            strengths = sorted({row["case"]["strength"] for row in these if row["case"].get("strength") is not None})
            counts = ", ".join(str(len(of(these, model=model))) for model in MODELS)
            numbers = ", ".join(f"{s:g}" for s in strengths) or "-"
            text.append(
                f"| {fault} | {numbers} | {counts} | {share(these, 'localised')} | "
                f"{share(these, 'explained')} | {wrong(these)} | "
                f"{middle(these, 'passes')} | {middle(these, 'seconds')} |"
            )
    return text


def _misses(rows: list[Row]) -> list[str]:
    """Everything that was not as it should be, and why."""
    bad = [
        row
        for row in rows
        if not right(row) or row.get("both") is False or row.get("false_alarm") or row.get("wrong_blame")
    ]
    text = ["", f"## What was missed, and why: {len(bad)} cases", ""]
    text += [f"- `{row['case']['key']}`: {row.get('reason', '').replace('|', '/')}" for row in bad]
    return text if bad else [*text, "Nothing."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="lines of bench.py")
    parser.add_argument("--out", type=Path, required=True, help="path without an ending")
    parser.add_argument("--explain", type=Path, action="append", default=[], help="what explain_cost.py wrote")
    parser.add_argument("--judged-by", default="", help="a sentence on the commits that judged the cases")
    parser.add_argument("--command", default="python benchmarks/faults/bench.py --out RESULTS.jsonl")
    options = parser.parse_args()
    lines = [line for path in options.results for line in path.read_text(encoding="utf-8").splitlines()]
    # The last of a case counts: it was run again.
    latest = {row["case"]["key"]: lean(row) for row in map(json.loads, lines)}
    order = {name: index for index, name in enumerate(MODELS)}
    results = sorted(latest.values(), key=lambda row: (order[row["case"]["model"]], row["case"]["group"]))
    doc = document(results, options.command)
    large = [json.loads(path.read_text(encoding="utf-8")) for path in options.explain]
    doc["judged_by"] = options.judged_by
    doc["explain"] = [{"model": one["model"], **side} for one in large for side in one["sides"]]
    write_json(options.out.with_suffix(".json"), doc)
    options.out.with_suffix(".md").write_text(markdown(doc), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
