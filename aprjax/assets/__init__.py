"""The model that aprjax carries: a tiny Qwen2, trained on Python's standard library (`training/`)."""

from __future__ import annotations

from pathlib import Path


def embedded_model() -> Path:
    """The embedded GGUF file: 5 layers, 5 million weights in Q4_K and Q6_K, ChatML's control tokens."""
    return Path(__file__).with_name("tiny-qwen2-q4_k.gguf")
