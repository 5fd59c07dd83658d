"""What the quantized block formats mean: byte layouts, decoding, encoding, activation blocks, integer dots."""

from aprjax.blocks.codec import dequantize, encode
from aprjax.blocks.registry import FORMATS, BlockFormat, UnknownBlockType, block_format, byte_size

__all__ = ["FORMATS", "BlockFormat", "UnknownBlockType", "block_format", "byte_size", "dequantize", "encode"]
