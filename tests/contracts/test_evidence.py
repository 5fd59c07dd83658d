"""Evidence: what the writer writes is accepted, and each contradiction planted in a copy is found by its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint.fuzzing import Damage, damages
from contracts_checked import OFFICIAL_SHA256, report, with_allowed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.evidence import validate_folder, write_evidence
from aprjax.contracts.evidence.log import LogError, log_text, parse_log
from aprjax.contracts.evidence.manifest import MANIFEST, seal
from aprjax.contracts.evidence.validate import validate_folders
from aprjax.contracts.facts import names_a_place, without_places
from aprjax.contracts.reading import MOST_BYTES, Unreadable
from aprjax.contracts.types import NOT_ABOUT, Status

FIRST = "tiny-parity-v1/falsify-tiny-001/discharge-evidence-v1.json"
SECOND = "tiny-parity-v1/falsify-tiny-002/discharge-evidence-v1.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evidence of a check in which one test passed and one was not measured."""
    root = tmp_path_factory.mktemp("evidence")
    return write_evidence(report(root, second=Status.UNMEASURED), root)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / written.name))


def ids(folder: Path) -> set[str]:
    return {contradiction.id for contradiction in validate_folder(folder).contradictions}


def edited(folder: Path, name: str, change: Callable[[Any], Any], *, sealed: bool = True) -> None:
    """Changes a JSON file, and the manifest with it, as somebody would who wants to be believed."""
    path = folder / name
    document = json.loads(path.read_text(encoding="utf-8"))
    changed = change(document)
    path.write_text(json.dumps(document if changed is None else changed, indent=2) + "\n", encoding="utf-8")
    if sealed:
        seal(folder)


@pytest.mark.parametrize("second", list(Status))
def test_what_is_written_is_accepted(tmp_path: Path, second: Status) -> None:
    folder = write_evidence(report(tmp_path, second=second), tmp_path / "evidence")
    found = validate_folder(folder)
    assert found.contradictions == ()
    assert (found.kind, found.files, found.exit_code) == ("check", 5, 0)
    assert folder.name == "tiny-parity-v1-2026-11-20"
    assert sum(found.counts.values()) == 2
    assert found.counts["unmeasured"] == (second is Status.UNMEASURED)
    document = json.loads((folder / SECOND).read_text(encoding="utf-8"))
    lifted = {Status.PASS: "DISCHARGED"}.get(second, "PROPOSED")
    assert document["discharge_status"] == lifted
    assert document["discharge_proof"]["verdict"].startswith(str(second).capitalize())
    assert (document["unmeasured"] == ["none"]) == (second is not Status.UNMEASURED)


def test_upstreams_fields_are_there_and_nobodys_places(written: Path) -> None:
    document = json.loads((written / FIRST).read_text(encoding="utf-8"))
    upstream = "$schema evidence_id binds_to falsification_id discharge_status previous_status discharge_date "
    upstream += "discharge_session host shipped_artifact command raw_run_output verification_chain discharge_proof "
    upstream += "next_actions"
    assert set(upstream.split()) <= set(document)
    assert document["evidence_id"] == "FALSIFY-TINY-001-DISCHARGED-EVIDENCE-V1"
    assert document["shipped_artifact"]["file_size_bytes"] == 1000
    assert document["reference_artifact"]["sha256"] == OFFICIAL_SHA256
    assert document["raw_files"] == [f"evidence/{written.name}/raw/layers.json"]
    assert document["versions"]["packages"]["numpy"]
    assert {"cpu", "cores", "memory_bytes", "platform"} <= set(document["host"])
    for path in written.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert names_a_place(text) is None, path
            assert "somebody" not in text
            assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_a_full_discharge_that_waits_is_no_full_discharge(tmp_path: Path) -> None:
    checked = report(tmp_path)
    tests = tuple(
        replace(t, full_discharge_blocks_on="the 7B teacher") for t in checked.contracts[0].falsification_tests
    )
    checked = replace(checked, contracts=(replace(checked.contracts[0], falsification_tests=tests),))
    folder = write_evidence(checked, tmp_path / "evidence")
    assert ids(folder) == set()
    document = json.loads((folder / FIRST).read_text(encoding="utf-8"))
    assert document["discharge_status"] == "FUNCTIONAL"
    assert any("the 7B teacher" in entry for entry in document["unmeasured"])


