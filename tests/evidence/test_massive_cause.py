"""The evidence about the cause of the massive activation's error: its text says what its JSON says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "evidence" / "massive-activation-cause-2026-11-23"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
REPORTS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
LINKS = re.findall(r'\[([^\]]+)\]\((\w+\.json) "([^"]+)"\)', README)


@pytest.mark.parametrize(("text", "file", "place"), LINKS, ids=[f"{file} {place}" for _, file, place in LINKS])
def test_a_number_in_the_text_is_the_one_in_the_json(text: str, file: str, place: str) -> None:
    value: Any = REPORTS[file]
    for key in place.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    if isinstance(value, str):
        assert text in value
        return
    printed = text.removesuffix("%").strip()
    digits = len(printed.partition(".")[2])
    assert f"{value * (100 if text.endswith('%') else 1):.{digits}f}" == printed


def test_what_is_quoted_stands_in_the_reports() -> None:
    """And they meet what the issue asks for: the cause by name, the gap, the place."""
    attribute = REPORTS["attribute.json"]
    prose = " ".join(README.split())
    for quoted in re.findall(r'"(channel 408[^"]+)"', prose):
        assert quoted in attribute["causes"][0]["sentence"]
    assert attribute["gap"] <= 0.01
    assert attribute["steps"] == 32
    assert attribute["causes"][0]["name"] == "activations quantized per 256 (Q8_K)"
    assert all(Path(side["path"]).name == side["path"] for side in attribute["sides"].values())
    places = [(found["layer"], found["stage"]) for found in attribute["contributions"][:2]]
    assert places == [(26, "ffn_up"), (26, "ffn_gate")]
    located = REPORTS["locate.json"]
    assert {(fault["layer"], fault["stage"]) for fault in located["faults"]} == {*places}
    assert all("activations quantized per 256 (Q8_K)" in fault["cause"] for fault in located["faults"])
    assert [choice["name"] for choice in located["choices"]] == ["activations"]


def test_no_number_in_the_text_stands_alone() -> None:
    """Every decimal is a link, a quotation of a report, or the cosine that the other measurement has."""
    quoted = r'\[[^\]]+\]\(\w+\.json "[^"]+"\)|`[^`]*`|^ {4}.*$|"channel 408[^"]+"'
    prose = re.sub(quoted, "", README, flags=re.MULTILINE)
    other = FOLDER.with_name("massive-activation-2026-11-23") / "result.json"
    hidden = next(c for c in json.loads(other.read_text("ascii"))["claims"] if c["id"] == "hidden-by-cosine")
    decimals = re.findall(r"-?\d+\.\d+", prose.replace("Qwen2.5", "").replace("1.5B", ""))
    assert decimals == [f"{hidden['found'][1]:.4f}"]
