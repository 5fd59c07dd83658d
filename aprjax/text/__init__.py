"""Tokenizer, chat template and probe prompts; everything about text comes from the checkpoint's own metadata."""

from aprjax.text.probes import PROBES, Probe
from aprjax.text.template import TemplateError, Wrap, is_wrapped, render_chat, wrap
from aprjax.text.tokenizer import TextError, Tokenizer

__all__ = [
    "PROBES",
    "Probe",
    "TemplateError",
    "TextError",
    "Tokenizer",
    "Wrap",
    "is_wrapped",
    "render_chat",
    "wrap",
]
