"""`run` at the command line: text alone on stdout, what was fed, why it ended, and bad input in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from text.synthetic import small_vocabulary
from tiny import CONFIG, tiny_checkpoint, write_tiny

from aprjax.checkpoint.types import CheckpointError
from aprjax.cli import main
from aprjax.qwen2.generate import Stop
from aprjax.qwen2.python_check import check_run, completion_name, write_check
from aprjax.qwen2.run import Fed, RunReport
from aprjax.qwen2.sampling import GREEDY
from aprjax.text import Tokenizer

TOKENIZER = Tokenizer(small_vocabulary())
# As tests/qwen2/test_generation.py has them: the same shapes, so the same compiled programs.
IDS = [41, 99, 3, 250, 12, 7, 5]
BUDGET = "6"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "tiny.apr"
    write_tiny(path, tiny_checkpoint())
    return path


@pytest.fixture
def run(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """Runs the tiny model; gives the exit code, stdout, and stderr without frames."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments: str, file: Path | str | None = None) -> tuple[int, str, str]:
        code = main(["run", str(file or tiny), "--arithmetic", "float32", "-n", BUDGET, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(re.sub("[│╭╮╰╯─]", " ", captured.err).split())

    return call


def asked(ids: list[int]) -> list[str]:
    return ["--tokens", ",".join(map(str, ids))]


def test_stdout_is_the_text_and_the_json_says_the_same(run: Callable[..., tuple], tmp_path: Path) -> None:
    code, out, err = run(*asked(IDS), "--ignore-stop", "--json", str(tmp_path / "run.json"))
    assert code == 0
    report = json.loads((tmp_path / "run.json").read_text())
    assert len(report["tokens"]) == int(BUDGET)
    assert report["text"] == TOKENIZER.decode(report["tokens"])
    assert out == report["text"] + ("" if report["text"].endswith("\n") else "\n")
    assert report["stop"] == "max-new-tokens"
    assert report["fed"]["tokens"] == IDS
    assert re.fullmatch(r"[0-9a-f]{64}", report["sha256"])
    assert "the budget of 6 tokens" in err
    assert "tokens/s" in err
    code, out, _ = run(*asked(IDS), "--ignore-stop", "--json", "-")
    assert (code, json.loads(out)["tokens"]) == (0, report["tokens"])
    # A further stop token ends it, and is not printed.
    code, out, err = run(*asked(IDS), "--ignore-stop", "--stop", str(report["tokens"][1]), "--json", "-")
    stopped = json.loads(out)
    length = report["tokens"].index(report["tokens"][1]) + 1
    assert (stopped["stop"], stopped["tokens"]) == ("stop-token", report["tokens"][:length])
    assert stopped["text"] == TOKENIZER.decode(report["tokens"][: length - 1])
    assert "the stop token" in err


def test_sampling_is_reported_with_its_seed(run: Callable[..., tuple]) -> None:
    code, out, err = run(*asked(IDS), "--temperature", "2", "--top-k", "40", "--top-p", "0.9", "--json", "-")
    assert code == 0
    seed = json.loads(out)["sampling"]["seed"]
    assert f"temperature 2, top-k 40, top-p 0.9, seed {seed}" in err
    _, again, _ = run(
        *asked(IDS), "--temperature", "2", "--top-k", "40", "--top-p", "0.9", "--seed", str(seed), "--json", "-"
    )
    assert json.loads(again)["tokens"] == json.loads(out)["tokens"]


def test_what_is_fed_is_shown_to_the_token(run: Callable[..., tuple]) -> None:
    code, _, err = run("--prompt", "a<|nonsense|>", "--wrap", "once", "-v")
    assert code == 0
    assert "wrap once" in err
    assert "<|im_start|> (special)" in err
    assert "'<|im_start|>user\\na<|nonsense|><|im_end|>\\n<|im_start|>assistant\\n'" in err
    assert "'<|nonsense|>' is no special token of this file" in err
    # Wrapped by hand and wrapped again.
    code, _, err = run("--prompt", "<|im_start|>user\na<|im_end|>\n", "--wrap", "once")
    assert code == 0
    assert "note: a turn begins inside a turn" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give --prompt, --prompt-file or --tokens"),
        (["--prompt", "a", "--tokens", "1"], 2, "at most one of"),
        (["--tokens", "1", "--wrap", "once"], 2, "token ids are taken as they are"),
        (["--tokens", "one"], 2, "token ids with commas"),
        (["--tokens", "1", "--top-p", "0"], 2, "top-p is 0.0, expected a number above 0"),
        (["--tokens", "1", "--temperature", "inf"], 2, "temperature is inf"),
        (["--tokens", "1", "--arithmetic", "abacus"], 2, "'abacus' is unknown"),
        (["--prompt", "a\udcff"], 2, "lone surrogate U+DCFF"),
        (["--prompt", ""], 4, "the prompt has no tokens"),
        (["--tokens", "1,999999"], 4, "token id 999999 lies outside the embedding"),
        (["--tokens", ",".join(["1"] * 600)], 4, "600 tokens, expected fewer than the context's 512"),
        (["--prompt-file", "nowhere.txt"], 4, "nowhere.txt"),
        (["--tokens", "1", "--json", "no/such/folder.json"], 4, "there is no such folder"),
    ],
)
def test_bad_input_is_refused_in_words(run: Callable[..., tuple], arguments: list[str], code: int, said: str) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_files_that_cannot_be_used_are_refused_in_words(run: Callable[..., tuple], tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 au lait")
    code, _, err = run("--prompt-file", str(latin))
    assert (code, "not UTF-8" in err, "offset 3" in err) == (4, True, True)
    code, _, err = run(*asked(IDS), "--python-check", str(latin))
    assert (code, "cannot be made" in err) == (4, True)
    code, _, err = run("--prompt", "a", file="llama.cpp:x.gguf")
    assert (code, "computes itself" in err) == (2, True)


def test_without_a_tokenizer_ids_run_and_text_is_refused_with_the_way_out(
    run: Callable[..., tuple], tmp_path: Path
) -> None:
    bare = tmp_path / "bare.apr"
    write_tiny(bare, tiny_checkpoint(), vocabulary=None)
    code, out, err = run("--prompt", "a", file=bare)
    assert (code, out) == (4, "")
    assert "PMAT-172" in err
    assert "--tokens" in err
    code, out, err = run(*asked(IDS), file=bare)
    assert code == 0
    assert re.fullmatch(r"\d+(,\d+){5}\n", out)


def a_report(answer: str | None, *, prompt: str = "def fib(n):", wrap: str = "none") -> RunReport:
    fed = Fed(prompt, wrap, prompt, (1, 2))
    return RunReport("m.gguf", "00", "float32", fed, (3, 4, 5), answer, Stop.BUDGET, None, GREEDY, None, 0.5, 0.2, 0.3)


def test_python_that_parses_and_python_that_does_not(tmp_path: Path) -> None:
    good = a_report("\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\ndef main(")
    checked = check_run(good)
    assert checked.result.parses
    written = write_check(tmp_path / "deep" / "evidence", good, checked)
    assert [path.name for path in written] == ["apr-run-output.txt", "fib-completion.py", "ast-parse-result.json"]
    program: dict[str, Callable[[int], int]] = {}
    exec(written[1].read_text(), program)
    assert [program["fib"](n) for n in range(7)] == [0, 1, 1, 2, 3, 5, 8]
    assert json.loads(written[2].read_text())["function_names"] == ["fib"]
    assert "Completed in 0.80s" in written[0].read_text()
    bad = check_run(a_report("\n    return n if"))
    assert not bad.result.parses
    assert "raise --max-new-tokens" in bad.line()
    with pytest.raises(CheckpointError, match="PMAT-172"):
        check_run(a_report(None))


def test_the_exit_code_of_a_check_is_1_where_nothing_parses(run: Callable[..., tuple], tmp_path: Path) -> None:
    code, _, err = run("--prompt", "def f(", "--python-check", str(tmp_path / "check"))
    assert code == 1
    assert "python: does not parse" in err
    assert json.loads((tmp_path / "check" / "ast-parse-result.json").read_text())["syntax_errors"] == 1
    assert (tmp_path / "check" / "f-completion.py").read_text().startswith("def f(")


def test_names_of_completions_are_plain() -> None:
    assert completion_name("def fib(n):") == "fib-completion.py"
    assert completion_name("Write a poem.") == "completion.py"
    assert completion_name("def größe(n):") == completion_name(f"def {'f' * 50}(n):") == "completion.py"


def test_the_context_of_the_file_is_its_own(tmp_path: Path, run: Callable[..., tuple]) -> None:
    short = tmp_path / "short.apr"
    write_tiny(short, tiny_checkpoint(replace(CONFIG, max_position_embeddings=10)))
    code, out, err = run(*asked(IDS), "--ignore-stop", "--json", "-", file=short)
    assert code == 0
    assert json.loads(out)["stop"] == "context-full"
    assert "7 + 3 tokens fill it" in err
