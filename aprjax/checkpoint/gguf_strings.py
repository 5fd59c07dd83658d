"""Arrays of length-prefixed strings, parsed in bulk.

A Qwen2 vocabulary and its merges are 303,323 strings. Following one length prefix after the other
would take most of the time that opening a file takes. A string shorter than 256 bytes follows a
prefix whose u64 is below 256, so comparing the u64 at *every* byte offset finds all such prefixes at
once. If each one found begins where the string of the one before it ends, then, by induction from
the known start, these are exactly the prefixes that following would have found. With the length
bytes zeroed, eight zeros separate the strings, and decoding and splitting is one call each.
Whatever does not agree is followed one by one.
"""

from __future__ import annotations

import numpy as np

_LENGTH_BYTES = 8
_SEPARATOR = "\0" * _LENGTH_BYTES
# Large enough to amortise the calls, small enough to stay in a core's cache, and that strings which
# have to be followed (one of 256 bytes or more is enough) cost no more than one such piece.
_CHUNK_BYTES = 1 << 16


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
        chunk = buffer[position : position + _CHUNK_BYTES]
        found, used = _split(chunk, count - len(texts))
        # Too little found (crafted text can look like prefixes): following the whole piece keeps the work linear.
        if found and (used >= chunk.size // 4 or len(texts) + len(found) == count):
            texts.extend(found)
        else:
            raw, used = _follow(buffer, position, count - len(texts), longest)
            for piece in raw:
                try:
                    texts.append(piece.decode())
                except UnicodeDecodeError:
                    malformed.append(len(texts))
                    texts.append(piece.decode(errors="surrogateescape"))
        position += used
    return texts, position, malformed


def _split(chunk: np.ndarray, wanted: int) -> tuple[list[str], int]:
    """The strings at the start of `chunk` whose prefixes confirm each other, and their extent.

    Finds nothing where one of them begins or ends with a zero byte (which would join its separator),
    holds a separator or is not UTF-8.
    """
    if chunk.size < _LENGTH_BYTES:
        return [], 0
    copy = chunk.copy()
    words = np.ndarray(copy.size - _LENGTH_BYTES + 1, "<u8", buffer=copy, strides=(1,))
    starts = np.flatnonzero(words < 256)[: wanted + 1]
    if not starts.size or starts[0] != 0:
        return [], 0
    lengths = copy[starts].astype(np.int64)
    ends = starts + _LENGTH_BYTES + lengths
    agreeing = ends[:-1] == starts[1:]
    # The last prefix found counts if its string lies in the chunk; the first always follows the known start.
    count = 1 + (agreeing.size if agreeing.all() else int(np.argmin(agreeing)))
    count = min(count, wanted)
    if ends[count - 1] > copy.size:
        count -= 1
    if count == 0 or not lengths[:count].all():
        return [], 0
    used = int(ends[count - 1])
    if not (copy[starts[:count] + _LENGTH_BYTES].all() and copy[ends[:count] - 1].all()):
        return [], 0
    copy[starts[:count]] = 0
    try:
        texts = copy[_LENGTH_BYTES:used].tobytes().decode().split(_SEPARATOR)
    except UnicodeDecodeError:
        return [], 0
    # More pieces than prefixes: the last text, which no prefix confirms, holds a separator itself.
    return (texts, used) if len(texts) == count else ([], 0)


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
