"""`margins` on tiny models: as the models themselves have it, shared work, traces, and the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIG, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.files import compare_files
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.margins.pair import compare_margins
from aprjax.bisect.margins.report import SCHEMA, FedTokens, MarginsReport
from aprjax.bisect.margins.run import Shared, paired_logits
from aprjax.bisect.margins.top_two import margins
from aprjax.bisect.report import Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Traced
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.cli import main
from aprjax.qwen2 import OUTSIDE, PRESETS, Stage
from aprjax.qwen2.model import Qwen2
from aprjax.trace import MemoryTrace, TraceInfo

# Those of test_logit_noise.py, so that both share compiled programs.
TOKENS = (5, 17, 300, 5, 256, 41, 99, 3, 250, 12, 7)
EVERYWHERE = tuple(range(len(TOKENS)))
FLOAT32 = PRESETS["float32"]
UP = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Pair:
    """A reference, and a model that differs from it in one tensor of layer 1."""

    model: Checkpoint
    ref: Checkpoint

    @property
    def runners(self) -> tuple[Runner, Runner]:
        return Runner(self.model, FLOAT32), Runner(self.ref, FLOAT32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("margins")
    plain = tiny_checkpoint()
    changed = with_tensor(plain, UP, plain.tensors[UP].decode() * 2)
    return Pair(write_tiny(folder / "changed.apr", changed), write_tiny(folder / "ref.apr", plain))


@pytest.fixture(scope="module")
def logits(pair: Pair) -> dict[str, np.ndarray]:
    """Both models' logits, from the models run whole."""
    return {
        name: np.asarray(Qwen2(checkpoint, FLOAT32)(list(TOKENS)))
        for name, checkpoint in (("ref", pair.ref), ("model", pair.model))
    }


def recorded(logits: np.ndarray, *, tokens: tuple[int, ...] = TOKENS, stage: Stage = Stage.LM_HEAD) -> Traced:
    """A trace of these logits whose file is not at hand."""
    info = TraceInfo("gone.gguf", "0" * 64, "gguf", "float32", tokens, EVERYWHERE, EVERYWHERE)
    return Traced(MemoryTrace(info, {(OUTSIDE, stage): logits}), None, FLOAT32)


def compare(model: Runner | Traced, ref: Runner | Traced, **options) -> MarginsReport:
    fed = FedTokens("test", None, "none", TOKENS[:8], TOKENS[8:], "given")
    return compare_margins(model, ref, fed=fed, tokens=TokensReport("test", None, "none", TOKENS), **options)


def test_logits_are_the_models_own_and_what_is_shared_is_computed_once(
    pair: Pair, logits: dict[str, np.ndarray]
) -> None:
    shared = Shared()
    files = compare_files(pair.model, pair.ref)
    sides = pair.runners
    ((rows, ours, theirs),) = paired_logits(*sides, TOKENS, EVERYWHERE, files=files, shared=shared)
    assert rows == list(EVERYWHERE)
    np.testing.assert_allclose(theirs, logits["ref"], atol=1e-5)
    np.testing.assert_allclose(ours, logits["model"], atol=1e-5)
    # Layer 0 has the same bytes and inputs; from layer 1, which differs, on nothing has.
    assert (shared.layers, shared.of) == (1, 3)
    apart = Shared()
    ((_, again, ref_again),) = paired_logits(*sides, TOKENS, EVERYWHERE, shared=apart)
    assert apart.layers == 0
    np.testing.assert_array_equal(again, ours)
    np.testing.assert_array_equal(ref_again, theirs)


