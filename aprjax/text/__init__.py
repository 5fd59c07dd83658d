"""Tokenizer and chat template, from a checkpoint's own metadata."""

from aprjax.text.tokenizer import TextError, Tokenizer

__all__ = ["TextError", "Tokenizer"]
