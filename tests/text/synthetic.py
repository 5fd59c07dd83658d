"""A small byte-level vocabulary with every oddity that the rules speak of, and a GGUF file of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from aprjax.checkpoint.types import Checkpoint, ModelConfig, Vocabulary
from aprjax.text.byte_alphabet import CHARACTER_OF_BYTE

from .corpus import corpus

Encoder = Callable[[str], list[int]]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

# Not all of these exist in Qwen's vocabulary: some begin inside another one, which tells a search by
# token from a search by position; no two of those have the same length, since llama.cpp sorts by it.
SPECIALS = {
    "<|endoftext|>": CONTROL,
    "<|im_start|>": CONTROL,
    "<|im_end|>": CONTROL,
    "<tool_call>": USER_DEFINED,
    "</tool_call>": USER_DEFINED,
    "<|fim_prefix|>": NORMAL,  # llama.cpp makes it a control token
    "|><|im": CONTROL,
    "tart|><tool_call": USER_DEFINED,
    # The first has more bytes and fewer characters than the second.
    "é👋👋": USER_DEFINED,
    "👋abcd": USER_DEFINED,
    "\n\n\n": USER_DEFINED,
    "<unknown>": UNKNOWN,
    "[PAD7]": UNUSED,
    "": UNUSED,
}


@lru_cache
def learn_merges(count: int) -> tuple[str, ...]:
    """Merges by pair frequency over a part of the corpus, ties in order of the alphabet."""
    texts = [
        text for kind, text in corpus() if kind in ("code", "latin", "cjk", "emoji", "indic", "whitespace", "plain")
    ]
    words = Counter(word for text in texts for word in text.replace(" ", " \0").split("\0") if word)
    pieces = {word: [CHARACTER_OF_BYTE[byte] for byte in word.encode()] for word in words}
    merges: list[str] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, split in pieces.items():
            for pair in pairwise(split):
                pairs[pair] += words[word]
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(f"{left} {right}")
        for split in pieces.values():
            position = 0
            while position < len(split) - 1:
                if split[position] == left and split[position + 1] == right:
                    split[position : position + 2] = [left + right]
                position += 1
    return tuple(merges)


def small_vocabulary(*, typed: bool = True, merges: int = 250) -> Vocabulary:
    """256 bytes, the merged tokens (`</s>` among them, as in Qwen2), then the special ones."""
    learnt = [*learn_merges(merges), "< /", "s >", "</ s>"]
    tokens = [*CHARACTER_OF_BYTE, *dict.fromkeys(merge.replace(" ", "") for merge in learnt)]
    types = [NORMAL] * len(tokens) + list(SPECIALS.values())
    # Twice the same merge: the first rank counts.
    learnt.append(learnt[0])
    return Vocabulary(
        tokens=(*tokens, *SPECIALS),
        merges=tuple(learnt),
        token_types=tuple(types) if typed else (),
        bos_token_id=len(tokens),
        eos_token_id=len(tokens) + 2,
        padding_token_id=len(tokens),
        add_bos=False,
        pre_tokenizer="qwen2",
        model="gpt2",
    )


def write_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """A GGUF file with the vocabulary alone, by gguf-py."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.token_types:
        writer.add_token_types(list(vocabulary.token_types))
    writer.add_token_merges(list(vocabulary.merges))
    assert vocabulary.bos_token_id is not None
    assert vocabulary.eos_token_id is not None
    writer.add_bos_token_id(vocabulary.bos_token_id)
    writer.add_eos_token_id(vocabulary.eos_token_id)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def checkpoint_of(vocabulary: Vocabulary | None = None, chat_template: str | None = None) -> Checkpoint:
    """A checkpoint without tensors around a vocabulary and a template."""
    config = ModelConfig("qwen2", 8, 1, 1, 1, 8, 16, 512, 64, 1e6, "neox", 1e-6)
    return Checkpoint(
        path=Path("model.gguf"),
        format="gguf",
        config=config,
        tensors={},
        vocabulary=vocabulary,
        chat_template=chat_template,
        metadata={},
    )


def disagreements(texts: Iterable[tuple[str, str]], ours: Encoder, theirs: Encoder) -> list[str]:
    """A line for each text on which two encoders differ."""
    found = []
    for kind, text in texts:
        a, b = ours(text), theirs(text)
        if a != b:
            found.append(f"{kind} {text[:60]!r}: {a[:16]} against {b[:16]}")
    return found
