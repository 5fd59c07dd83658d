"""Parsing strings in bulk against following them one by one, on text made to mislead it."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aprjax.checkpoint import gguf_strings
from aprjax.checkpoint.gguf_strings import StringArrayError, read_string_array

# Zeros, and bytes that before zeros look like lengths; texts of 256 bytes and more have another kind of prefix.
MISLEADING = st.lists(
    st.sampled_from([b"\0", b"\0" * 7, b"\0" * 8, b"\1", b"\x08", b"a", "é".encode(), b"\xff"]), max_size=6
)
TEXTS = st.one_of(
    MISLEADING.map(b"".join),
    st.text(max_size=12).map(str.encode),
    st.integers(250, 260).map(lambda size: b"x" * size),
    st.just(b"y" * 3000),
)


def packed(texts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text for text in texts)


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXTS, max_size=60), before=st.binary(max_size=9), after=st.binary(max_size=40))
@example(texts=[b"abc"], before=b"", after=b"")
@example(texts=[b"ab"] * 50, before=b"", after=b"\2\0\0\0\0\0\0\0cd")
@pytest.mark.parametrize("chunk", [64, 1000, 1 << 16])
def test_bulk_parsing_gives_what_following_gives(chunk: int, texts: list[bytes], before: bytes, after: bytes) -> None:
    buffer = np.frombuffer(before + packed(texts) + after, np.uint8)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(gguf_strings, "_CHUNK_BYTES", chunk)
        found, end, malformed = read_string_array(buffer, len(before), len(texts), longest=1 << 20)
    assert [text.encode(errors="surrogateescape") for text in found] == texts
    assert end == buffer.size - len(after)
    sound = [index for index, text in enumerate(texts) if index not in malformed]
    assert all(texts[index].decode() == found[index] for index in sound)
    for index in malformed:
        with pytest.raises(UnicodeDecodeError):
            texts[index].decode()


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=20), cut=st.integers(1, 3000))
def test_a_cut_array_is_refused_at_the_prefix_that_lies(texts: list[bytes], cut: int) -> None:
    whole = packed(texts)
    buffer = np.frombuffer(whole[: max(len(whole) - cut, 0)], np.uint8)
    with pytest.raises(StringArrayError) as caught:
        read_string_array(buffer, 0, len(texts), longest=1 << 20)
    prefixes = np.cumsum([0] + [8 + len(text) for text in texts])
    assert caught.value.offset in prefixes


def test_a_string_longer_than_allowed_is_refused() -> None:
    buffer = np.frombuffer(packed([b"a", b"x" * 1000]), np.uint8)
    with pytest.raises(StringArrayError, match="claims 1000 bytes; the limit is 999"):
        read_string_array(buffer, 0, 2, longest=999)


@pytest.mark.parametrize("text", [b"", b"\0", b"a" + b"\0" * 8 + b"b", b"\xff", b"x" * 300, "é".encode() * 60])
def test_no_text_makes_the_work_grow_faster_than_the_file(text: bytes) -> None:
    count = 200_000 if len(text) < 20 else 20_000
    buffer = np.frombuffer(packed([text] * count), np.uint8)
    start = time.process_time()
    found, end, _ = read_string_array(buffer, 0, count, longest=1 << 20)
    # Following 200,000 prefixes takes some 0.3 s of a core here; splitting again for each string would take minutes.
    assert time.process_time() - start < 5
    assert (len(found), end) == (count, buffer.size)
