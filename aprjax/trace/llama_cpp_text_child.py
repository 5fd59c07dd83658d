"""Asks llama.cpp's tokenizer and built-in templates, in a process of its own. Started by `llama_cpp_text`.

Protocol: as in `llama_cpp_child`; the answer is a JSON object in the file that the request names.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from aprjax.trace.llama_cpp_child import load_engine, serve


def _run(request: dict[str, Any]) -> None:
    api, _, facts = load_engine()
    api.llama_backend_init()
    wanted = api.llama_model_default_params()
    wanted.vocab_only = True
    model = api.llama_model_load_from_file(os.fsencode(request["path"]), wanted)
    if not model:
        raise RuntimeError("llama.cpp cannot load the file's vocabulary")
    try:
        answer = _answer(api, model, request) | {"engine": facts}
    finally:
        api.llama_model_free(model)
    Path(request["target"]).write_text(json.dumps(answer), encoding="utf-8")


def _answer(api: Any, model: Any, request: dict[str, Any]) -> dict[str, Any]:
    vocabulary = api.llama_model_get_vocab(model)
    texts = request["texts"]
    plain = [_encode(api, vocabulary, text, add_special=False) for text in texts]
    added = _encode(api, vocabulary, texts[0], add_special=True) if texts else []
    # llama.cpp says -1 (LLAMA_TOKEN_NULL) where a file names no such token.
    named = {name: getattr(api, f"llama_vocab_{name}")(vocabulary) for name in ("bos", "eos", "pad")}
    return {
        "ids": plain,
        "added": added[: len(added) - len(plain[0])] if texts else [],
        **{name: None if index < 0 else index for name, index in named.items()},
        "add_bos": bool(api.llama_vocab_get_add_bos(vocabulary)),
        "stop_ids": [i for i in range(api.llama_vocab_n_tokens(vocabulary)) if api.llama_vocab_is_eog(vocabulary, i)],
        "rendered": _render(api, model, request["user"]),
    }


def _encode(api: Any, vocabulary: Any, text: str, *, add_special: bool) -> list[int]:
    data = text.encode("utf-8")
    # No token is shorter than a byte; BOS and EOS come on top.
    room = (api.llama_token * (len(data) + 2))()
    count = api.llama_tokenize(vocabulary, data, len(data), room, len(room), add_special, True)
    if count < 0:
        raise RuntimeError(f"llama_tokenize wants room for {-count} tokens of {len(data)} bytes")
    return list(room[:count])


def _render(api: Any, model: Any, user: str) -> str | None:
    template = api.llama_model_chat_template(model, None)
    # A turn is a C string: one with a NUL would be cut there.
    if not template or "\0" in user:
        return None
    turns = (api.llama_chat_message * 1)(api.llama_chat_message(role=b"user", content=user.encode("utf-8")))
    size = 1 << 12
    while True:
        room = ctypes.create_string_buffer(size)
        count = api.llama_chat_apply_template(template, turns, 1, True, room, size)
        if count <= size:
            return None if count < 0 else room.raw[:count].decode("utf-8", "replace")
        size = count


if __name__ == "__main__":
    sys.exit(serve(_run))
