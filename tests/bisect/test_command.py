"""`python -m bisect layers` from the command line's side: what is asked, printed, written, and the exit code."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import CONFIG, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.layers.command import run_layers
from aprjax.bisect.layers.render import print_reports
from aprjax.checkpoint.types import CheckpointError
from aprjax.cli import main
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace import Trace

FAULTY = "model.layers.2.mlp.gate_proj.weight"
PROMPT = "if a < b:\n    return 1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model with one scaled matrix, and its reference."""
    folder = tmp_path_factory.mktemp("pair")
    reference = tiny_checkpoint(types={"": "Q6_K"})
    write_tiny(folder / "ref.apr", reference)
    write_tiny(folder / "model.apr", with_tensor(reference, FAULTY, reference.tensors[FAULTY].decode() * 1.2))
    return str(folder / "model.apr"), str(folder / "ref.apr")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test fills the user's cache of compiled programs."""
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")


def run(pair: tuple[str, str], *options: str) -> int:
    return main(["layers", "--model", pair[0], "--ref", pair[1], *options])


CONTRACT = {
    "schema": str,
    "verdict": str,
    "first_divergence": dict,
    "sides": dict,
    "prompt": dict,
    "findings": list,
    "layers": list,
    "margins": list,
    "noise": dict,
}
METRICS = {"std_ratio", "rms_ratio", "cosine", "rel_l2", "max_abs", "max_abs_at", "local_rel_l2"}


