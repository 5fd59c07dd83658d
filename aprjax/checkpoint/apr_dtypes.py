"""What a dtype byte of an APR index means, decided by the tensor's size (apr-format.md 3.1 and 4.4).

aprender, the two loaders of realizar and older converters give the same byte different meanings (3 is F64 or Q4_1,
8 is AprQ4, Q8_0 or once Q4_K). The byte says which types are possible; the size says which of them it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aprjax.blocks import FORMATS, byte_size
from aprjax.checkpoint.apr_findings import FindingLog
from aprjax.checkpoint.apr_format import IndexEntry
from aprjax.checkpoint.types import CheckpointError

# Types whose rows some writers pad to whole blocks: those with 256 elements a block (apr-format.md 4.4).
_ROW_PADDED_BLOCK = 256


@dataclass(frozen=True)
class DtypeByte:
    """How the readers of apr-format.md 3.1 take one dtype byte.

    Attributes:
        candidates: block types that a writer may have meant, likeliest first.
        aprender: what aprender's reader does with it.
        realizar: what realizar's `TensorEntry` does with it.
        apr_transformer: what realizar's `AprTransformer` does with it.
        reference: upstream ids.
    """

    candidates: tuple[str, ...]
    aprender: str
    realizar: str
    apr_transformer: str
    reference: str = "apr-format.md 3.1"

    @property
    def agreed(self) -> bool:
        """Whether all readers take it alike, and no writer ever meant anything else."""
        return (self.aprender, self.realizar, self.apr_transformer) == self.candidates * 3


def _agreed(name: str) -> DtypeByte:
    return DtypeByte((name,), name, name, name)


_REFUSES = "refuses the file"
_BITS = "the bytes as F32"
DTYPE_TABLE: dict[int, DtypeByte] = {
    0: _agreed("F32"),
    1: _agreed("F16"),
    2: DtypeByte(("Q4_0", "BF16"), _REFUSES, "Q4_0", "Q4_0", "GH-191, #438"),
    3: DtypeByte(("F64", "Q4_1"), "F64", "Q4_1", "Q4_1", "#438, GH-191"),
    4: DtypeByte(("I32", "F32"), "I32", _BITS, _BITS, "#438"),
    5: DtypeByte(("I64", "F32"), "I64", _BITS, _BITS, "#438"),
    6: DtypeByte(("I8", "Q5_0"), "I8", "Q5_0", "Q5_0", "#438, GH-191"),
    7: DtypeByte(("U8", "Q5_1"), "U8", "Q5_1", "Q5_1", "#438, GH-191"),
    8: DtypeByte(
        ("AprQ4", "Q8_0", "Q4_K", "Q5_K"),
        "AprQ4",
        "AprQ4",
        "Q8_0 if the size fits, else AprQ4",
        "GH-239, GH-250, GH-191",
    ),
    9: DtypeByte(("AprQ8", "Q8_1", "Q6_K"), "AprQ8", "AprQ8", "AprQ8", "GH-239, GH-250, GH-191"),
    10: DtypeByte(("Q2_K", "Q8_0"), _REFUSES, "Q2_K", _BITS, "GH-191"),
    11: DtypeByte(("Q3_K",), _REFUSES, "Q3_K", _BITS),
    12: _agreed("Q4_K"),
    13: DtypeByte(("Q5_K",), _REFUSES, "Q5_K", "Q4_K, whose stride is wrong", "GH-191"),
    14: _agreed("Q6_K"),
    15: DtypeByte(("Q8_K", "F32"), _REFUSES, _BITS, _BITS),
    16: DtypeByte(("IQ2_XXS",), _REFUSES, "IQ2_XXS", _BITS, "#3656"),
    17: DtypeByte(("IQ2_XS",), _REFUSES, "IQ2_XS", _BITS, "#3656"),
    30: _agreed("BF16"),
    128: DtypeByte(("AprQ4",), "AprQ4", "AprQ4", _BITS, "GH-438"),
    129: DtypeByte(("AprQ8",), "AprQ8", "AprQ8", _BITS, "GH-438"),
}
_UNKNOWN = DtypeByte(("F32",), _REFUSES, _BITS, _BITS)

# Types that a byte without any fitting meaning may stand for. The IQ and ternary types are left out: no writer of
# APR files emits them under a foreign byte, and each more would make more sizes ambiguous.
_BY_SIZE = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("AprQ4", "AprQ8", "F64"),
)


@dataclass(frozen=True)
class Encoding:
    """A block type, and whether each row was padded to whole blocks."""

    block_type: str
    row_padded: bool = False


def fitting(names: tuple[str, ...], shape: tuple[int, ...], size: int) -> list[Encoding]:
    """Those of the block types `names`, flat or with padded rows, that take exactly `size` bytes."""
    found = []
    for name in names:
        if name not in FORMATS:
            continue
        if byte_size(name, shape) == size:
            found.append(Encoding(name))
        elif may_pad_rows(name, shape) and byte_size(name, shape, row_padded=True) == size:
            found.append(Encoding(name, row_padded=True))
    return found


def may_pad_rows(name: str, shape: tuple[int, ...]) -> bool:
    """Whether rows of this shape do not fill whole blocks, so that readers disagree about the layout."""
    return FORMATS[name].block_size == _ROW_PADDED_BLOCK and len(shape) > 1 and shape[-1] % _ROW_PADDED_BLOCK != 0


def resolve(entry: IndexEntry, shape: tuple[int, ...], *, file: Path, log: FindingLog) -> Encoding:
    """The encoding of a tensor, by its dtype byte and size; deviations go to `log`.

    Args:
        entry: of the index.
        shape: `(out, in)`, after correction of GGUF-ordered shapes.
        file: for messages.
        log: where findings go.

    Raises:
        CheckpointError: no known block type fits the size, or several do and the byte does not decide.
    """
    meaning = DTYPE_TABLE.get(entry.dtype, _UNKNOWN)
    matches = fitting(meaning.candidates, shape, entry.size)
    what_readers_do = (
        f"aprender: {meaning.aprender}; realizar: {meaning.realizar}; AprTransformer: {meaning.apr_transformer}"
    )
    if not matches:
        matches = _by_size_alone(entry, shape, meaning, file)
        log.add(
            "apr-dtype-contradicts-size",
            "error",
            f"dtype byte {entry.dtype} ({_names(meaning.candidates)}) with shape {list(shape)} does not take "
            f"{entry.size} bytes; {matches[0].block_type} does, and is what aprjax reads. {what_readers_do}",
            tensor=entry.name,
            offset=entry.position,
            reference="GH-186, GH-191, GH-478",
        )
    elif not meaning.agreed:
        chosen = matches[0].block_type
        others = [match.block_type for match in matches[1:]]
        doubt = f" {_names(others)} would fit as well: the file cannot tell." if others else ""
        log.add(
            "apr-dtype-ambiguous" if others else "apr-dtype-disputed",
            "error" if others else "warning",
            f"dtype byte {entry.dtype} is read as {chosen}, which fits the {entry.size} bytes.{doubt} "
            f"{what_readers_do}",
            tensor=entry.name,
            offset=entry.position,
            reference=meaning.reference,
        )
    encoding = matches[0]
    if may_pad_rows(encoding.block_type, shape) and shape[0] > 1:
        _report_rows(entry, shape, encoding, log)
    return encoding


def _by_size_alone(entry: IndexEntry, shape: tuple[int, ...], meaning: DtypeByte, file: Path) -> list[Encoding]:
    matches = fitting(_BY_SIZE, shape, entry.size)
    if len(matches) == 1:
        return matches
    expected = ", ".join(f"{byte_size(name, shape)} as {name}" for name in meaning.candidates if name in FORMATS)
    found = f"{_names([match.block_type for match in matches])} would fit" if matches else "no known block type fits"
    raise CheckpointError(
        f"dtype byte {entry.dtype} with shape {list(shape)} takes {expected or 'an unknown number'} bytes, the index "
        f"says {entry.size}; {found}",
        file=file,
        tensor=entry.name,
        offset=entry.position,
        fix="the dtype byte, the shape or the size in the index is damaged; re-convert the model",
    )


def _report_rows(entry: IndexEntry, shape: tuple[int, ...], encoding: Encoding, log: FindingLog) -> None:
    name, columns = encoding.block_type, shape[-1]
    if encoding.row_padded:
        log.add(
            "apr-rows-padded",
            "warning",
            f"{name} rows of {columns} elements are each padded to whole blocks of {_ROW_PADDED_BLOCK}. realizar's "
            "matrix kernels and AprTransformer read them so; aprender and AprV2Model run through the padding and get "
            "wrong values",
            tensor=entry.name,
            offset=entry.position,
            reference="#202, GH-202, GH-370",
        )
    else:
        log.add(
            "apr-rows-flat",
            "error",
            f"{name} blocks run across rows of {columns} elements, which are no multiple of {_ROW_PADDED_BLOCK}. "
            "aprender and AprV2Model read them so; realizar's matrix kernels and AprTransformer expect padded rows "
            "and get wrong values",
            tensor=entry.name,
            offset=entry.position,
            reference="#202, GH-202, GH-370",
        )


def _names(names: tuple[str, ...] | list[str]) -> str:
    return " or ".join(names)
