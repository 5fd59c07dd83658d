"""JSON as upstream's tools print it: serde_json's pretty printer, byte for byte."""

from __future__ import annotations

import json
import math
from typing import Any


def serde_pretty(value: Any) -> str:
    """A JSON value in serde_json's form: two spaces, no escapes beyond need, numbers as Rust writes them.

    Keys keep their order, as upstream's do. A number that is none (NaN, an infinity) is null.
    """
    return _pretty(value, "")


def _pretty(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_pretty(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and value:
        return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{indent}]"
    if isinstance(value, float):
        return _float(value)
    return json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    """The shortest digits that come back: Rust writes 1e-5 and above out, and exponents without a plus."""
    if not math.isfinite(value):
        return "null"
    digits, mark, exponent = repr(value).partition("e")
    if not mark:
        return digits
    if int(exponent) == -5:
        sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
        return f"{sign}0.0000{digits.replace('.', '')}"
    return f"{digits}e{int(exponent)}"
