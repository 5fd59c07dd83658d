"""llama.cpp's tokenizer, through a vocabulary-only load of a GGUF file."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType


class LlamaTokenizer:
    """`llama_tokenize` and its company on one file; `llama_cpp` is the module of the fixture of that name."""

    def __init__(self, llama_cpp: ModuleType, path: Path) -> None:
        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        # Its log goes to the process's stderr; the callback must outlive the library.
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaTokenizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.llama_model_free(self._model)

    def __len__(self) -> int:
        return self._api.llama_vocab_n_tokens(self._vocabulary)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids without BOS and EOS."""
        data = text.encode()
        # No token is shorter than a byte.
        buffer = (self._api.llama_token * (len(data) + 8))()
        count = self._api.llama_tokenize(self._vocabulary, data, len(data), buffer, len(buffer), False, parse_special)
        assert count >= 0, f"llama_tokenize wants room for {-count} tokens"
        return list(buffer[:count])

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """The bytes of one token; control tokens have some only if `special`."""
        buffer = ctypes.create_string_buffer(512)
        count = self._api.llama_token_to_piece(self._vocabulary, token_id, buffer, len(buffer), 0, special)
        assert count >= 0
        return buffer.raw[:count]

    def ends_generation(self, token_id: int) -> bool:
        """`llama_vocab_is_eog`."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token_id))