def test_a_second_check_of_a_day_has_its_own_folder(tmp_path: Path) -> None:
    names = [write_evidence(report(tmp_path), tmp_path / "evidence").name for _ in range(2)]
    assert names == ["tiny-parity-v1-2026-11-20", "tiny-parity-v1-2026-11-20-2"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    checked = replace(report(tmp_path), artifacts={"../escape.json": "{}"})
    with pytest.raises(CheckpointError, match="no file name"):
        write_evidence(checked, tmp_path / "evidence")
    checked = replace(report(tmp_path), contracts=())
    with pytest.raises(CheckpointError, match="no contract"):
        write_evidence(checked, tmp_path / "evidence")
    first = replace(report(tmp_path).outcomes[0], test_id="an id with spaces")
    with pytest.raises(CheckpointError, match="cannot be put down as evidence: line 5"):
        write_evidence(replace(report(tmp_path), outcomes=(first,)), tmp_path / "evidence")
    assert list((tmp_path / "evidence").iterdir()) == []
    (tmp_path / "file").write_text("", encoding="ascii")
    with pytest.raises(CheckpointError, match="a file stands"):
        write_evidence(report(tmp_path), tmp_path / "file")


def _first_outcome(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["outcomes"][0]


# What is planted in a copy whose manifest is made anew (the liar knows about manifests), and what must be found.
PLANTED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a count of the report": (lambda f: edited(f, "check.json", lambda d: d.update(passed=2)), "count-mismatch"),
    "an unmeasured test called passed": (
        lambda f: edited(f, "check.json", lambda d: d["outcomes"][1].update(status="pass")),
        "unmeasured-as-passed",
    ),
    "an unmeasured test discharged": (
        lambda f: edited(f, SECOND, lambda d: d.update(discharge_status="DISCHARGED")),
        "unmeasured-as-passed",
    ),
    "a number beyond its bound": (
        lambda f: edited(f, "check.json", lambda d: _first_outcome(d)["measured"].update(ratio=18.23)),
        "verdict-contradicts",
    ),
    "a wider bound in the document": (
        lambda f: edited(f, FIRST, lambda d: d["discharge_proof"]["thresholds"][0].update(maximum=20.0)),
        "fact-mismatch",
    ),
    "a bound without a basis": (
        lambda f: edited(f, "check.json", lambda d: _first_outcome(d)["thresholds"][0].update(basis=" ")),
        "basis-missing",
    ),
    "an unknown status of an outcome": (
        lambda f: edited(f, "check.json", lambda d: _first_outcome(d).update(status="passed-ish")),
        "status-unknown",
    ),
    "an unknown status of a test": (
        lambda f: edited(f, FIRST, lambda d: d.update(discharge_status="LIVE-DISCHARGED")),
        "status-unknown",
    ),
    "a status that leads back": (
        lambda f: edited(f, FIRST, lambda d: d.update(previous_status="DISCHARGED", discharge_status="PROPOSED")),
        "status-illegal",
    ),
    "another digest in one document": (
        lambda f: edited(f, FIRST, lambda d: d["shipped_artifact"].update(sha256="cd" * 32)),
        "artifact-differs",
    ),
    "another digest of an official file": (
        lambda f: edited(f, "check.json", lambda d: d["sides"]["ref"].update(sha256="cd" * 32)),
        "artifact-differs",
    ),
    "another exit code": (lambda f: edited(f, "check.json", lambda d: d.update(exit_code=0)), "verdict-contradicts"),
    "another verdict": (
        lambda f: edited(f, SECOND, lambda d: d["discharge_proof"].update(verdict="Pass — all is well")),
        "verdict-contradicts",
    ),
    "a command that was not run": (lambda f: edited(f, FIRST, lambda d: d.update(command="true")), "fact-mismatch"),
    "a number typed in": (
        lambda f: edited(f, FIRST, lambda d: d["discharge_proof"]["observed"].update(ratio=1.0)),
        "fact-mismatch",
    ),
    "a raw file that is not there": (
        lambda f: edited(f, FIRST, lambda d: d.update(raw_files=["evidence/other/raw/layers.json"])),
        "path-dangles",
    ),
    "nothing unmeasured": (lambda f: edited(f, SECOND, lambda d: d.update(unmeasured=["none"])), "unmeasured-missing"),
    "a time before the check": (
        lambda f: edited(f, FIRST, lambda d: d.update(written_utc="2026-01-01T00:00:00+00:00")),
        "time-insane",
    ),
    "a number as text": (lambda f: edited(f, "check.json", lambda d: d.update(passed="1")), "wrong-type"),
    "a list for an object": (lambda f: edited(f, FIRST, lambda d: d.update(host=[])), "wrong-type"),
    "a document of another type": (lambda f: edited(f, FIRST, lambda d: [d]), "wrong-type"),
    "outcomes of another type": (lambda f: edited(f, "check.json", lambda d: d.update(outcomes={})), "wrong-type"),
    "NaN": (lambda f: edited(f, "check.json", lambda d: d.update(seconds=float("nan"))), "unreadable"),
    "an outcome left out": (
        lambda f: edited(f, "check.json", lambda d: d.update(outcomes=d["outcomes"][:1])),
        "outcome-mismatch",
    ),
    "a document left out": (lambda f: ((f / SECOND).unlink(), seal(f)), "file-missing"),
    "the log left out": (lambda f: ((f / "check.log").unlink(), seal(f)), "file-missing"),
    "the raw output left out": (lambda f: ((f / "raw/layers.json").unlink(), seal(f)), "raw-missing"),
    "a document of no test": (
        lambda f: (shutil.copytree(f / "tiny-parity-v1/falsify-tiny-001", f / "tiny-parity-v1/other"), seal(f)),
        "outcome-mismatch",
    ),
    "a log's count": (lambda f: _log(f, "1 passed", "2 passed"), "count-mismatch"),
    "a log's verdict": (lambda f: _log(f, "UNMEASURED FALSIFY", "PASS FALSIFY"), "outcome-mismatch"),
    "a log that is none": (lambda f: _log(f, "aprjax check", "apr qa"), "log-unreadable"),
    "a time that cannot be": (lambda f: _log(f, "2026-11-20T", "1999-11-20T"), "time-insane"),
    "tests that took longer than the check": (lambda f: _log(f, "; 1.500 s", "; 0.100 s"), "time-insane"),
    "somebody's folder": (
        lambda f: edited(f, FIRST, lambda d: d.update(discharge_session="run in /srv/somebody/here")),
        "names-a-place",
    ),
    "a machine's name": (
        lambda f: edited(f, FIRST, lambda d: d["host"].update(hostname="somebodys-laptop")),
        "names-a-place",
    ),
    "a key twice": (lambda f: _raw(f, '"schema":', '"schema": "x", "schema":'), "unreadable"),
    "half a file": (lambda f: _raw(f, '"schema":', ""), "unreadable"),
}


def _log(folder: Path, old: str, new: str) -> None:
    _replace(folder / "check.log", old, new)
    seal(folder)


def _raw(folder: Path, old: str, new: str) -> None:
    _replace(folder / "check.json", old, new)
    seal(folder)


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(("plant", "expected"), PLANTED.values(), ids=PLANTED)
def test_a_planted_contradiction_is_found(copy: Path, plant: Callable[[Path], Any], expected: str) -> None:
    assert ids(copy) == set()
    plant(copy)
    found = validate_folder(copy)
    assert expected in {contradiction.id for contradiction in found.contradictions}, found.contradictions
    assert found.exit_code == 1


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edited(folder, MANIFEST, change, sealed=False)


def _huge(folder: Path) -> None:
    with (folder / "raw" / "layers.json").open("r+b") as stream:
        stream.truncate(MOST_BYTES + 1)  # sparse: it takes no room


# What is planted beside a manifest that stays as it was.
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file altered": (lambda f: (f / "check.log").write_text("x" * 10, encoding="ascii"), "file-altered"),
    "a byte altered": (lambda f: _replace(f / "check.log", "1.25", "1.26"), "file-altered"),
    "a file missing": (lambda f: (f / "check.log").unlink(), "file-missing"),
    "a file more": (lambda f: (f / "raw" / "more.json").write_text("{}", encoding="ascii"), "file-extra"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest-missing"),
    "a manifest that is none": (lambda f: (f / MANIFEST).write_text("[]", encoding="ascii"), "manifest-unreadable"),
    "a path out of the folder": (_manifest(lambda d: d["files"][0].update(path="../../secret")), "path-escapes"),
    "an absolute path": (_manifest(lambda d: d["files"][0].update(path="/etc/passwd")), "path-escapes"),
    "a path in disguise": (_manifest(lambda d: d["files"][0].update(path="raw/./layers.json")), "path-escapes"),
    "a backslash": (_manifest(lambda d: d["files"][0].update(path="raw\\layers.json")), "path-escapes"),
    "an entry twice": (_manifest(lambda d: d["files"].append(d["files"][0])), "listed-twice"),
    "a digest in capitals": (
        _manifest(lambda d: d["files"][0].update(sha256=d["files"][0]["sha256"].upper())),
        "manifest-unreadable",
    ),
    "a size of another type": (_manifest(lambda d: d["files"][0].update(bytes=True)), "manifest-unreadable"),
    "a link": (
        lambda f: ((f / "check.log").rename(f.parent / "log"), (f / "check.log").symlink_to(f.parent / "log")),
        "not-a-plain-file",
    ),
    "a link to a folder": (
        lambda f: (shutil.move(f / "raw", f.parent / "raw"), (f / "raw").symlink_to(f.parent / "raw")),
        "not-a-plain-file",
    ),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), "not-a-plain-file"),
    "a huge file": (_huge, "not-a-plain-file"),
}