def test_json_on_stdout_is_the_contract_and_nothing_else(pair: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    assert run(pair, "--prompt", PROMPT, "--json", "-") == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    for key, kind in CONTRACT.items():
        assert isinstance(document[key], kind), key
    assert document["schema"] == "aprjax.layers/1"
    assert document["verdict"] == "divergence"
    assert document["first_divergence"]["layer"] == 2
    assert document["first_divergence"]["stage"] == "ffn_gate"
    assert FAULTY in document["first_divergence"]["cause"]
    assert document["first_divergence"]["next_step"]
    assert document["first_divergence"]["confidence"]["level"] in ("certain", "strong", "weak")
    assert document["first_divergence"]["confidence"]["basis"]
    for side in ("model", "ref"):
        assert set(document["sides"][side]) == {"path", "sha256", "format", "arithmetic"}
        assert len(document["sides"][side]["sha256"]) == 64
    assert document["prompt"]["text"] == PROMPT
    assert document["prompt"]["wrap"] == "none"
    count = len(document["prompt"]["tokens"])
    assert document["prompt"]["positions"] == list(range(count))
    assert [layer["layer"] for layer in document["layers"]] == [-1, 0, 1, 2]
    for layer in document["layers"]:
        for stage, values in layer["stages"].items():
            assert stage in list(Stage)
            assert values.keys() >= METRICS
    for margin in document["margins"]:
        assert set(margin) >= {"position", "model", "ref", "flip", "kl"}
        assert set(margin["model"]) == {"top1", "top2", "margin"}
    assert {"id", "severity", "side", "message", "tensor"} <= set(document["findings"][0])
    assert document["noise"]["layers"] == [2]
    assert document["noise"]["rel_l2"]["ffn_gate"] > 0


def test_words_fit_a_terminal_of_80_columns_and_say_the_same(
    pair: tuple[str, str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(pair, "--prompt", PROMPT) == 1
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "DIVERGENCE at layer 2, ffn_gate" in text
    assert "times 1.2" in text
    assert "ffn_gate   ← first" in text
    assert "\x1b" not in text


def test_an_agreeing_pair_exits_with_0(pair: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    same = (pair[1], pair[1])
    assert run(same, "--prompt", PROMPT) == 0
    text = capsys.readouterr().out
    assert "AGREE" in text
    assert "byte-identical blocks in all 39 tensors" in text


@pytest.mark.thorough
def test_without_a_prompt_the_three_probes_run(pair: tuple[str, str], tmp_path: Path) -> None:
    assert run((pair[1], pair[1]), "--json", str(tmp_path / "out.json"), "--positions", "last") == 0
    document = json.loads((tmp_path / "out.json").read_text())
    names = [probe["prompt"]["name"] for probe in document["probes"]]
    assert len(names) == len(set(names)) == 3
    assert (
        "<|im_start|>" in document["probes"][1]["prompt"]["text"] or document["probes"][1]["prompt"]["wrap"] == "once"
    )
    assert [probe["verdict"] for probe in document["probes"]] == ["agree"] * 3
    assert len(document["probes"][2]["prompt"]["tokens"]) > 300
    assert all(len(probe["prompt"]["positions"]) == 1 for probe in document["probes"])


def test_wrap_tokens_file_and_positions(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    seen = {}
    for name, options in {
        "plain": ["--prompt", PROMPT],
        "file": ["--prompt-file", str(tmp_path / "prompt.txt")],
        "once": ["--prompt", PROMPT, "--wrap", "once"],
        "twice": ["--prompt", PROMPT, "--wrap", "twice"],
        "tokens": ["--tokens", "5,17,300", "--positions", "1..2"],
    }.items():
        out = tmp_path / f"{name}.json"
        run(pair, *options, "--json", str(out), "--arithmetic", "float32")
        seen[name] = json.loads(out.read_text())["prompt"]
    assert seen["file"]["tokens"] == seen["plain"]["tokens"]
    assert len(seen["plain"]["tokens"]) < len(seen["once"]["tokens"]) < len(seen["twice"]["tokens"])
    assert seen["twice"]["wrap"] == "twice"
    assert seen["tokens"] == {
        "name": "tokens",
        "text": None,
        "wrap": "none",
        "tokens": [5, 17, 300],
        "positions": [1, 2],
    }


def test_report_folder_holds_page_plot_and_json(pair: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    assert run(pair, "--prompt", PROMPT, "--report", str(folder)) == 1
    assert {p.name for p in folder.iterdir()} == {"index.html", "layers.json", "layers-prompt.png"}
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "divergence at layer 2, ffn_gate" in page
    assert "http://" not in page
    assert "https://" not in page
    assert (folder / "layers-prompt.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((folder / "layers.json").read_text())
    assert document["verdict"] == "divergence"
    assert all(str(token) in document["token_texts"] for token in document["prompt"]["tokens"])
    stage = document["layers"][3]["stages"]["ffn_gate"]
    for name, whole in (("local", stage["local_rel_l2"]), ("free", stage["rel_l2"])):
        logs = np.frombuffer(base64.b64decode(stage["spread"][name]["log2_rel_l2_by_position"]), "<f2")
        assert len(logs) == len(document["prompt"]["positions"])
        # The whole is a mean of the positions', weighted by the reference's own size there.
        assert np.exp2(logs.min().astype(float)) * 0.98 <= whole <= np.exp2(logs.max().astype(float)) * 1.02
    assert document["layers"][1]["stages"]["attn_norm"]["spread"]["local"] is None


def test_saved_traces_hold_every_stage_and_their_provenance(pair: tuple[str, str], tmp_path: Path) -> None:
    target = tmp_path / "trace.safetensors"
    run(pair, "--prompt", PROMPT, "--save-trace", str(target), "--json", str(tmp_path / "out.json"))
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"trace.model.safetensors", "trace.ref.safetensors"}
    document = json.loads((tmp_path / "out.json").read_text())
    traces = {side: Trace.load(tmp_path / f"trace.{side}.safetensors") for side in ("model", "ref")}
    count = len(document["prompt"]["tokens"])
    for side, trace in traces.items():
        assert trace.info.sha256 == document["sides"][side]["sha256"]
        assert list(trace.info.tokens) == document["prompt"]["tokens"]
        assert set(trace) == {(OUTSIDE, s) for s in (Stage.EMBEDDING, Stage.FINAL_NORM, Stage.LM_HEAD)} | {
            (layer, stage) for layer in range(3) for stage in LAYER_STAGES
        }
        assert trace.shapes[0, Stage.FFN_GATE] == (count, CONFIG.intermediate_size)
    ours, theirs = (traces[side][2, Stage.FFN_GATE] for side in ("model", "ref"))
    reported = next(x for x in document["layers"] if x["layer"] == 2)["stages"]["ffn_gate"]["rel_l2"]
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--prompt", "a", "--tokens", "1"], 2, "at most one of"),
        (["--prompt", "a", "--positions", "3..1"], 2, "A..B"),
        (["--tokens", "1;2"], 2, "token ids"),
        (["--prompt", "a", "--arithmetic", "float8"], 2, "float8"),
        (["--tokens", "1,999999"], 4, "token id 999999 lies outside"),
        (["--prompt", ""], 4, "no tokens"),
        (["--tokens", "1,2", "--positions", "0..7"], 4, "beyond the prompt's 2 tokens"),
        (["--prompt-file", "nowhere.txt"], 4, "nowhere.txt"),
        (["--prompt", "a", "--json", "nowhere/out.json"], 4, "there is no such folder"),
        (["--prompt", "a", "--save-trace", "nowhere/out.safetensors"], 4, "there is no such folder"),
        (["--prompt", "a", "--report", __file__], 4, "a file stands where"),
    ],
)
def test_bad_input_is_told_in_words(
    pair: tuple[str, str], options: list[str], code: int, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(pair, *options) == code
    printed = capsys.readouterr()
    assert words in printed.err.replace("\n", " ")
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_side_without_vocabulary_has_no_say(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    write_tiny(tmp_path / "with.apr", checkpoint)
    write_tiny(tmp_path / "without.apr", checkpoint, vocabulary=None)
    common = {"prompt": PROMPT, "json_out": str(tmp_path / "out.json")}
    assert run_layers(model=str(tmp_path / "without.apr"), ref=str(tmp_path / "with.apr"), **common) == 0
    findings = [f["id"] for f in json.loads((tmp_path / "out.json").read_text())["findings"]]
    assert "tokenizer-missing" in findings
    with pytest.raises(CheckpointError, match=r"vocabulary"):
        run_layers(model=str(tmp_path / "without.apr"), ref=str(tmp_path / "without.apr"), **common)


def test_other_dimensions_exit_with_3(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = tmp_path / "small.apr"
    write_tiny(small, tiny_checkpoint(replace(CONFIG, num_layers=1)))
    assert run((str(small), pair[1]), "--prompt", PROMPT) == 3
    assert "num_layers (1 and 3)" in capsys.readouterr().out.replace("\n", " ")


def test_print_reports_takes_any_width(pair: tuple[str, str], tmp_path: Path) -> None:
    from aprjax.bisect.layers.compare import layers
    from aprjax.bisect.lockstep import Runner
    from aprjax.bisect.tokens.fed import TokensReport
    from aprjax.checkpoint import open_checkpoint
    from aprjax.qwen2 import PRESETS

    runners = [Runner(open_checkpoint(path), PRESETS["float32"]) for path in pair]
    report = layers(*runners, tokens=TokensReport("t", None, "none", (5, 6, 7)), positions=(2,))
    for width in (60, 200):
        with (tmp_path / "out.txt").open("w") as stream:
            print_reports([report], Console(file=stream, width=width))
        assert max(len(line) for line in (tmp_path / "out.txt").read_text().splitlines()) <= width
