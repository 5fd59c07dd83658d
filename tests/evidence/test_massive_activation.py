"""The evidence about the massive activation: its text says what its JSON says, and the model says so again."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "evidence" / "massive-activation-2026-11-23"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RESULT = json.loads((FOLDER / "result.json").read_text(encoding="ascii"))
LINKS = re.findall(r'(?<!!)\[([^\]]+)\]\(result\.json "([^"]+)"\)', README)


def look_up(place: str) -> Any:
    """`claims.value.verdict`: keys, indices, and ids of listed things."""
    value: Any = RESULT
    for key in place.replace("\\|", "|").split("."):
        if isinstance(value, list):
            value = value[int(key)] if key.isdigit() else next(item for item in value if item["id"] == key)
        else:
            value = value[key]
    return value


@pytest.mark.parametrize(("text", "place"), LINKS, ids=[place for _, place in LINKS])
def test_a_number_in_the_text_is_the_one_in_the_json(text: str, place: str) -> None:
    value = look_up(place)
    if isinstance(value, str):
        assert text == value
        return
    printed = text.removesuffix("%").strip()
    digits = len(printed.partition(".")[2])
    assert f"{value * (100 if text.endswith('%') else 1):.{digits}f}" == printed


def test_nothing_in_the_text_was_measured_and_not_linked() -> None:
    prose = re.sub(r"\[[^\]]*\]\(result\.json \"[^\"]*\"\)|`[^`]*`|^ {4}.*$", "", README, flags=re.MULTILINE)
    rows = [line.split("|")[2:] for line in prose.splitlines() if line.startswith("| ")]
    decimals = re.findall(r"-?\d+\.\d+", "\n".join("".join(row) for row in rows))
    # Beside upstream's own numbers, in the first column.
    assert decimals == []
    body = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
    assert re.findall(r"-?\d*\.\d+", body.replace("Qwen2.5", "").replace("1.5B", "")) == []


def test_every_claim_has_a_rule_and_a_legal_verdict() -> None:
    assert len({claim["id"] for claim in RESULT["claims"]}) == len(RESULT["claims"]) >= 8
    for claim in RESULT["claims"]:
        assert claim["verdict"] in ("agrees", "contradicted")
        assert claim["rule"]
        assert f"claims.{claim['id']}.verdict" in README
    assert RESULT["not_measured"]
    assert re.fullmatch(r"[0-9a-f]{64}", RESULT["model"]["sha256"])
    assert (FOLDER / "result.png").read_bytes().startswith(b"\x89PNG")
    assert RESULT["command"] in README


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("measure_run")


@pytest.mark.real_model
def test_the_model_says_it_again(measure: ModuleType, model_path: Callable[[str], Path]) -> None:
    from aprjax.checkpoint import open_checkpoint
    from aprjax.qwen2 import Stage

    checkpoint = open_checkpoint(model_path("qwen2.5-coder-1.5b"))
    assert checkpoint.sha256() == RESULT["model"]["sha256"]
    names = ("What", "<|im_start|>", "1")
    batch = measure.make_batch(checkpoint, {}, names)
    layers = measure.run(checkpoint, batch, ("float64",), layers=measure.LAYER + 1)["float64"]
    norm = layers[measure.LAYER][Stage.FFN_NORM]
    for name in names:
        # Other sums of float64: far below the digits that are kept.
        assert norm[batch.first(name), measure.CHANNEL] == pytest.approx(
            RESULT["first_tokens"][name]["value"], rel=1e-6
        )
    found = measure.feed_forward(checkpoint, norm[batch.first("What")])
    for kind in ("Q8_K", "Q8_0"):
        expected = RESULT["feed_forward"]["raw"][kind]["ffn_swigl"]
        # One code more or less of 1536 moves a neuron by a few 1e-4.
        assert found[kind]["ffn_swigl"]["largest"]["change"] == pytest.approx(expected["largest"]["change"], abs=1e-3)
        assert found[kind]["ffn_swigl"]["largest"]["neuron"] == expected["largest"]["neuron"]
