"""How the page writes numbers, places, verdicts and sentences."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

from markupsafe import Markup, escape

from aprjax.qwen2.stages import OUTSIDE

# What the reports' verdicts come to for a reader: a tone, a sign that does not hang on colour, and the word.
_TONES = {
    "agree": ("good", "✓"),
    "alike": ("good", "✓"),
    "pass": ("good", "✓"),
    "passed": ("good", "✓"),
    "measured": ("plain", "•"),
    "explained": ("good", "✓"),
    "near-tie": ("near", "≈"),
    "warning": ("near", "!"),
    "divergence": ("bad", "≠"),
    "part": ("bad", "≠"),
    "fail": ("bad", "✗"),
    "failed": ("bad", "✗"),
    "error": ("bad", "✗"),
    "unexplained": ("bad", "✗"),
}
_UNKNOWN = ("none", "?")
NOT_MEASURED = "–"


def tone(verdict: str) -> str:
    """`good`, `near`, `bad`, `plain` for what is no judgement, or `none` for what was not measured or not decided."""
    return _TONES.get(verdict, _UNKNOWN)[0]


def sign(verdict: str) -> str:
    """One character that says the same without colour."""
    return _TONES.get(verdict, _UNKNOWN)[1]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """A few digits, counts in full, powers of ten where zeros would have to be counted; a dash where there is none."""
    if not is_number(value):
        return NOT_MEASURED
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    # Between these bounds the zeros before or behind the digits are read at a glance.
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 1)}e}".partition("e")
        return f"{_minus(mantissa)}e{_minus(str(int(exponent)))}"
    if abs(value) >= 10**digits:
        return _minus(f"{value:,.0f}".replace(",", "\u202f"))
    return _minus(f"{value:.{digits}g}")


def signed(value: Any, digits: int = 3) -> str:
    """The same with a plus sign."""
    return f"+{number(value, digits)}" if is_number(value) and value > 0 else number(value, digits)


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage."""
    return _minus(f"{100 * value:.{digits}f}\u202f%") if is_number(value) else NOT_MEASURED


def rounded(value: Any) -> float | int | None:
    """A number as the page's data keep it: five digits, None where there is none."""
    if not is_number(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def place(layer: int, stage: str) -> str:
    """Layer and stage in words."""
    return stage if layer == OUTSIDE else f"layer {layer}, {stage}"


def prose(text: Any) -> Markup:
    """A sentence in which `backticks` become code and long names may break after a dot; everything is escaped."""
    parts = re.split(r"`([^`\n]+)`", str(text or ""))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else _breakable(part) for index, part in enumerate(parts)
    )


def _breakable(text: str) -> Markup:
    """A tensor's name is longer than a narrow screen's line, and has no space."""
    words = re.split(r"([\w.]{24,})", text)
    return Markup("").join(
        Markup(".<wbr>").join(map(escape, word.split("."))) if index % 2 else escape(word)
        for index, word in enumerate(words)
    )


def file_name(path: Any) -> str:
    """The last part of a path of any platform."""
    return re.split(r"[\\/]", str(path).rstrip("\\/"))[-1] or str(path)


def seconds(value: Any) -> str:
    """A time that a person can place."""
    if not is_number(value):
        return NOT_MEASURED
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60)} s"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
