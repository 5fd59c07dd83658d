"""Which tokens of a vocabulary are matched in text as a whole, and how text is cut at them.

The rules are llama.cpp's (`llama-vocab.cpp`: `llama_vocab::impl::load` for the classes and
`tokenizer_st_partition` for the cutting), since a prompt must yield the same ids on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # ggml's LLAMA_TOKEN_TYPE_*

# llama.cpp ends generation at these texts, and makes the tokens control tokens whatever the file says.
# One of them has consequences: Qwen2's ordinary vocabulary contains "</s>", so llama.cpp matches it as
# a whole in text, and stops there.
END_OF_GENERATION = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "</s>", "<eos>", "[EOS]", "[e~["),
        *("<EOT>", "_<EOT>", "[EOT]", "<|eot_id|>", "<|eom_id|>", "<|return|>", "<|call|>", "<|calls|>"),
        *("<|flush|>", "<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|tool_response>"),
        "<｜end▁of▁sentence｜>",
    )
)
# Fill-in-the-middle markers in Qwen's spelling: control tokens too, and the second row ends generation.
FILL_IN_MIDDLE = frozenset(("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))
FILL_IN_MIDDLE_END = frozenset(("<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>"))

# The tags that realizar takes for special in an .apr file (apr-format.md 2.4): `<word>` and `</word>`.
_TAG = re.compile(r"</?[a-z_]+>")
_LONGEST_TAG = 20


def matches_upstream_pattern(token: str) -> bool:
    """Whether realizar treats a token of an `.apr` file as special: `<|…|>`, or `<word>`/`</word>`."""
    if not (token.startswith("<") and token.endswith(">")):
        return False
    if token.startswith("<|") and token.endswith("|>") and len(token) > 4:
        return True
    return len(token) <= _LONGEST_TAG and _TAG.fullmatch(token) is not None


def special_token_types(tokens: Sequence[str]) -> dict[int, int]:
    """Types by upstream's pattern, `{id: CONTROL | USER_DEFINED}`, for a container without token types.

    Upstream does not tell control tokens from others; `<|…|>` is taken for control and a tag for
    user-defined here, as Qwen2.5's own GGUF files have it.
    """
    return {
        index: CONTROL if token.startswith("<|") else USER_DEFINED
        for index, token in enumerate(tokens)
        if token[:1] == "<" and matches_upstream_pattern(token)
    }


def declared_token_types(token_types: Sequence[int], index: Mapping[str, int]) -> dict[int, int]:
    """The declared types other than normal, `{id: type}`, with llama.cpp's overrides by text."""
    types = {token_id: kind for token_id, kind in enumerate(token_types[: len(index)]) if kind != 1}
    for text in END_OF_GENERATION | FILL_IN_MIDDLE | FILL_IN_MIDDLE_END:
        if text in index:
            types[index[text]] = CONTROL
    return types


@dataclass(frozen=True)
class Partition:
    """Cuts text at special tokens: longest token first, its occurrences from left to right.

    This is not the leftmost-longest search of the `tokenizers` package. The two agree as long as no
    special token can begin inside another one, which holds for Qwen's but not in general.
    """

    always: tuple[tuple[str, int], ...]
    if_parsed: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, tokens: Sequence[str], types: Mapping[int, int]) -> Partition:
        """Of the tokens whose type is control, user-defined or unknown."""

        def ordered(kinds: Iterable[int]) -> tuple[tuple[str, int], ...]:
            chosen = [(tokens[index], index) for index, kind in types.items() if kind in kinds and tokens[index]]
            # Length counts bytes, as in llama.cpp; its order among equal lengths is unspecified.
            return tuple(sorted(chosen, key=lambda pair: (-len(pair[0].encode("utf-8", "replace")), pair[1])))

        return cls(always=ordered({USER_DEFINED}), if_parsed=ordered({CONTROL, USER_DEFINED, UNKNOWN}))

    def split(self, text: str, *, parse_special: bool) -> list[str | int]:
        """Text fragments (never empty) and token ids, in order.

        Args:
            text: any text.
            parse_special: match control tokens too; user-defined ones are matched in any case.
        """
        fragments: list[str | int] = [text] if text else []
        for token, token_id in self.if_parsed if parse_special else self.always:
            if token in text:
                fragments = [piece for fragment in fragments for piece in _cut(fragment, token, token_id)]
        return fragments


def _cut(fragment: str | int, token: str, token_id: int) -> Iterable[str | int]:
    if isinstance(fragment, int):
        yield fragment
        return
    first, *rest = fragment.split(token)
    if first:
        yield first
    for piece in rest:
        yield token_id
        if piece:
            yield piece
