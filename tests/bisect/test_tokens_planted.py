"""Faults of tokenizer and template that a script planted in a file are named by `bisect tokens`, each as one cause."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tiny import CONFIG, VOCABULARY, tiny_checkpoint

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.apr_writer import write_apr
from aprjax.cli import main

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults" / "plant.py"
TEMPLATE = "{{ messages[0].content }}"
# No weight is read: the smallest model that can be written.
CONFIG = replace(CONFIG, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8)
CAUSES = {
    "special-ids-swapped": "special-token-ids",
    "eos-id-wrong": "special-token-ids",
    "eos-missing": "stop-tokens",
    "special-token-ordinary": "special-tokens-as-text",
    "template-broken": "template",
    "tokenizer-missing": "tokenizer-missing",
}


@pytest.fixture(scope="module")
def planter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plant_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plant_text"] = module
    spec.loader.exec_module(module)
    return module


def write(path: Path, template: str | None = None) -> Path:
    model = tiny_checkpoint(CONFIG)
    tensors = model.tensors.values()
    write_apr(path, config=CONFIG, tensors=tensors, vocabulary=VOCABULARY, chat_template=template)
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer; without a template, since rendering starts a process."""
    return write(tmp_path_factory.mktemp("tokens") / "clean.apr")


def compare(model: Path, ref: Path, capsys: pytest.CaptureFixture[str], *extra: str) -> tuple[int, dict]:
    asked = ["--prompt", "What is 2+2?", "--wrap", "once", "--no-engine", "--json", "-"]
    code = main(["tokens", "--model", str(model), "--ref", str(ref), *asked, *extra])
    return code, json.loads(capsys.readouterr().out)


def test_every_text_fault_is_tested(planter: ModuleType) -> None:
    assert set(CAUSES) == set(planter.TEXT_FAULTS)


@pytest.mark.parametrize("fault", CAUSES)
def test_a_planted_fault_is_the_only_cause(
    planter: ModuleType, clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    target = tmp_path / "planted.apr"
    if fault == "template-broken":
        clean = write(tmp_path / "clean.apr", TEMPLATE)
    report = planter.plant(clean, target, fault)
    assert report["expected"] == {"cause": CAUSES[fault]}
    before, after = open_checkpoint(clean), open_checkpoint(target)
    keys = set(before.metadata) | set(after.metadata)
    assert {key for key in keys if before.metadata.get(key) != after.metadata.get(key)} == set(report["keys"])
    assert {name: t.sha256() for name, t in before.tensors.items()} == {n: t.sha256() for n, t in after.tensors.items()}
    code, document = compare(target, clean, capsys)
    assert document["causes"] == [CAUSES[fault]]
    assert code == (3 if fault == "tokenizer-missing" else 1)
    # Which side it is makes no difference to what is named.
    _, reversed_document = compare(clean, target, capsys)
    assert reversed_document["causes"] == [CAUSES[fault]]


def test_a_clean_pair_blames_nothing(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = compare(clean, clean, capsys)
    assert (code, document["schema"], document["verdict"], document["causes"]) == (0, "aprjax.tokens/1", "agree", [])


def test_faults_that_cannot_be_planted(planter: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "bare.apr")
    request = planter.Request(token="nobody")
    for fault, asked, words in (("template-broken", None, "no chat template"), ("eos-id-wrong", request, "no token")):
        with pytest.raises(sys.modules["container"].PlantError, match=words):
            planter.plant(path, tmp_path / "planted.apr", fault, asked)


BAD_INPUT = [
    (["--prompt", ""], 4, "the prompt has no tokens"),
    (["--prompt", "a", "--tokens", "1,2"], 2, "at most one of"),
    (["--tokens", "1,2", "--wrap", "once"], 2, "--wrap goes with text"),
    (["--prompt-file", "{bad}"], 4, "not UTF-8"),
    (["--prompt", "a\udcff"], 4, "U+DCFF"),
]


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case[2])
def test_bad_input_is_one_sentence(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: tuple[list[str], int, str]
) -> None:
    arguments, code, words = case
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xff")
    given = [argument.replace("{bad}", str(bad)) for argument in arguments]
    assert main(["tokens", "--model", str(clean), "--ref", str(clean), "--no-engine", *given]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_neither_side_with_a_tokenizer_is_refused_with_the_way_out(
    planter: ModuleType, clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "planted.apr"
    planter.plant(clean, target, "tokenizer-missing")
    assert main(["tokens", "--model", str(target), "--ref", str(target), "--prompt", "a"]) == 4
    said = capsys.readouterr().err
    assert "PMAT-172" in said
    assert "--tokens" in said
