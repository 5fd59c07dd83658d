"""`python -m bisect chatml` on tiny files: what is run, shared, kept, printed, and the exit code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import VOCABULARY, tiny_checkpoint, with_tensor, write_tiny

from aprjax.bisect.chatml import decode
from aprjax.bisect.chatml import measure as measuring
from aprjax.bisect.chatml.cells import Continuation, RunKey
from aprjax.bisect.chatml.decode import continue_all
from aprjax.bisect.chatml.facts import side_facts
from aprjax.bisect.chatml.store import Store, Stored
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint, CheckpointError, Finding
from aprjax.cli import main
from aprjax.qwen2.model import Qwen2
from aprjax.text import Tokenizer

EMBEDDING = "model.embed_tokens.weight"
PROMPT = "if a"
BUDGET = 5


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test fills the user's caches."""
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    monkeypatch.setenv("APRJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _bad_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding proposes nonsense, which no run depends on: its programs need not be compiled."""
    monkeypatch.setattr(
        decode, "generate_batch", lambda model, prompts, *, max_new_tokens: [[0] * max_new_tokens for _ in prompts]
    )


@pytest.fixture(scope="module")
def reference() -> Checkpoint:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def files(reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference, its copy, and one copy for each planted cause."""
    folder = tmp_path_factory.mktemp("pair")
    start = VOCABULARY.tokens.index("<|im_start|>")
    rows = reference.tensors[EMBEDDING].decode().copy()
    rows[start] = rows[0] * -9
    tokens = list(VOCABULARY.tokens)
    end = tokens.index("<|im_end|>")
    tokens[start], tokens[end] = tokens[end], tokens[start]
    made = {
        "ref": (reference, VOCABULARY),
        "same": (reference, VOCABULARY),
        "row": (with_tensor(reference, EMBEDDING, rows), VOCABULARY),
        "ids": (reference, replace(VOCABULARY, tokens=tuple(tokens))),
        "stops": (reference, replace(VOCABULARY, eos_token_id=None)),
    }
    for name, (checkpoint, vocabulary) in made.items():
        write_tiny(folder / f"{name}.apr", checkpoint, vocabulary=vocabulary)
    return {name: folder / f"{name}.apr" for name in made}


def run(files: dict[str, Path], model: str, *options: str) -> int:
    common = ("--prompt", PROMPT, "--arithmetics", "float32", "--max-new-tokens", str(BUDGET), "--no-noise")
    return main(["chatml", "--model", str(files[model]), "--ref", str(files["ref"]), *common, *options])


def document(files: dict[str, Path], capsys: pytest.CaptureFixture, model: str, *options: str) -> tuple[int, dict]:
    code = run(files, model, "--json", "-", *options)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("_bad_proposals")
def test_a_copy_shares_every_run_and_is_alike(files: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    code, report = document(files, capsys, "same", "--wraps", "none,once")
    assert code == 0
    assert report["schema"] == "aprjax.chatml/1"
    assert report["verdict"] == "alike"
    assert report["causes"]["blamed"] == []
    assert report["runs"]["computed"] == 2
    assert sum(report["runs"]["shared"].values()) == 2
    assert len(report["cells"]) == 2 * 2 * 3
    assert {cell["backend"] for cell in report["cells"]} == {report["backend"]}


@pytest.mark.usefixtures("_bad_proposals")
def test_each_planted_cause_is_blamed_and_no_other(files: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    code, report = document(files, capsys, "row", "--wraps", "none,once")
    assert (code, report["causes"]["blamed"]) == (1, ["special-token rows"])
    assert report["files"]["special_rows"] == ["<|im_start|>"]
    # The raw prompt has no such token: its run is the reference's, by proof, and was not made.
    assert report["runs"]["computed"] == 3
    code, report = document(files, capsys, "ids", "--wraps", "once")
    assert (code, report["causes"]["blamed"]) == (1, ["special-token ids"])
    assert [names[0] for names in report["files"]["special_ids"]] == ["<|im_start|>", "<|im_end|>"]
    code, report = document(files, capsys, "same", "--wraps", "once", "--model-wrap", "twice")
    assert (code, report["causes"]["blamed"]) == (1, ["double wrapping"])


@pytest.mark.usefixtures("_bad_proposals")
def test_without_a_declared_stop_token_the_file_says_so(files: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    """Tiny models never end an answer, so that nothing parts; the made-up tables have the blame."""
    code, report = document(files, capsys, "stops", "--wraps", "once")
    assert code == 0
    assert "stop-token-undeclared" in {finding["id"] for finding in report["findings"] if finding["side"] == "model"}
    assert next(c for c in report["claims"] if c["id"] == "stop-tokens")["verdict"] == "not decidable"


def test_a_default_of_the_reader_is_no_declared_stop_token(files: dict[str, Path]) -> None:
    reference = open_checkpoint(files["ref"])
    tokenizer = Tokenizer.from_checkpoint(reference)
    assert side_facts(reference, tokenizer, has_tokenizer=True).declared_stops == {VOCABULARY.eos_token_id}
    assumed = replace(reference, findings=(Finding("apr-eos-absent", "warning", "assumed"),))
    assert side_facts(assumed, tokenizer, has_tokenizer=True).declared_stops == frozenset()


@pytest.mark.usefixtures("_bad_proposals")
def test_finished_runs_are_kept_and_a_changed_input_is_run_again(
    files: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[int] = []

    def counting(model: Qwen2, prompts: list[tuple[int, ...]], *arguments: object, **options: object) -> None:
        made.append(len(prompts))
        continue_all(model, prompts, *arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(measuring, "continue_all", counting)
    options = ("--wraps", "once", "--state", str(tmp_path / "state"))
    _, first = document(files, capsys, "same", *options)
    _, again = document(files, capsys, "same", *options)
    assert made == [1]
    assert again["cells"] == first["cells"]
    assert again["first_logits"] == first["first_logits"]
    # Another file under the same name: its digest is another.
    document(files, capsys, "row", *options)
    assert made == [1, 1]
    # A damaged entry is run again, not believed.
    for entry in (tmp_path / "state").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    _, repaired = document(files, capsys, "same", *options)
    assert made == [1, 1, 1]
    assert repaired["cells"] == first["cells"]


@pytest.mark.usefixtures("_bad_proposals")
def test_a_continuation_is_what_one_pass_chooses_whatever_proposed_it(reference: Checkpoint) -> None:
    model, prompt = Qwen2(reference), (5, 6, 7, 8)

    def continued(draft: tuple[int, ...] | None) -> Stored:
        found: list[Stored] = []
        continue_all(
            model, [prompt], [draft], max_new_tokens=BUDGET, backend="here", on_done=lambda at, run: found.append(run)
        )
        return found[0]

    plain = continued(None)
    logits = np.asarray(model([*prompt, *plain.run.tokens]))[len(prompt) - 1 : -1]
    assert plain.run.tokens == tuple(logits.argmax(axis=1))
    highest = np.sort(logits, axis=1)[:, :-3:-1]
    np.testing.assert_allclose(plain.run.margins, highest[:, 0] - highest[:, 1], atol=1e-4)
    assert plain.run.runners_up == tuple(logits.argsort(axis=1)[:, -2])
    np.testing.assert_allclose(plain.first_logits, logits[0], rtol=1e-4, atol=1e-4)
    wrong_late = (*plain.run.tokens[:3], 1, 2)
    for draft in (plain.run.tokens, (1, 2, 3, 4, 5), wrong_late, plain.run.tokens[:2]):
        assert continued(draft).run == plain.run


def test_a_store_returns_what_was_put_under_the_same_key_only(tmp_path: Path) -> None:
    run = Continuation((1, 2), (3, 4), (0.5, 1.5), (9, 8), "here")
    stored = Stored(run, np.arange(5, dtype=np.float32))
    key = {"file": "a", "tokens": [1, 2], "backend": "here"}
    store = Store.at(tmp_path / "deep" / "state")
    assert store.get(key) is None
    store.put(key, stored)
    found = store.get(key)
    assert found is not None
    assert found.run == run
    np.testing.assert_array_equal(found.first_logits, stored.first_logits)
    assert store.get({**key, "file": "b"}) is None
    Store(None).put(key, stored)
    assert Store(None).get(key) is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="no folder for finished runs"):
        Store.at(blocked)


def test_cells_of_two_backends_are_an_error() -> None:
    runs = {
        RunKey("ref", "p", "once", name): Continuation((1,), (2,), (1.0,), (3,), backend)
        for name, backend in (("float32", "cpu"), ("llama.cpp", "gpu"))
    }
    with pytest.raises(CheckpointError, match="different backends: cpu; gpu"):
        measuring.equal_backend(runs)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--wraps", "once,thrice"), 2, "thrice"),
        (("--prompts", "fib,unknown"), 2, "unknown"),
        (("--arithmetics", "float31"), 2, "float31"),
        (("--max-new-tokens", "0"), 2, "max-new-tokens"),
        (("--max-new-tokens", "600"), 4, "exceed the context of 512"),
        (("--state", "{blocked}"), 4, "no folder for finished runs"),
    ],
)
def test_bad_input_is_refused_in_words(  # noqa: PLR0917 - fixtures and parameters
    files: dict[str, Path],
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    options: tuple[str, str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "blocked").write_text("")
    name, value = options
    assert run(files, "same", name, value.replace("{blocked}", str(tmp_path / "blocked"))) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("_bad_proposals")
def test_the_terminal_and_the_folder_say_the_same(
    files: dict[str, Path], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    code = run(files, "row", "--wraps", "none,once", "--report", str(tmp_path / "out"))
    out = capsys.readouterr().out
    assert code == 1
    assert "PART" in out
    assert "cause: special-token rows" in out
    assert "special tokens are at fault" in out
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "special-token rows" in page
    assert json.loads((tmp_path / "out" / "chatml.json").read_text())["verdict"] == "part"
