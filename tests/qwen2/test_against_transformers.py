"""float32 logits against transformers: tiny random models of several shapes, and the real 0.5B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from qwen2.reference import relative_l2

import aprjax
from aprjax.qwen2 import PRESETS
from aprjax.qwen2.generate import generate_greedy
from aprjax.qwen2.model import Qwen2
from aprjax.text import Tokenizer, wrap

TOKENS = [5, 17, 111, 5, 90, 41, 99, 3, 64, 12, 7]
SHAPES = {
    "grouped": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "one kv head": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, "rope_theta": 1e4},
    "every head its own": {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    },
}


@pytest.mark.transformers_peer
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_tiny_random_models(transformers: ModuleType, tmp_path: Path, shape: dict, tied: bool) -> None:
    import torch

    torch.manual_seed(4)
    config = transformers.Qwen2Config(
        vocab_size=128, intermediate_size=160, num_hidden_layers=3, tie_word_embeddings=tied, **shape
    )
    peer = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            # Initialised biases are zero and norms one: give every parameter something to be wrong about.
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.normal_(1, 0.1)
        expected = peer(torch.tensor([TOKENS])).logits[0].numpy()
    peer.save_pretrained(tmp_path / "model", safe_serialization=True)
    checkpoint = aprjax.open(tmp_path / "model")
    assert checkpoint.tied_head() is tied
    # The bound. Measured over these shapes: 2.9e-7 to 3.1e-7.
    assert relative_l2(np.asarray(Qwen2(checkpoint)(TOKENS)), expected) <= 1e-6


PROMPTS = {
    "What is 2+2? The answer is ": "4.<|im_end|>",
    wrap("What is 2+2?", "once"): "2 + 2 equals 4.<|im_end|>",
}


@pytest.mark.real_model
@pytest.mark.transformers_peer
def test_the_real_half_billion_model(transformers: ModuleType, model_path: Callable[[str], Path]) -> None:
    import torch

    path = model_path("qwen2.5-coder-0.5b")
    peer = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    checkpoint = aprjax.open(path)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    model = Qwen2(checkpoint)
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        with torch.no_grad():
            expected = peer.eval()(torch.tensor([tokens])).logits[0].numpy()
        # The bound for 24 layers of float32. Measured: 8.3e-7 and 2.9e-6.
        assert relative_l2(np.asarray(model(tokens)), expected) <= 1e-4


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_greedy_continuations_are_those_of_transformers(model_path: Callable[[str], Path], name: str) -> None:
    """What both files answer in float32 through transformers, as the design lists it."""
    checkpoint = aprjax.open(model_path(name))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    model = Qwen2(checkpoint, PRESETS["float32"])

    def answer(prompt: str, budget: int) -> str:
        tokens = tokenizer.encode(prompt)
        stops = frozenset(tokenizer.stop_ids)
        return tokenizer.decode(generate_greedy(model, tokens, max_new_tokens=budget, stop_ids=stops))

    assert answer(wrap("What is 2+2?", "once"), 16) == "2 + 2 equals 4.<|im_end|>"
    direct = answer("What is 2+2? The answer is ", 12)
    if name.endswith("0.5b"):
        assert direct == "4.<|im_end|>"
    else:
        assert direct.startswith("4. 2+2 equals 4 because")
    code = "def fib(n):" + answer("def fib(n):", 64)
    namespace: dict = {}
    exec(_first_function(code), namespace)  # the model's own few lines, from a pinned file
    assert [namespace["fib"](n) for n in (5, 6, 7)] in ([5, 8, 13], [8, 13, 21])


def _first_function(text: str) -> str:
    lines = text.splitlines()
    body = [line for line in lines[1:] if line.startswith((" ", "\t")) or not line.strip()]
    end = next(
        (i for i, line in enumerate(lines[1:], 1) if line.strip() and not line.startswith((" ", "\t"))), len(lines)
    )
    assert body
    return "\n".join(lines[:end])
