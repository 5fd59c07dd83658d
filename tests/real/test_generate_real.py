"""Generation on the real files: together as alone, and SHIP-002 in one command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import aprjax
from aprjax.qwen2 import PRESETS
from aprjax.qwen2.batch import generate_batch
from aprjax.qwen2.model import Qwen2
from aprjax.text import Tokenizer

pytestmark = pytest.mark.real_model


def test_many_at_once_say_what_each_says_alone_with_exact_sums(model_path: Callable[[str], Path]) -> None:
    checkpoint = aprjax.open(model_path("qwen2.5-coder-0.5b"))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    model = Qwen2(checkpoint, PRESETS["llama.cpp-exact"])
    prompts = [tokenizer.encode(text) for text in ("def fib(n):", "What is 2+2?")]
    together = generate_batch(model, prompts, max_new_tokens=6)
    for prompt, tokens in zip(prompts, together, strict=True):
        # One pass over each alone, in another shape: exact sums know neither batches nor caches.
        logits = np.asarray(model(prompt + tokens))
        assert tokens == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()


def test_ship_002_in_one_command(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    file = str(model_path("qwen2.5-coder-0.5b"))
    command = [sys.executable, "-m", "aprjax", "run", file, "--prompt", "def fib(n):", "-n", "48"]
    finished = subprocess.run(
        [*command, "--python-check", str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "ast-parse-result.json").read_text())
    assert (result["ast_parse"], result["syntax_errors"], result["function_names"]) == ("OK", 0, ["fib"])
    assert finished.stdout.rstrip("\n") in (tmp_path / "apr-run-output.txt").read_text()
    assert (tmp_path / "fib-completion.py").read_text().startswith("def fib(n):")
