"""`bisect files`: what it prints, writes and exits with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.files import compare_files
from aprjax.bisect.files.command import static_comparison
from aprjax.checkpoint.types import Checkpoint
from aprjax.cli import main

UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    # Its tensors are in memory; the file is there for its digest.
    path = tmp_path_factory.mktemp("reference") / "tiny.gguf"
    path.write_bytes(b"tiny")
    return replace(tiny_checkpoint(types={"": "Q4_K"}), path=path)


@pytest.fixture(scope="module")
def file(reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "ref.apr"
    write_tiny(path, reference)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    code = main(["files", *map(str, arguments), "--json", "-"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


def test_equal_files_agree(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys, "--model", file, "--ref", f"llama.cpp:{file}", "--decode")
    assert code == 0
    assert (document["schema"], document["verdict"]) == ("aprjax.files/1", "agree")
    assert document["identical_bytes"] == document["decoded"] == document["compared"] == 39
    assert document["tensors"] == document["causes"] == []
    assert document["sides"]["model"]["block_types"]["Q4_K"][0] == 3 * 7 + 2


def test_equal_values_in_other_block_types_agree(reference: Checkpoint) -> None:
    values = {name: tensor.decode() for name, tensor in reference.tensors.items()}
    report = static_comparison(replace(tiny_checkpoint(values=values), path=reference.path), reference)
    assert report.verdict == "agree"
    assert report.causes == ()
    assert len(report.files.tensors) == 3 * 7 + 2
    assert report.top() == []


def test_a_fault_is_explained_on_paper_in_json_and_on_a_page(
    reference: Checkpoint, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty = with_tensor(reference, HEAD, np.roll(reference.tensors[HEAD].decode(), 1, axis=0), "F32")
    faulty = with_tensor(faulty, UP, reference.tensors[UP].decode() * np.float32(0.5), "F32")
    model = tmp_path / "model.apr"
    write_tiny(model, replace(faulty, config=replace(CONFIG, rms_norm_eps=1e-5)))
    folder = tmp_path / "report"
    code = main(
        [
            "files",
            "--model",
            str(model),
            "--ref",
            str(file),
            "--json",
            f"{tmp_path / 'f.json'}",
            "--report",
            f"{folder}",
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert code == 1
    document = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert json.loads((folder / "files.json").read_text(encoding="utf-8")).keys() == {*document, "made"}
    assert document["config"] == {"rms_norm_eps": {"model": 1e-5, "ref": 1e-6}}
    tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert tensors[UP]["explanation_id"] == "scaled"
    assert tensors[UP]["parameters"]["factor"] == 0.5
    assert tensors[HEAD]["parameters"] == {"axis": "row", "by": 1, "cyclic": True}
    assert tensors[HEAD]["exact"] is True
    assert {cause["id"] for cause in document["causes"]} == {"scaled", "rows-shifted"}
    page = (folder / "index.html").read_text(encoding="utf-8")
    for words in ("shifted down by one row", "times 0.5", "look for an offset of one", "rms_norm_eps"):
        assert words in printed
        assert words in page
    assert "DIVERGENCE" in printed


def test_what_nothing_explains_is_said_with_what_was_excluded(reference: Checkpoint) -> None:
    noise = np.random.default_rng(0).normal(0, 0.06, reference.tensors[UP].shape)
    report = static_comparison(with_tensor(reference, UP, noise, "F32"), reference)
    (cause,) = report.causes
    assert cause.id == ""
    assert "the decoded values differ (none of" in cause.sentence
    difference = report.files.tensors[0]
    assert {"scaled", "reversed", "rows-shifted", "rounded"} <= dict(difference.excluded).keys()
    residuals = [residual for _, residual in difference.excluded]
    assert residuals == sorted(residuals)
    assert len(difference.worst_rows) == 5
    assert "<table" in report._repr_html_()
    assert report.top(1)[0]["tensor"] == UP


def test_other_dimensions_are_unmeasured(reference: Checkpoint) -> None:
    shorter = replace(reference, config=replace(CONFIG, num_layers=2))
    report = static_comparison(shorter, reference)
    assert report.verdict == "unmeasured"
    assert report.verdict.exit_code == 3
    assert "num_layers (2 and 3)" in report.reason


def test_a_key_that_changes_no_number_is_no_divergence(reference: Checkpoint) -> None:
    longer = replace(reference, config=replace(CONFIG, max_position_embeddings=9))
    report = static_comparison(longer, reference)
    assert report.verdict == "agree"
    assert report.findings[0].severity == "info"


def test_nan_for_nan_is_no_difference_and_other_nan_is_located(reference: Checkpoint) -> None:
    values = reference.tensors[UP].decode()
    values[3, 9] = np.nan
    damaged = with_tensor(reference, UP, values, "F32")
    assert compare_files(damaged, damaged, decode=True).identical
    in_half = with_tensor(reference, UP, values, "F16")
    assert not compare_files(in_half, with_tensor(reference, UP, in_half.tensors[UP].decode(), "F32")).differing
    difference = compare_files(reference, damaged).tensors[0]
    assert difference.explanation_id == "not-finite"
    assert difference.parameters == {"side": "reference", "element": 3 * 256 + 9}


def test_a_file_that_is_not_there_is_named(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, errors = run(capsys, "--model", file, "--ref", tmp_path / "nowhere.gguf")
    assert (code, document) == (4, {})
    assert "nowhere.gguf" in errors


@pytest.mark.thorough
def test_a_trace_is_refused_with_words(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.safetensors"
    assert main(["trace", str(file), "--tokens", "1,2,3", "--save", str(trace)]) == 0
    capsys.readouterr()
    code, _, errors = run(capsys, "--model", trace, "--ref", file)
    assert code == 4
    assert "a trace holds what a model computed, not its weights" in errors
