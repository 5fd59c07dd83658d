"""What a text's ChatML markers say: turns inside turns, and the prompt inside a wrap.

ChatML does not nest: `<|im_start|>` opens a turn, `<|im_end|>` closes it. A turn that opens before the
last one is closed is what a prompt looks like that was wrapped twice (contracts.md section 0; #3672).
"""

from __future__ import annotations

import re

from aprjax.text.template import is_wrapped, wrap

_MARKER = re.compile(r"<\|im_(start|end)\|>")
_BEFORE, _AFTER = wrap("\0", "once").split("\0")


def nested_turns(text: str) -> tuple[int, ...]:
    """Byte offsets (UTF-8) of the `<|im_start|>` that open a turn within an open turn."""
    found, is_open = [], False
    for marker in _MARKER.finditer(text):
        opens = marker[1] == "start"
        if opens and is_open:
            found.append(len(text[: marker.start()].encode("utf-8", "surrogatepass")))
        is_open = opens
    return tuple(found)


def unwrap(text: str) -> str | None:
    """The prompt that `wrap(…, "once")` made this text of; None where it is no such text."""
    if text.startswith(_BEFORE) and text.endswith(_AFTER) and len(text) >= len(_BEFORE) + len(_AFTER):
        return text[len(_BEFORE) : -len(_AFTER)]
    return None


def user_text(text: str) -> str:
    """The innermost prompt: what is left when every wrap around it is taken away."""
    while is_wrapped(text):
        inner = unwrap(text)
        if inner is None:
            return text
        text = inner
    return text
