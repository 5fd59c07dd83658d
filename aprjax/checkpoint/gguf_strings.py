"""Arrays of length-prefixed strings, parsed at the speed of `bytes.split`.

A Qwen2 vocabulary and its merges are 303,323 strings. Following one length prefix after the other
takes most of the time that opening a file takes, so the common case is parsed in bulk: a string
shorter than 256 bytes is preceded by its length byte and seven zero bytes, so cutting at every run
of seven zeros yields pieces `text_i + length_byte_of(i+1)`. A piece whose size agrees with the
length byte that ended the piece before it is, by induction from the known start, exactly the string
that following the prefixes would have found. Whatever does not agree is followed one by one.
"""

from __future__ import annotations

import numpy as np

_LENGTH_BYTES = 8
_SEVEN_ZEROS = bytes(_LENGTH_BYTES - 1)
# Large enough to amortise the calls, small enough that a lying header costs no memory to speak of.
_CHUNK_BYTES = 1 << 18


class StringArrayError(Exception):
    """A length prefix points beyond the end of the buffer; `.offset` is where that prefix stands."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def read_string_array(buffer: np.ndarray, start: int, count: int, *, longest: int) -> tuple[list[str], int, list[int]]:
    """Parse `count` strings, each a little-endian u64 length and that many bytes of UTF-8.

    Args:
        buffer: `uint8[bytes]`, the whole file.
        start: offset of the first length prefix.
        count: how many strings; the caller has checked `8 * count` against the bytes that are left.
        longest: the longest string to accept, in bytes.

    Returns:
        The strings (bytes that are not UTF-8 as lone surrogates, PEP 383), the offset after the
        last, and the indices of strings that were not valid UTF-8.

    Raises:
        StringArrayError: a string reaches beyond the buffer or is longer than `longest`.
    """
    texts: list[str] = []
    malformed: list[int] = []
    position = start
    while len(texts) < count:
        chunk = buffer[position : position + _CHUNK_BYTES].tobytes()
        pieces, used = _split(chunk, count - len(texts))
        if used == 0:
            pieces, used = _follow(buffer, position, count - len(texts), longest)
        try:
            texts.extend([piece.decode() for piece in pieces])
        except UnicodeDecodeError:
            for piece in pieces:
                text = piece.decode(errors="surrogateescape")
                if not text.isascii() and not _is_unicode(text):
                    malformed.append(len(texts))
                texts.append(text)
        position += used
    return texts, position, malformed


def _split(chunk: bytes, wanted: int) -> tuple[list[bytes], int]:
    """The strings at the start of `chunk` that splitting finds and the length bytes confirm, and their extent."""
    pieces = chunk.split(_SEVEN_ZEROS, wanted)
    if len(pieces) < 2 or len(pieces[0]) != 1:
        return [], 0
    complete = len(pieces) > wanted
    # The last piece has no separator behind it: it holds the last string wanted and what follows
    # the array, or is cut off by the chunk's end.
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    lengths = np.frombuffer(b"".join([piece[-1:] or b"\0" for piece in pieces[:-1]]), np.uint8).astype(np.int64)
    fits = sizes[1:] == lengths + 1
    fits[-1] = complete and sizes[-1] >= lengths[-1]
    agreeing = len(fits) if fits.all() else int(np.argmin(fits))
    used = agreeing * _LENGTH_BYTES + int(lengths[:agreeing].sum())
    texts = [piece[:-1] for piece in pieces[1 : agreeing + 1]]
    if agreeing == len(fits):
        texts[-1] = pieces[agreeing][: lengths[-1]]
    return texts, used


def _follow(buffer: np.ndarray, start: int, wanted: int, longest: int) -> tuple[list[bytes], int]:
    """Follow the length prefixes for one chunk (or one string, if that is longer)."""
    texts: list[bytes] = []
    position, size = start, buffer.size
    while len(texts) < wanted and position - start < _CHUNK_BYTES:
        if position + _LENGTH_BYTES > size:
            raise StringArrayError(f"expected a string, the file ends after {size} bytes", position)
        length = int.from_bytes(buffer[position : position + _LENGTH_BYTES].tobytes(), "little")
        end = position + _LENGTH_BYTES + length
        if end > size:
            left = size - position - _LENGTH_BYTES
            raise StringArrayError(f"a string claims {length} bytes where {left} are left in the file", position)
        if length > longest:
            raise StringArrayError(f"a string claims {length} bytes; the limit is {longest}", position)
        texts.append(buffer[position + _LENGTH_BYTES : end].tobytes())
        position = end
    return texts, position - start


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