@pytest.mark.parametrize(("plant", "expected"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_folder_is_refused(copy: Path, plant: Callable[[Path], Any], expected: str) -> None:
    plant(copy)
    assert expected in ids(copy)


def test_what_cannot_be_vouched_for_is_not_sealed(copy: Path) -> None:
    (copy / "link").symlink_to(copy / "check.log")
    with pytest.raises(Unreadable, match="link"):
        seal(copy)
    (copy / "link").unlink()
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("", encoding="ascii")
    with pytest.raises(Unreadable, match="a repository"):
        seal(copy)


def test_a_renamed_folder_names_files_of_another(written: Path, tmp_path: Path) -> None:
    assert ids(Path(shutil.copytree(written, tmp_path / "renamed"))) == {"path-dangles"}


def test_one_official_file_under_two_digests_shows_among_folders(written: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(written, tmp_path / "other"))
    edited(other, "check.json", lambda d: d["sides"]["ref"].update(sha256="cd" * 32))
    found = {c.id for c in validate_folders([written, other])[1].contradictions}
    assert "artifact-differs" in found
    assert all(report.accepted for report in validate_folders([written, written]))


def test_what_is_not_about_two_sides_is_not_missing(tmp_path: Path) -> None:
    made = report(tmp_path, second=Status.UNMEASURED)
    (checked,) = made.contracts
    one, two = checked.falsification_tests
    two = replace(two, not_applicable=True, na_reason="a rule about a program", na_owner="its tests")
    told = replace(made.outcomes[1], reason=f"{NOT_ABOUT}a rule about a program (its tests)", measured={})
    apart = replace(checked, falsification_tests=(one, two))
    apart = replace(made, contracts=(apart,), outcomes=(made.outcomes[0], told))
    assert apart.exit_code == 0
    folder = write_evidence(apart, tmp_path / "evidence")
    assert ids(folder) == set()
    # Called so in the reason alone, or in the list alone: something that was to be measured would be hidden.
    edited(folder, "check.json", lambda d: d.update(not_applicable=[]))
    assert "verdict-contradicts" in ids(folder)
    hidden = write_evidence(replace(apart, outcomes=made.outcomes), tmp_path / "hidden")
    assert "verdict-contradicts" in ids(hidden)


def test_what_may_stay_unmeasured_is_said(tmp_path: Path) -> None:
    checked = with_allowed(report(tmp_path, second=Status.UNMEASURED), "FALSIFY-TINY-002")
    assert checked.exit_code == 0
    folder = write_evidence(checked, tmp_path / "evidence")
    assert ids(folder) == set()
    edited(folder, "check.json", lambda d: d.update(allowed_unmeasured=[]))
    assert {"verdict-contradicts", "outcome-mismatch"} <= ids(folder)


@settings(max_examples=50, deadline=None)
@given(reason=st.text(), command=st.text(), seconds=st.floats(0, 1e6))
def test_a_log_says_what_the_report_says(reason: str, command: str, seconds: float) -> None:
    checked = report(Path("contracts"))
    first = replace(checked.outcomes[0], reason=reason, seconds=seconds)
    checked = replace(checked, outcomes=(first, checked.outcomes[1]), command=command)
    parsed = parse_log(log_text(checked))
    assert parsed.tests[0].reason == " ".join(reason.split())
    assert parsed.command == " ".join(command.split())
    assert parsed.tests[0].seconds == pytest.approx(seconds, abs=0.0005)
    assert [test.status for test in parsed.tests] == ["pass", "pass"]
    assert parsed.claimed == {"tests": 2, "passed": 2, "failed": 0, "unmeasured": 0, "exit_code": 0}


@pytest.mark.parametrize("text", ["", "aprjax check, started now\n", "a\nb\nc\n"])
def test_a_text_that_is_no_log(text: str) -> None:
    with pytest.raises(LogError):
        parse_log(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--model /srv/me/a b/x.apr", "--model …/a b/x.apr"),
        ("in [/mnt/x/y.json]: 3", "in […/y.json]: 3"),
        ("llama.cpp:/models/q/b.gguf", "llama.cpp:…/b.gguf"),
        (r"C:\Models\me\a.apr", "…/a.apr"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("evidence/x/check.log and 1/2/3", "evidence/x/check.log and 1/2/3"),
        ("~/models/a.apr", "~/models/a.apr"),
        ("#!/bin/sh and /usr/bin/env", "#!/bin/sh and /usr/bin/env"),
    ],
)
def test_places_are_cut(text: str, expected: str) -> None:
    assert without_places({"a": [text]}) == {"a": [expected]}
    assert names_a_place(expected) is None


def test_the_reports_forms(copy: Path) -> None:
    (copy / "check.log").unlink()
    found = validate_folder(copy)
    assert not found.accepted
    assert found.to_json()["contradictions"][0]["file"]
    assert len(found.top(1)) == 1
    assert "check.log" in found._repr_html_()
    assert "check.log" in str(found.contradictions[0])
    with pytest.raises(CheckpointError, match="expected an evidence folder"):
        validate_folder(copy / "nowhere")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["check.json", "check.log", FIRST, MANIFEST]), damage=damages(header=400, size=4000))
def test_no_damage_is_accepted_and_none_raises(copy: Path, name: str, damage: Damage) -> None:
    path = copy / name
    before, manifest = path.read_bytes(), (copy / MANIFEST).read_bytes()
    path.write_bytes(damage(before))
    assert validate_folder(copy).accepted == (path.read_bytes() == before)
    if name != MANIFEST:
        seal(copy)
        validate_folder(copy)  # believed by its manifest: whatever is in it, the answer is a report
    path.write_bytes(before)
    (copy / MANIFEST).write_bytes(manifest)
