"""The embedded model's vocabulary: byte-level BPE over Qwen2's words, with Qwen2's control tokens at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.types import Vocabulary
from aprjax.text.words import QWEN2_WORDS

END_OF_TEXT = "<|endoftext|>"
CONTROL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
_NORMAL_TYPE, _CONTROL_TYPE = 1, 3  # ggml's token types


def train_vocabulary(texts: list[str], size: int) -> Vocabulary:
    """A vocabulary of `size` tokens: 256 bytes, merges, then the control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = (*sorted(model["vocab"], key=model["vocab"].__getitem__), *CONTROL)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    return vocabulary_of(tokens, tuple(merges))


def vocabulary_of(tokens: tuple[str, ...], merges: tuple[str, ...]) -> Vocabulary:
    """Tokens and merges with the facts that a GGUF file states beside them."""
    types = tuple(_CONTROL_TYPE if token in CONTROL else _NORMAL_TYPE for token in tokens)
    end, turn_end = tokens.index(END_OF_TEXT), tokens.index("<|im_end|>")
    return Vocabulary(tokens, merges, types, end, turn_end, end, False, "qwen2", "gpt2")


def write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    with atomic_file(path) as stream:
        stream.write(json.dumps({"tokens": vocabulary.tokens, "merges": vocabulary.merges}).encode())


def read_vocabulary(path: Path) -> Vocabulary:
    stored = json.loads(path.read_text())
    return vocabulary_of(tuple(stored["tokens"]), tuple(stored["merges"]))


def encoder(vocabulary: Vocabulary) -> Callable[[list[str]], list[list[int]]]:
    """Encodes texts, control tokens recognised, as `aprjax.text.Tokenizer` does; many at a time."""
    index = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    tokenizer = Tokenizer(models.BPE(vocab=index, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(list(CONTROL))
    return lambda texts: [one.ids for one in tokenizer.encode_batch(texts)]
