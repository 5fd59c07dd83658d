"""Fixtures of the text tests: the small vocabulary in both engines, and the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from aprjax.checkpoint.types import Checkpoint
from aprjax.text import Tokenizer

from .llama_tokenizer import LlamaTokenizer
from .synthetic import small_vocabulary, write_vocabulary


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """Our tokenizer of the small vocabulary."""
    return Tokenizer(small_vocabulary())


@pytest.fixture(scope="session")
def small_peer(llama_cpp: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaTokenizer]:
    """llama.cpp on the small vocabulary."""
    path = tmp_path_factory.mktemp("vocabulary") / "small.gguf"
    write_vocabulary(small_vocabulary(), path)
    with LlamaTokenizer(llama_cpp, path) as peer:
        yield peer


@pytest.fixture(scope="session")
def real_checkpoint(model_path: Callable[[str], Path]) -> Checkpoint:
    """The 0.5B model, opened. Mark such tests `real_model`."""
    from aprjax.checkpoint import open_checkpoint

    return open_checkpoint(model_path("qwen2.5-coder-0.5b"))


@pytest.fixture(scope="session")
def real(real_checkpoint: Checkpoint) -> Tokenizer:
    """Our tokenizer of the 0.5B model."""
    return Tokenizer.from_checkpoint(real_checkpoint)


@pytest.fixture(scope="session")
def real_peer(llama_cpp: ModuleType, model_path: Callable[[str], Path]) -> Iterator[LlamaTokenizer]:
    """llama.cpp on the 0.5B model."""
    with LlamaTokenizer(llama_cpp, model_path("qwen2.5-coder-0.5b")) as peer:
        yield peer
