"""`bisect tokens` on the real vocabulary: equal to llama.cpp, clean on clean pairs, and double wraps named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from aprjax.checkpoint import open_checkpoint
from aprjax.cli import main
from aprjax.text import PROBES, Tokenizer, wrap
from aprjax.trace.llama_cpp_text import ask_llama_cpp

pytestmark = pytest.mark.real_model

SMALL, LARGE = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
CHATML = [151644, 872, 198, 3838, 374, 220, 17, 10, 17, 30, 151645, 198, 151644, 77091, 198]


def compare(capsys: pytest.CaptureFixture[str], model: object, ref: object, *extra: str) -> tuple[int, dict]:
    code = main(["tokens", "--model", str(model), "--ref", str(ref), "--json", "-", *extra])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.llama_cpp
def test_a_clean_pair_agrees_with_llama_cpp_on_the_probes(
    model_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = compare(capsys, model_path(LARGE), model_path(SMALL))
    assert (code, document["causes"]) == (0, [])
    assert [prompt["name"] for prompt in document["prompts"]] == [probe.name for probe in PROBES]
    assert [token["id"] for token in document["prompts"][1]["model"]["tokens"]] == CHATML
    assert document["engine"] == dict.fromkeys(("model", "ref"), "llama-cpp-python 0.3.36")
    # What llama.cpp builds in is what --wrap builds: neither has the default system turn that the file's template adds.
    template = document["template"]
    assert template["llama_cpp"] == template["wrapped"] == wrap("What is 2+2?", "once")
    assert template["model"] == template["ref"]
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert template["ref"] == system + template["wrapped"]


@pytest.mark.llama_cpp
def test_llama_cpp_as_a_side_and_the_texts_of_special_tokens(
    model_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<tool_call>{}</s><|im_start|>naïve 你好\u200b<|fim_pad|> 👩\u200d👩 <|im_begin|>"
    small = model_path(SMALL)
    code, document = compare(capsys, small, f"llama.cpp:{small}", "--prompt", text)
    assert (code, document["causes"]) == (0, [])
    (prompt,) = document["prompts"]
    assert (prompt["model"]["source"], prompt["ref"]["source"]) == ("tokenizer", "llama.cpp")
    assert prompt["model"]["text"] == text
    assert {"prompt-invisible", "special-token-unknown"} <= {finding["id"] for finding in document["findings"]}


@pytest.mark.llama_cpp
def test_special_ids_are_llama_cpps(model_path: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(model_path(SMALL))
    answer = ask_llama_cpp(checkpoint, [wrap("What is 2+2?", "once"), "", "a\0b"], user="a\0b")
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert answer.ids == (tuple(CHATML), (), tuple(tokenizer.encode("a\0b")))
    assert (answer.bos, answer.eos, answer.pad, answer.add_bos, answer.added) == (151643, 151645, 151643, False, ())
    assert set(answer.stop_ids) == tokenizer.stop_ids
    # A turn with a NUL has no C string.
    assert answer.rendered is None


def test_a_prompt_wrapped_twice_is_named(model_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = wrap("What is 2+2?", "once")
    small = model_path(SMALL)
    code, document = compare(capsys, small, small, "--prompt", prompt, "--wrap", "once", "--no-engine")
    assert (code, document["causes"]) == (1, ["double-wrap"])
    assert [token["id"] for token in document["prompts"][0]["ref"]["tokens"]] == [
        *CHATML[:3],
        *CHATML,
        *CHATML[10:],
    ]


@pytest.mark.llama_cpp
def test_llama_cpp_reads_a_planted_eos_as_we_do(
    model_path: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model_path(SMALL)
    data = bytearray(source.read_bytes())
    # The key, its type (4: uint32) and its value, wherever they stand in the header.
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)
    place = data.index(key) + len(key)
    assert struct.unpack_from("<I", data, place) == (151645,)
    struct.pack_into("<I", data, place, 151644)
    target = tmp_path / "planted.gguf"
    target.write_bytes(data)
    code, document = compare(capsys, target, source, "--prompt", "What is 2+2?", "--wrap", "once")
    assert (code, document["causes"]) == (1, ["special-token-ids"])
    assert 151644 in document["sides"]["model"]["stop_ids"]
    assert not [finding for finding in document["findings"] if finding["id"].startswith("llama-cpp")]