def test_a_changed_weight_diverges_and_every_row_says_how_far(pair: Pair, logits: dict[str, np.ndarray]) -> None:
    report = compare(*pair.runners)
    assert report.verdict is Verdict.DIVERGENCE
    assert report.noise is not None
    assert report.noise.sigma < 1e-5
    expected = margins(logits["model"], logits["ref"], list(EVERYWHERE))
    for row, known in zip(report.rows, expected, strict=True):
        assert (row.flip, row.model and row.model.top1) == (known.flip, known.model.top1)
        assert row.kl == pytest.approx(known.kl, abs=1e-5)
        assert row.verdict is (Verdict.DIVERGENCE if known.flip else Verdict.AGREE)
    assert report.flips
    assert [row.part for row in report.rows] == ["prompt"] * 7 + ["continuation"] * 4
    spoken = sum(row.part == "continuation" for row in report.flips)
    assert f"{len(report.flips)} of 11 positions flip ({spoken} where text is generated)" in report.reason
    assert [row.target for row in report.rows] == [*TOKENS[1:], None]
    by_noise, by_drift = report.bounds
    assert (by_noise.caught, len(by_noise.listed)) == (0, 0)
    assert by_drift.caught == len(report.flips)
    assert "drift-beyond-noise" in {finding.id for finding in report.findings}
    assert report.top(1)[0].widest_gap == max(row.widest_gap or 0.0 for row in report.flips)
    assert f"{report.verdict}</b>" in report._repr_html_()


def test_a_file_agrees_with_itself_and_with_its_trace(pair: Pair, logits: dict[str, np.ndarray]) -> None:
    ref = Runner(pair.ref, FLOAT32)
    report = compare(ref, ref, files=compare_files(pair.ref, pair.ref))
    assert report.verdict is Verdict.AGREE
    assert {row.max_delta for row in report.rows} == {0.0}
    assert [bound.listed for bound in report.bounds][1] == ()
    assert "drift-beyond-noise" not in {finding.id for finding in report.findings}
    assert "computed-once" in {finding.id for finding in report.findings}
    against = compare(recorded(logits["ref"]), ref, with_noise=False)
    assert against.verdict is Verdict.AGREE
    assert max(row.max_delta or 0.0 for row in against.rows) < 1e-5


def test_no_flip_does_not_hide_a_drift(pair: Pair, logits: dict[str, np.ndarray]) -> None:
    sure = next(p for p in EVERYWHERE if logits["ref"][p].argmax() == logits["model"][p].argmax())
    report = compare(*pair.runners, positions=(sure,))
    assert report.verdict is Verdict.AGREE
    assert "the logits drift by" in report.reason
    assert "drift-beyond-noise" in {finding.id for finding in report.findings}


def test_flips_of_two_traces_cannot_be_judged_without_a_file(logits: dict[str, np.ndarray]) -> None:
    report = compare(recorded(logits["model"]), recorded(logits["ref"]))
    assert report.verdict is Verdict.UNMEASURED
    assert report.noise is None
    assert report.verdict.exit_code == 3
    assert "noise-unmeasured" in {finding.id for finding in report.findings}
    # The reach of the drift needs no file.
    assert [bound.recall for bound in report.bounds] == [1.0]
    assert compare(recorded(logits["ref"]), recorded(logits["ref"])).verdict is Verdict.AGREE


def test_logits_that_are_not_numbers(logits: dict[str, np.ndarray]) -> None:
    broken = logits["ref"].copy()
    broken[4, 7] = np.nan
    report = compare(recorded(broken), recorded(logits["ref"]))
    assert (report.verdict, report.rows[4].verdict) == (Verdict.DIVERGENCE, Verdict.DIVERGENCE)
    assert "model's logits are not all finite at position 4" in report.reason
    report = compare(recorded(logits["ref"]), recorded(broken))
    assert report.verdict is Verdict.UNMEASURED
    json.dumps(report.to_json(), allow_nan=False)


def test_a_text_is_compared_piece_by_piece(pair: Pair) -> None:
    fed = FedTokens("text", None, "none", (*TOKENS, *TOKENS, 9), context=len(TOKENS))
    tokens = TokensReport("text", None, "none", fed.ids)
    report = compare_margins(*pair.runners, fed=fed, tokens=tokens, with_noise=False)
    assert [(row.chunk, row.position) for row in report.rows] == [(c, p) for c in (0, 1) for p in range(5, 10)]
    # The same tokens from position 0 again: the same numbers.
    assert [row.kl for row in report.rows[:5]] == [row.kl for row in report.rows[5:]]
    assert "text-cut" in {finding.id for finding in report.findings}
    assert report.summary.kl is not None
    assert report.summary.kl.count == 10


