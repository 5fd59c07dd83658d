"""`noise`: the changes are run, differ as little as rounding does, and are told apart from no change at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bisect_traces import TOKENS, tiny_file

from aprjax.bisect.noise.report import SCHEMA, batched, compare, measure_noise, stepwise
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.cli import main
from aprjax.qwen2 import OUTSIDE, PRESETS, Stage
from aprjax.qwen2.model import Qwen2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_file(tmp_path_factory.mktemp("noise"))


def test_one_position_at_a_time_is_the_same_computation(file: Checkpoint) -> None:
    # Decoded weights: without integer rounding in between, differences stay those of float32 sums.
    model = Qwen2(file, PRESETS["float32"])
    change = compare("stepwise", stepwise(model, list(TOKENS)), batched(model, list(TOKENS)))
    assert set(change.stages) == set(Stage)
    assert change.stages[Stage.EMBEDDING] == (0.0, 0.0)
    assert max(most for _, most in change.stages.values()) < 1e-5
    assert change.flips == 0
    assert change.positions == len(TOKENS)


def test_no_change_is_no_noise_and_a_change_is_measured(file: Checkpoint) -> None:
    model = Qwen2(file, PRESETS["float32"])
    base = batched(model, list(TOKENS))
    assert {most for _, most in compare("none", base, base).stages.values()} == {0.0}
    moved = {key: value * np.float32(1.5) if key == (1, Stage.FFN_UP) else value for key, value in base.items()}
    change = compare("scaled", moved, base)
    assert change.stages[Stage.FFN_UP] == (pytest.approx(0.25), pytest.approx(0.5))
    lacking = {key: value for key, value in base.items() if key[1] is not Stage.FFN_SILU}
    assert Stage.FFN_SILU not in compare("lacking", lacking, base).stages
    del lacking[OUTSIDE, Stage.LM_HEAD]
    assert compare("lacking", lacking, base).logits_rel_l2 is None


def test_the_command_reports_every_change(
    file: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    ids = ",".join(map(str, TOKENS))
    outputs = ["--json", "-", "--report", str(tmp_path / "page")]
    assert main(["noise", str(file.path), "--tokens", ids, "--arithmetic", "float32", *outputs]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == SCHEMA
    assert [change["name"] for change in document["changes"]] == [
        "one position at a time",
        "float64 sums",
        "float16 KV cache",
    ]
    kept = json.loads((tmp_path / "page" / "noise.json").read_text())
    assert kept.pop("made")["aprjax"]
    assert kept == document
    assert (tmp_path / "page" / "noise.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert all(change["name"] in page for change in document["changes"])
    half = document["changes"][2]["stages"]["attention"]["max"]
    # Unit roundoff of float16 is 4.9e-4; of float32, 6e-8.
    assert 1e-5 < half < 1e-2
    assert document["changes"][1]["stages"]["attention"]["max"] < 1e-5


def test_tokens_outside_the_vocabulary_are_refused(file: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="999999"):
        measure_noise(file, [1, 999999], PRESETS["float32"])
    assert main(["noise", str(Path(file.path)), "--tokens", "999999"]) == 4
