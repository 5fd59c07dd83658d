"""Hypotheses about the weights that ran, from a trace and the file alone: `files`' accidents, seen in their products.

The tensor that ran is not at hand; its products with the trace's own inputs are. So each accident predicts some rows of
the tensor, and their products are compared; what is borne out becomes a proposal with the whole tensor in its place,
which the search multiplies as the engine does. Ids are those of `files`, behind `weights-`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from aprjax.bisect.cause import MATMUL_STAGES
from aprjax.bisect.explain import weights_blocks as blocks
from aprjax.bisect.explain import weights_embedding as embedding
from aprjax.bisect.explain import weights_matrix as matrix
from aprjax.bisect.explain import weights_rows as rows
from aprjax.bisect.explain import weights_vectors as vectors
from aprjax.bisect.explain.evidence import Evidence
from aprjax.bisect.explain.hypothesis import Candidate, Hypothesis, Node
from aprjax.bisect.explain.weights_look import Look
from aprjax.bisect.explain.weights_rows import each
from aprjax.bisect.explain.weights_vectors import VectorLook, each_vector
from aprjax.qwen2.stages import Stage

_Test = Callable[[Evidence, Node], Iterator[Candidate]]
_STAGES = frozenset({*MATMUL_STAGES, *vectors.VECTORS, Stage.EMBEDDING})
_CONVERT = "convert the model again from the reference, or fix how the engine reads the file"
_ORDER = f"correct the order in which rows and columns are written or read; {_CONVERT}"
_READER = f"correct the unpacking of the blocks (ggml-common.h has the layout); {_CONVERT}"


def _several(
    of_matrix: tuple[Callable[[Look], Iterator[Candidate]], ...] = (),
    of_vector: tuple[Callable[[VectorLook], Iterator[Candidate]], ...] = (),
    of_embedding: tuple[_Test, ...] = (),
) -> _Test:
    tests = (*map(each, of_matrix), *map(each_vector, of_vector), *of_embedding)

    def test(evidence: Evidence, node: Node) -> Iterator[Candidate]:
        for one in tests:
            yield from one(evidence, node)

    return test


def _weights(
    slug: str, test: _Test, next_step: str, *, cheap: bool = True, generalises: tuple[str, ...] = ()
) -> Hypothesis:
    beaten = tuple(f"weights-{other}" for other in generalises)
    return Hypothesis(f"weights-{slug}", "weights", _STAGES, test, next_step, next_step, beaten, cheap)


_MOVED = ("rows-shifted", "reversed", "rotary-interleaved", "heads-permuted")
_SPECIAL = (*_MOVED, "rows-permuted", "rows-copied", "zeroed", "scaled", "shifted", "another-tensor")

# The simplest first: of two that leave equally much, the earlier is the explanation.
WEIGHTS: tuple[Hypothesis, ...] = (
    _weights(
        "zeroed",
        _several((rows.zeroed, matrix.head_columns_zeroed), (vectors.vector_zeroed,), (embedding.zeroed,)),
        f"these values were never written, or not read: {_CONVERT}",
    ),
    _weights(
        "another-tensor",
        _several((matrix.another_tensor,), (vectors.vector_of_another,), (embedding.another_tensor,)),
        "correct the table of tensor names in the converter or the loader",
    ),
    _weights(
        "rows-shifted",
        _several((rows.shifted, matrix.shifted_columns), (vectors.vector_shifted,), (embedding.shifted,)),
        f"look for an offset of one in a row index; {_CONVERT}",
    ),
    _weights(
        "reversed",
        _several(
            (rows.reversed_rows, matrix.reversed_columns), (vectors.vector_reversed,), (embedding.reversed_columns,)
        ),
        _ORDER,
    ),
    _weights(
        "rotary-interleaved",
        _several((rows.rotary,), (vectors.vector_rotary,)),
        "match permutation and rope_type: Qwen2 pairs halves (neox) and needs no permutation of q and k",
    ),
    _weights(
        "heads-permuted",
        _several((rows.heads, matrix.head_columns_permuted), (vectors.vector_heads,)),
        _ORDER,
    ),
    _weights(
        "rows-permuted",
        _several((rows.permuted,), (vectors.vector_permuted,)),
        _ORDER,
        generalises=_MOVED,
    ),
    _weights(
        "rows-copied",
        _several((rows.copied,), (), (embedding.overwritten,)),
        f"these rows were overwritten or read twice: look at the row index; {_CONVERT}",
        generalises=_MOVED,
    ),
    _weights(
        "scaled",
        _several(
            (rows.scaled, matrix.head_columns_scaled, matrix.folded), (vectors.vector_scaled,), (embedding.scaled,)
        ),
        f"look for a scale applied twice, or folded in by the converter; {_CONVERT}",
        generalises=("zeroed",),
    ),
    _weights(
        "shifted",
        _several((rows.added,), (vectors.vector_added,)),
        "look for an offset that is added to the weights (a norm stored as weight - 1, say)",
    ),
    *(
        _weights(
            slug, _several((blocks.changed_fields(slug),), (), (embedding.changed_fields(slug),)), _READER, cheap=False
        )
        for slug in ("nibbles-reordered", "high-bits-dropped", "scale-bits-dropped", "minimum-lost")
    ),
    _weights(
        "type-misread",
        _several((blocks.misread,)),
        "correct the block type in the converter, or in the reader's table of types",
        cheap=False,
    ),
    _weights("byte-order", _several((blocks.byte_order,)), "read and write the values little-endian", cheap=False),
    _weights(
        "transposed",
        _several((matrix.transposed,)),
        "do not transpose: GGUF lists the dimensions innermost first, and the kernel multiplies rows",
        cheap=False,
    ),
    _weights(
        "dimensions-exchanged",
        _several((matrix.exchanged,)),
        "take the shape in the container's own order: GGUF lists the dimensions innermost first",
        cheap=False,
    ),
    _weights(
        "bytes-shifted",
        _several((blocks.moved_bytes,)),
        "correct the tensor's offset: alignment and header size are the usual suspects",
        cheap=False,
    ),
    _weights(
        "double-quantized",
        _several((blocks.twice_encoded,)),
        "convert from the original weights, or keep the blocks as they are",
        cheap=False,
    ),
    _weights(
        "replaced",
        _several((rows.replaced,), (vectors.vector_replaced,)),
        f"look at these rows or elements in the file that ran (`python -m aprjax files`); {_CONVERT}",
        cheap=False,
        generalises=_SPECIAL,
    ),
)
