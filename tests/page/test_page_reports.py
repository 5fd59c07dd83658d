"""The page from saved reports: complete, self-contained, safe with hostile texts, strict about its input."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_reports import COMMANDS, SAVED, checked, every_report, explained, made_up, made_up_json, one_stage_less, saved
from tiny import tiny_checkpoint, write_tiny

from aprjax.bisect.page import report_fragment, write_combined, write_report
from aprjax.bisect.page.build import render_page
from aprjax.bisect.page.documents import VERSIONS, as_document
from aprjax.bisect.page.formats import number, percent, prose, signed
from aprjax.bisect.page.parts import embedded
from aprjax.bisect.page.scales import BINS, LogAxis, colour_bin
from aprjax.bisect.report import Verdict
from aprjax.cli import app, main

HOSTILE = "</script><script>alert(1)</script><!--\u2028\u2029\"'&amp;<img src=x onerror=alert(1)>`]]>"


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and of everything else."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        inside = self.elements[-1][0] if self.elements else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside != "style":
            self.text += data


def page_of(*reports: dict[str, Any]) -> str:
    return render_page([as_document(report) for report in reports])


@pytest.mark.parametrize("report", every_report(), ids=lambda report: report["schema"])
def test_every_command_has_its_section(report: dict[str, Any]) -> None:
    command = report["schema"].split(".")[1].split("/")[0]
    page = page_of(report)
    found = Elements(page)
    assert ("section", f"{command}-0") in [(tag, attrs.get("id")) for tag, attrs in found.elements]
    assert page.count("<h1") == 1
    # What a reader must find: the verdict's reason, the sides and the findings' words.
    plain = " ".join(found.text.split())
    for side in report.get("sides", {}).values():
        assert side["path"] in plain
    for finding in report.get("findings", []):
        assert " ".join(finding["message"].split()) in plain
    assert "undefined" not in plain
    assert "None" not in re.sub(r"None\.", "", plain), "a Python None on the page"
    assert "nan" not in plain.lower().split()


def test_all_reports_make_one_page_in_the_order_of_an_investigation() -> None:
    page = page_of(*reversed(every_report()))
    order = re.findall(r'<section class="report" id="(\w+)-\d+"', page)
    assert order == [command for command in VERSIONS if command in order]
    assert len(order) == len(every_report())
    # What locate proved stands at the top.
    assert "<title>aprjax check, files, tokens" in page
    assert "at layer 9, ffn_gate; layer 9, ffn_up</title>" in page
    ids = [attrs["id"] for _, attrs in Elements(page).elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_page_refers_to_nothing_outside_itself() -> None:
    page = page_of(*every_report())
    for _, attrs in Elements(page).elements:
        for name in ("src", "srcset", "action", "data", "poster", "style", "href"):
            value = attrs.get(name) or ""
            assert "url(" not in value
            assert name in ("style",) or value == "" or value.startswith("#")
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|EventSource|\beval\(", page)


@pytest.mark.parametrize("report", every_report(), ids=lambda report: report["schema"])
def test_hostile_texts_stay_text(report: dict[str, Any]) -> None:
    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poisoned(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner, key) for inner in value]
        # These are words of the schema itself, not of a file.
        fixed = ("schema", "stage", "verdict", "status", "kind", "severity", "level", "name", "log2_rel_l2_by_position")
        if isinstance(value, str) and key not in (*fixed, "share_by_group", "state", "stop", "side"):
            return value + HOSTILE
        return value

    clean, dirty = Elements(page_of(report)), Elements(page_of(poisoned(report)))
    assert [tag for tag, _ in dirty.elements if tag in ("script", "img", "iframe", "object")] == [
        tag for tag, _ in clean.elements if tag in ("script", "img", "iframe", "object")
    ]
    assert not [name for _, attrs in dirty.elements for name in attrs if name.startswith("on")]
    for text in dirty.scripts[:-1]:
        json.loads(text)
    assert dirty.scripts[-1] == clean.scripts[-1]
    assert "alert(1)" in dirty.text


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_json_cannot_leave_its_block(value: Any) -> None:
    text = embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_fields_of_a_later_version_are_left_alone(random: Any) -> None:
    def widened(value: Any) -> Any:
        if isinstance(value, dict) and value:
            inner = {key: widened(one) for key, one in value.items()}
            # Not among mappings whose keys are data: sides, stages, counts.
            return {**inner, "added_later": {"x": [1]}} if "schema" in value or "message" in value else inner
        return [widened(one) for one in value] if isinstance(value, list) else value

    report = random.choice(every_report())
    assert page_of(widened(report)) == page_of(report)


@pytest.mark.parametrize("part", ["margins", "massive-activation-cause"])
def test_committed_evidence_can_be_shown(repository: Path, part: str) -> None:
    (folder,) = (repository / "evidence").glob(f"{part}-20*")
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    reports = [d for d in documents if d.get("schema") in ("aprjax.margins/1", "aprjax.attribute/1")]
    page = page_of(*reports)
    assert page.count('<section class="report"') == len(reports) > 0
    # The attribution was cut to its largest shares, which must not look like shares that do not add up.
    assert ("stages that this file leaves out" in page) == (part == "massive-activation-cause")


def test_shares_and_what_they_miss_add_up_to_the_change() -> None:
    report = saved("attribute")
    report["contributions"] = report["contributions"][:1]
    first, change = report["contributions"][0]["integrated"], report["metric"]["change"]
    report["gap"] = abs(change - first) / abs(change)
    page = page_of(report)
    assert "what the shares miss" in page
    found = re.findall(r'<i style="left:([0-9.]+)%;width:([0-9.]+)%">', page)
    bars = [(float(left), float(width)) for left, width in found]
    (start, _), (left, width), (gap_left, gap_width), (end, _) = bars
    # From the reference down by the share, and up again by what is missed, to the model.
    assert left == pytest.approx(gap_left, abs=0.02)
    assert width / gap_width == pytest.approx(abs(first) / abs(change - first), rel=0.01)
    assert start == pytest.approx(left + width, abs=0.02)
    assert end == pytest.approx(gap_left + gap_width, abs=0.02)


def test_a_report_without_its_newer_fields_is_shown() -> None:
    report = saved("layers")
    for part in (report, *report["probes"]):
        part.pop("token_texts")
        for layer in part["layers"]:
            for stage in layer["stages"].values():
                stage.pop("spread")
        part["first_divergence"].pop("confidence")
    page = page_of(report)
    assert "layer 9, ffn_gate" in page
    assert "[3838]" in page


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an array": (lambda r: [r], "found an array"),
    "no schema": (lambda r: {k: v for k, v in r.items() if k != "schema"}, "no schema"),
    "another program's": (lambda r: {**r, "schema": "other.layers/1"}, "other.layers/1"),
    "a later version": (
        lambda r: {**r, "schema": "aprjax.layers/2"},
        "aprjax.layers/1, found aprjax.layers/2",
    ),
    "an unknown command": (lambda r: {**r, "schema": "aprjax.inspect/1"}, "no report that a page can be made of"),
    "a schema that is no text": (lambda r: {**r, "schema": 1}, "expected a report with a schema"),
    "without layers": (lambda r: {k: v for k, v in r.items() if k not in ("layers", "probes")}, "'layers' is missing"),
    "layers of another kind": (lambda r: {**r, "layers": "x", "probes": None}, "no complete aprjax.layers/1"),
    "a stage that is none": (lambda r: {**r, "layers": [{"layer": 0, "stages": [1]}], "probes": None}, "no complete"),
    "spreads of another kind": (lambda r: {**r, "margins": [3], "probes": None}, "no complete"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_report_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    change, words = BROKEN[name]
    file, out = tmp_path / "report.json", tmp_path / "out"
    file.write_text(json.dumps(change(saved("layers"))), encoding="utf-8")
    assert main(["report", str(file), "--out", str(out)]) == 4
    error = capsys.readouterr().err
    assert words in error
    assert "report.json" in error
    assert "Likely fix" in error
    assert "Traceback" not in error
    assert not out.exists(), "half a page"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b'{"schema": NaN}', "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"schema": "aprjax.layers/1", "verdict"', "expected JSON"),
    ],
    ids=["empty", "no text", "NaN", "deep", "cut"],
)
def test_files_that_are_no_json_are_refused(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 4
    assert words in capsys.readouterr().err


def test_the_command_takes_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["report", str(SAVED), "--out", str(out)]) == 0
    assert "report: " in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"index.html"}
    assert (out / "index.html").read_text(encoding="utf-8").count('<section class="report"') == len(COMMANDS)
    assert main(["report", str(tmp_path / "none.json"), "--out", str(out)]) == 4
    assert main(["report", str(tmp_path / "deep"), "--out", str(out)]) == 4
    assert "no report in this folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(SAVED), "--out", str(tmp_path / "file")]) == 4
    assert main(["report", "--out", str(out)]) == 2


def test_every_command_that_compares_writes_a_report() -> None:
    options = {
        c.callback.__name__: inspect.signature(c.callback).parameters for c in app.registered_commands if c.callback
    }
    assert {name for name, parameters in options.items() if "report" in parameters} >= VERSIONS.keys()


def test_tokens_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write_tiny(tmp_path / "tiny.apr", tiny_checkpoint()).path
    sides = ["--model", str(file), "--ref", str(file), "--no-engine"]
    assert main(["tokens", *sides, "--tokens", "5,17", "--report", str(tmp_path / "out")]) == 0
    assert "report: " in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "tokens.json"}
    assert "tiny.apr" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_a_folder_has_the_page_and_what_made_it(tmp_path: Path) -> None:
    report = made_up_json(layers=10, positions=5)
    index = write_report(report, tmp_path / "new", {"plot.png": lambda stream: stream.write(b"\x89PNG")})
    assert {path.name for path in index.parent.iterdir()} == {"index.html", "layers.json", "plot.png"}
    kept = json.loads((index.parent / "layers.json").read_text())
    made = kept.pop("made")
    assert kept == report
    assert {"aprjax", "python", "jax", "numpy", "date", "platform"} <= made.keys()
    page = index.read_text(encoding="utf-8")
    assert 'href="layers.json"' in page
    assert 'href="plot.png"' in page
    assert made["date"] in page
    # The saved report makes the same page, but for the link to what lies beside it.
    again = write_combined([index.parent / "layers.json"], tmp_path / "again").read_text(encoding="utf-8")
    assert again == re.sub(r'<p class="links">.*?</p>', "", page)


def test_the_page_of_28_layers_and_511_tokens_is_small() -> None:
    report = made_up_json()
    assert len(page_of(report)) < 5e6
    report["probes"] = [
        made_up_json(positions=7, name="direct"),
        made_up_json(),
    ]
    page = page_of(report)
    assert len(page) < 5e6
    assert page.count('class="heat"') == 2


def test_absent_stages_are_unmeasured_and_not_zero() -> None:
    page = page_of(one_stage_less(made_up(layers=10, positions=3)).to_json())
    cell = re.search(r'<td role="gridcell"[^>]*data-cell="0:attn_out"[^>]*>', page)
    assert cell is not None
    assert 'data-local="none"' in cell[0]
    assert "layer 0, attn_out: unmeasured" in cell[0]
    nothing = page_of(made_up(verdict=Verdict.UNMEASURED, layers=4, positions=3).to_json())
    assert nothing.count('data-local="none"') == 4 * 17
    # Nothing was found equal, for nothing was looked at.
    assert "No stage was measured" in nothing
    assert "bit-identical" not in nothing
    assert "<h1" in nothing
    assert "unmeasured" in nothing


@pytest.mark.parametrize("report", every_report(), ids=lambda report: report["schema"])
def test_fragments_need_neither_script_nor_style(report: dict[str, Any]) -> None:
    fragment = report_fragment(report)
    tags = {tag for tag, _ in Elements(fragment).elements}
    assert not tags & {"script", "style", "svg", "html", "link"}
    assert "<table" in fragment


def test_explanations_and_contracts_say_what_they_rest_on() -> None:
    page = page_of(explained())
    assert "10\u202f000 ± 3.1" in page
    assert "position-offset leaves 0.2" in page
    assert "channel 7 is not a number" in page
    page = page_of(checked())
    assert "1 passed, 1 failed, 1 unmeasured" in page
    order = re.findall(r"<code>(F-\d)</code>", page)
    assert order == ["F-1", "F-2", "F-0"], "failures first, then what was not measured"


def test_numbers_are_written_to_be_read() -> None:
    assert [number(v) for v in (0, 7, 12345, None, math.nan, True)] == ["0", "7", "12\u202f345", "–", "–", "–"]
    assert [number(v) for v in (0.0, 0.12345, 1.0, 999999.5)] == ["0", "0.1235", "1", "1\u202f000\u202f000"]
    assert [number(v) for v in (5.3e-7, -1.234e-5, 2.5e8)] == ["5.30e\u22127", "\u22121.23e\u22125", "2.50e8"]
    assert (signed(0.5), signed(-0.5), signed(0.0), percent(0.125)) == ("+0.5", "\u22120.5", "0", "12.5\u202f%")
    assert prose("run `a <b>` now") == "run <code>a &lt;b&gt;</code> now"
    assert "model.<wbr>layers.<wbr>9" in prose("model.layers.9.mlp.gate_proj.weight differs")


@given(st.floats(1e-12, 1e4))
def test_colours_follow_half_decades(value: float) -> None:
    shade = int(colour_bin(value))
    assert 0 <= shade < BINS
    if 0 < shade < BINS - 1:
        assert 10 ** (shade / 2 - 7) <= value * (1 + 1e-9)
        assert value <= 10 ** ((shade + 1) / 2 - 7) * (1 + 1e-9)
    assert int(colour_bin(-value)) == shade


def test_what_has_no_colour() -> None:
    assert [colour_bin(v) for v in (0.0, None, math.nan, math.inf)] == ["zero", "none", "none", str(BINS - 1)]


@given(st.lists(st.floats(1e-9, 1e6), max_size=20))
def test_axes_cover_their_values_in_order(values: list[float]) -> None:
    axis = LogAxis(values, 100.0)
    places = [axis.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)
    assert 1 <= len(axis.ticks()) <= 8
    assert all(-1e-9 <= at <= 100 + 1e-9 for at, _ in axis.ticks())


def test_reports_are_not_changed_by_rendering() -> None:
    for report in every_report():
        before = copy.deepcopy(report)
        page_of(report)
        assert report == before
