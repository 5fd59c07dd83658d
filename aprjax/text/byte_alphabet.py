"""The byte alphabet of byte-level BPE: 256 printable characters, one for each byte.

Vocabularies of the GPT-2 kind (GGUF's `tokenizer.ggml.model = "gpt2"`) write a token's bytes as these
characters, so that a token is always valid text: `Ġ` is the space and `Ċ` the line feed. The bytes
that print in Latin-1 stand for themselves; the other 68 follow, in order, from U+0100.
"""

from __future__ import annotations

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)

BYTE_OF_CHARACTER: dict[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + position): byte for position, byte in enumerate(_OTHERS)
}
CHARACTER_OF_BYTE: tuple[str, ...] = tuple(
    character for character, _ in sorted(BYTE_OF_CHARACTER.items(), key=lambda pair: pair[1])
)


def token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for.

    A token with a character outside the alphabet is no byte-level token (a placeholder, or a special
    token that its container does not mark); its own UTF-8 is returned.
    """
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8", "surrogatepass")