def test_what_cannot_be_compared_is_refused(pair: Pair, logits: dict[str, np.ndarray]) -> None:
    ref = Runner(pair.ref, FLOAT32)
    with pytest.raises(CheckpointError, match="no logits"):
        compare(recorded(logits["ref"], stage=Stage.FINAL_NORM), ref, with_noise=False)
    with pytest.raises(CheckpointError, match="the trace is of 2 tokens"):
        compare(recorded(logits["ref"][:2], tokens=(1, 2)), ref, with_noise=False)
    smaller = tiny_checkpoint(replace(CONFIG, vocab_size=300))
    with pytest.raises(CheckpointError, match=r"logits of 300 tokens, the reference of \d+"):
        compare(Runner(smaller, FLOAT32), ref, with_noise=False)
    with pytest.raises(CheckpointError, match="logits of 300 tokens"):
        compare(recorded(logits["ref"][:, :300]), ref, with_noise=False)
    short = replace(pair.ref, config=replace(CONFIG, max_position_embeddings=10))
    with pytest.raises(CheckpointError, match="11 tokens are to be fed at once, and the model's context has 10"):
        compare(Runner(short, FLOAT32), ref, with_noise=False)
    with pytest.raises(CheckpointError, match="no tokens"):
        compare_margins(
            ref, ref, fed=FedTokens("x", None, "none", ()), tokens=TokensReport("x", None, "none", ()), with_noise=False
        )


@pytest.fixture
def run(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    names = {"changed": str(pair.model.path), "ref": str(pair.ref.path)}

    def command(model: str, *options: str) -> int:
        common = ["--ref", names["ref"], "--arithmetic", "float32"]
        return main(["margins", "--model", names[model], *common, *options])

    return command


def test_the_command_says_it_in_words_json_and_a_report(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target, folder = tmp_path / "margins.json", tmp_path / "report"
    options = ("--tokens", "5", "--generate", "10", "--json", str(target), "--report", str(folder))
    assert run("changed", *options) == 1
    words = capsys.readouterr().out
    assert "DIVERGENCE" in words
    assert "1 tokens and 10 of its continuation (the reference's own), 11 compared" in words
    document = json.loads(target.read_text())
    assert document["schema"] == SCHEMA
    assert document["fed"]["source"] == "the reference's own"
    # Greedy, by the reference: at each position of the continuation its best token is the next one.
    rows = document["tokens"]
    for row in rows[:10]:
        assert row["ref"]["top1"] == row["target"]
    assert sum(row["flip"] for row in rows) == document["flip_bounds"][0]["flips"] > 0
    assert {path.name for path in folder.iterdir()} == {"index.html", "margins.json", "margins-tokens.png"}
    assert (folder / "margins-tokens.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count('<li role="option"') == len(rows)


def test_the_command_agrees_on_one_file_and_on_a_text(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    head, tail = (",".join(map(str, part)) for part in (TOKENS[:7], TOKENS[7:]))
    assert run("ref", "--tokens", head, "--continuation-tokens", tail, "--no-noise") == 0
    assert "AGREE" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("the the the the " * 3)
    assert run("ref", "--text-file", str(text), "--no-noise", "--json", "-") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fed"]["context"] == 512
    assert document["summary"]["log_ratio"] == 0.0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--prompt", "", "--no-noise"), 4, "no tokens"),
        (("--prompt", "the", "--continuation", ""), 4, "no tokens"),
        (("--tokens", "5," * 512 + "5", "--no-noise"), 4, "the model's context has 512"),
        (("--tokens", "5," * 509 + "5", "--generate", "9"), 4, "ask for --generate 2 or fewer"),
        (("--tokens", "99999", "--no-noise"), 4, "99999"),
        (("--tokens", "5", "--positions", "3..4"), 4, "reach beyond"),
        (("--tokens", "5", "--continuation", "a", "--generate", "2"), 2, "at most one"),
        (("--continuation", "a"), 2, "goes with a prompt"),
        (("--text-file", "absent.txt"), 4, "absent.txt"),
        (("--text-file", "absent.txt", "--tokens", "5"), 2, "goes without"),
        (("--tokens", "5", "--json", "no/such/folder.json"), 4, "no such folder"),
    ],
)
def test_bad_input_is_named(
    run, capsys: pytest.CaptureFixture, options: tuple[str, ...], code: int, words: str
) -> None:
    assert run("ref", *options) == code
    said = capsys.readouterr()
    assert words in " ".join(said.err.replace("│", " ").split())
    assert "Traceback" not in said.err
    assert said.out == ""
