"""What the tokenizer promises without a peer: round trips, ids in range, and faults that are named."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from aprjax.checkpoint.types import CheckpointError, Vocabulary
from aprjax.text import TextError, Tokenizer
from aprjax.text.byte_alphabet import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE, token_bytes
from aprjax.text.special_tokens import Partition, matches_upstream_pattern
from aprjax.text.tokenizer import MAX_CHARACTERS
from aprjax.text.words import QWEN2_WORDS

from .corpus import corpus
from .synthetic import checkpoint_of, small_vocabulary

SMALL = Tokenizer(small_vocabulary())
COMPOSED = Tokenizer(small_vocabulary(), nfc=True)


@given(text=st.text(), parse_special=st.booleans())
@example(text="<|im_start|>user\n</s><tool_call>é👋👋abcd\n\n\n\n", parse_special=True)
@example(text="\x00\r\n\ufeff\U0010ffff", parse_special=False)
@settings(deadline=None)
def test_decoding_undoes_encoding(text, parse_special):
    ids = SMALL.encode(text, parse_special=parse_special)
    assert SMALL.decode(ids) == text
    assert all(0 <= index < len(SMALL) for index in ids)
    assert SMALL.decode_bytes(ids) == text.encode()


def test_decoding_undoes_encoding_on_the_corpus():
    for _, text in corpus():
        assert SMALL.decode(SMALL.encode(text)) == text


@given(ids=st.lists(st.integers(0, len(SMALL) - 1)))
@settings(deadline=None)
def test_any_ids_decode(ids):
    assert SMALL.decode(ids) == SMALL.decode_bytes(ids).decode("utf-8", "replace")
    assert all(SMALL.token(index).isprintable() for index in ids if index not in SMALL.special_ids)


def test_byte_alphabet_is_a_bijection():
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))
    assert [BYTE_OF_CHARACTER[character] for character in CHARACTER_OF_BYTE] == list(range(256))
    # The alphabet is a published convention, so a few of its letters are pinned.
    assert [token_bytes(text) for text in ("Ġthe", "Ċ", "ä¸Ń", "Ń")] == [b" the", b"\n", "中".encode(), b"\xad"]


def test_special_tokens_as_text_and_as_tokens():
    start, end = (SMALL.vocabulary.tokens.index(text) for text in ("<|im_start|>", "<|im_end|>"))
    call = SMALL.vocabulary.tokens.index("<tool_call>")
    text = "<|im_start|>!<tool_call><|im_end|>"
    assert SMALL.encode(text) == [start, SMALL.vocabulary.tokens.index("!"), call, end]
    plain = SMALL.encode(text, parse_special=False)
    assert call in plain
    assert not {start, end} & set(plain)
    assert SMALL.decode([start, call, end], skip_special=True) == "<tool_call>"


def test_end_of_sequence_tag_is_control_whatever_the_file_says():
    # "</s>" is the product of merges here, and an ordinary token by its type, as in Qwen2.
    index = SMALL.vocabulary.tokens.index("</s>")
    assert SMALL.vocabulary.token_types[index] == 1
    assert index in SMALL.special_ids & SMALL.stop_ids
    assert SMALL.encode("a</s>b")[1] == index


def test_partition_goes_by_length_not_by_position():
    partition = Partition.of(("ab", "bcd"), {0: 3, 1: 3})
    assert partition.split("abcd", parse_special=True) == ["a", 1]
    assert partition.split("abcd", parse_special=False) == ["abcd"]
    assert partition.split("", parse_special=True) == []


def test_bos_and_stop_tokens():
    vocabulary = SMALL.vocabulary
    assert SMALL.encode("a", add_bos=True) == [vocabulary.bos_token_id, *SMALL.encode("a")]
    assert SMALL.encode("", add_bos=True) == [vocabulary.bos_token_id]
    assert SMALL.encode("") == []
    assert {vocabulary.tokens[index] for index in SMALL.eos_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert SMALL.eos_ids <= SMALL.stop_ids
    with pytest.raises(CheckpointError, match="BOS"):
        Tokenizer(replace(vocabulary, bos_token_id=None)).encode("a", add_bos=True)
    with pytest.raises(CheckpointError, match=r"bos_token_id is 9999"):
        Tokenizer(replace(vocabulary, bos_token_id=9999)).encode("a", add_bos=True)


def test_declared_stop_tokens_count():
    metadata = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.fim_pad_token_id": 10**9}
    assert Tokenizer(small_vocabulary(), metadata=metadata).stop_ids == SMALL.stop_ids | {5}


@pytest.mark.parametrize("text", ["e\u0301", "A\u030a", "\u1112\u1161\u11ab", "\u212b"])
def test_nfc_is_an_option(text):
    import unicodedata

    composed = unicodedata.normalize("NFC", text)
    assert composed != text
    assert COMPOSED.encode(text) == SMALL.encode(composed) != SMALL.encode(text)
    assert COMPOSED.decode(COMPOSED.encode(text)) == composed


def test_readable_pieces():
    byte_of = {CHARACTER_OF_BYTE[byte]: byte for byte in range(256)}
    ids = [SMALL.vocabulary.tokens.index(character) for character in (CHARACTER_OF_BYTE[0xE4], "Ċ", "Ġ", "a")]
    assert byte_of["Ċ"] == 10
    assert [SMALL.token(index) for index in ids] == ["\\xe4", "\\n", " ", "a"]
    assert SMALL.token(SMALL.vocabulary.tokens.index("[PAD7]")) == "[PAD7]"
    assert SMALL.decode([SMALL.vocabulary.tokens.index("[PAD7]")]) == ""


@pytest.mark.parametrize("index", [-1, len(SMALL), 10**12])
def test_ids_out_of_range_are_refused(index):
    for use in (SMALL.decode, SMALL.decode_bytes, lambda ids: SMALL.token(ids[0])):
        with pytest.raises(TextError, match=f"token id {index} is outside the vocabulary"):
            use([index])


def test_lone_surrogates_are_refused():
    with pytest.raises(TextError, match=r"U\+D83D at character 2"):
        SMALL.encode("ab\ud83dc")


@pytest.mark.thorough
def test_the_longest_run_of_white_space_is_encoded_and_a_longer_text_refused():
    # The whole way takes seconds and a gigabyte; the limit is that of the split.
    split = Split(Regex(QWEN2_WORDS), "isolated").pre_tokenize_str(" " * (MAX_CHARACTERS - 1) + "x")
    assert [len(piece) for piece, _ in split] == [MAX_CHARACTERS - 2, 2]
    with pytest.raises(TextError, match="at most 8388608"):
        SMALL.encode(" " * (MAX_CHARACTERS + 1))


def faulty(**changes: object) -> str:
    """The message with which a changed vocabulary is refused."""
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(replace(small_vocabulary(), **changes), file="model.apr")
    assert caught.value.file == "model.apr"
    assert caught.value.fix
    return str(caught.value)


def test_missing_vocabulary_or_merges_name_the_upstream_fault():
    assert "PMAT-172" in faulty(tokens=())
    assert "PMAT-172" in faulty(merges=())
    with pytest.raises(CheckpointError, match="PMAT-172"):
        Tokenizer.from_checkpoint(checkpoint_of(None))


def test_faulty_vocabularies_are_refused_with_the_place():
    good = small_vocabulary()
    assert "merge 1 ('a zzz') names 'zzz'" in faulty(merges=(good.merges[0], "a zzz"))
    assert "merge 0 ('! \"') names '!\"'" in faulty(merges=('! "',))
    assert "merge 2 is 'nospace'" in faulty(merges=(*good.merges[:2], "nospace"))
    assert "merge 0 is ''" in faulty(merges=("",))
    assert "twice, as 3 and 4" in faulty(tokens=(*good.tokens[:4], good.tokens[3], *good.tokens[5:]))
    assert "token types for" in faulty(token_types=good.token_types[:-1])
    assert "'llama'" in faulty(model="llama")
    assert "GH-277" in faulty(pre_tokenizer="llama-bpe")
    assert "eos_token_id is -1" in faulty(eos_token_id=-1)


def test_repeated_empty_entries_are_padding():
    good = small_vocabulary()
    padded = replace(good, tokens=(*good.tokens, "", ""), token_types=(*good.token_types, 5, 5))
    assert Tokenizer(padded).encode("fine") == SMALL.encode("fine")
    assert Tokenizer(padded).decode([len(SMALL)]) == ""


def test_a_byte_without_token_is_an_error_only_where_it_is_needed():
    tokenizer = Tokenizer(Vocabulary(tokens=("a", "b", "ab"), merges=("a b",), pre_tokenizer="qwen2"))
    assert tokenizer.encode("abab") == [2, 2]
    with pytest.raises(CheckpointError, match="no token for the byte 0x63"):
        tokenizer.encode("abc")


def test_without_token_types_the_upstream_pattern_decides_and_says_so():
    tokenizer = Tokenizer(small_vocabulary(typed=False))
    tokens = tokenizer.vocabulary.tokens
    expected = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<tool_call>", "</tool_call>"}
    assert {tokens[index] for index in tokenizer.special_ids} == expected | {"<unknown>", "</s>"}
    (finding,) = tokenizer.findings
    assert finding.id == "tokenizer-special-by-pattern"
    assert "'</s>'" in finding.message  # which a GGUF reader could not know
    assert Tokenizer(replace(small_vocabulary(), pre_tokenizer=None)).findings[0].id == "tokenizer-pre-missing"
    assert SMALL.findings == ()


@pytest.mark.parametrize(
    ("token", "special"),
    [
        ("<|im_start|>", True),
        ("<|x|>", True),
        ("<||>", False),
        ("<tool_call>", True),
        ("</tool_call>", True),
        ("<abcdefghijklmnopqr>", True),
        ("<abcdefghijklmnopqrs>", False),
        ("<0x0A>", False),
        ("<Tag>", False),
        ("<>", False),
        ("</>", False),
        ("a<b>", False),
        ("<a>\n", False),
    ],
)
def test_upstream_pattern(token, special):
    assert matches_upstream_pattern(token) is special


def test_long_runs_take_linear_time():
    # 200 times the text may take 200 times as long; quadratic work would take 40,000 times as long.
    for unit in (" ", "a", "\n ", "='", "中", "<|"):
        started = time.perf_counter()
        assert SMALL.decode(SMALL.encode(unit * 200_000)) == unit * 200_000
        assert time.perf_counter() - started < 10.0, unit


def test_text_imports_without_jax_and_transformers():
    code = "import aprjax.text, sys; print([name for name in ('jax', 'flax', 'transformers') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


@pytest.mark.real_model
def test_a_real_vocabulary_builds_fast(real_checkpoint):
    best = min(_seconds(lambda: Tokenizer.from_checkpoint(real_checkpoint)) for _ in range(5))
    # 0.24 s of CPU time here, most of it inside `tokenizers`; half a second is what opening a model may cost.
    assert best < 0.5


def _seconds(action: Callable[[], object]) -> float:
    """CPU time, which other processes' load does not lengthen."""
    started = time.process_time()
    action()
    return time.process_time() - started
