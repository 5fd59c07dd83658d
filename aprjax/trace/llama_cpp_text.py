"""What llama.cpp makes of text: its tokenizer, its special ids and its built-in chat templates, on one GGUF file.

The vocabulary alone is loaded, in a child process (`llama_cpp_text_child`), which takes a second and no
weights. Its built-in templates are not Jinja: `llama_chat_apply_template` looks for marks of a known family
in the file's template and writes that family's turns itself, so that for Qwen2.5 there is no system turn.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aprjax.checkpoint.types import Checkpoint
from aprjax.trace.llama_cpp import LlamaOptions, require_llama_file, start_child


@dataclass(frozen=True)
class LlamaText:
    """llama.cpp's reading of a file's tokenizer, and of some texts.

    Attributes:
        ids: of each text, special tokens parsed, without BOS and EOS.
        added: tokens that `add_special` puts before the first text (a BOS, where the file asks for one).
        bos: the id, None where there is none; so are eos and pad.
        stop_ids: where generation ends (`llama_vocab_is_eog`).
        rendered: the conversation by the built-in template; None where the file's is of no known family.
        engine: what identifies the engine.
    """

    ids: tuple[tuple[int, ...], ...]
    added: tuple[int, ...]
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool
    stop_ids: tuple[int, ...]
    rendered: str | None
    engine: dict[str, str]


def ask_llama_cpp(
    checkpoint: Checkpoint, texts: Sequence[str], *, user: str = "", options: LlamaOptions | None = None
) -> LlamaText:
    """Asks the installed llama.cpp.

    Args:
        checkpoint: a GGUF file of a Qwen2.
        texts: what to encode; without NUL and lone surrogates.
        user: one user's turn, rendered by the file's chat template with the assistant's header after it.
        options: only `library` matters here.

    Raises:
        EngineError: llama-cpp-python is absent, of another version, or failed; no GGUF file.
    """
    options = options or LlamaOptions()
    require_llama_file(checkpoint)
    with tempfile.TemporaryDirectory(prefix="aprjax-") as folder:
        target = Path(folder) / "answer.json"
        request: dict[str, object] = {
            "path": str(checkpoint.path),
            "target": str(target),
            "texts": list(texts),
            "user": user,
            "options": asdict(options),
        }
        start_child("llama_cpp_text_child", request, options, checkpoint.path)
        answer = json.loads(target.read_bytes())
    return LlamaText(
        ids=tuple(tuple(ids) for ids in answer["ids"]),
        added=tuple(answer["added"]),
        bos=answer["bos"],
        eos=answer["eos"],
        pad=answer["pad"],
        add_bos=answer["add_bos"],
        stop_ids=tuple(answer["stop_ids"]),
        rendered=answer["rendered"],
        engine=answer["engine"],
    )
