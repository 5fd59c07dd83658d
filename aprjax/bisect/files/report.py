"""What `bisect files` reports: frozen dataclasses that show themselves as JSON, frame, HTML or the worst few."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from aprjax.bisect.confidence import Confidence, Level, by_residual
from aprjax.bisect.report import SidedFinding, Verdict
from aprjax.checkpoint.types import Checkpoint, Finding

SCHEMA = "aprjax.files/1"

# Keys whose difference changes no number of a forward pass.
_INERT_KEYS = ("max_position_embeddings", "architecture")
_DIMENSIONS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True)
class WorstRow:
    """One row (of a vector, the whole) and its relative L2."""

    row: int
    rel_l2: float | None


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that the two files do not hold in the same bytes.

    Attributes:
        name: canonical name.
        block_types: of model and reference; None where the tensor is missing.
        rel_l2: of the decoded values; None where they cannot be compared.
        cosine: likewise.
        rows: how many rows (of a matrix) hold a differing value.
        first_row: the first of them.
        explanation: in words; empty where the values are equal.
        explanation_id: the hypothesis that explains the difference; empty where none does.
        parameters: of the hypothesis: a factor, a permutation, a range of rows, a type.
        residual: relative L2 of what the hypothesis leaves; 0.0 where it leaves nothing, None without one.
        basis: what the residual was measured on.
        tolerance: the largest residual that the rounding of the two block types explains.
        excluded: `(hypothesis, its best residual)` of those that were tried and do not explain it, the nearest first.
        next_step: what to do about it, in words.
        worst_rows: the rows that differ most.
        max_abs: the largest difference of a value.
        shapes: of model and reference; None where the tensor is missing.
    """

    name: str
    block_types: tuple[str | None, str | None]
    rel_l2: float | None
    cosine: float | None
    rows: int
    first_row: int | None
    explanation: str
    explanation_id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    residual: float | None = None
    basis: str = ""
    tolerance: float | None = None
    excluded: tuple[tuple[str, float], ...] = ()
    next_step: str = ""
    worst_rows: tuple[WorstRow, ...] = ()
    max_abs: float | None = None
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)

    @property
    def same_values(self) -> bool:
        """Other bytes, equal decoded values: another encoding of the same numbers."""
        return self.rel_l2 == 0.0

    @property
    def exact(self) -> bool:
        """Whether the explanation leaves nothing."""
        return self.residual == 0.0

    @property
    def confidence(self) -> Confidence:
        """How sure the explanation is, and what it rests on. That the tensor differs is certain in any case."""
        if not self.explanation_id and self.shapes[0] != self.shapes[1]:
            return Confidence(Level.CERTAIN, "the shapes were read in the files")
        if not self.explanation_id:
            basis = "every value was compared, and the tensor differs; what happened to it is not known"
            if self.excluded:
                name, residual = self.excluded[0]
                basis += f" (the nearest hypothesis, {name}, leaves {residual:.2g})"
            return Confidence(Level.CERTAIN, basis)
        if self.residual is None:  # missing, or not finite: seen, not inferred
            return Confidence(Level.CERTAIN, "it was seen in the file")
        if self.exact:
            encoded = self.basis.endswith(", encoded")
            where = self.basis.removesuffix(", encoded")
            what = "the predicted values, encoded, are" if encoded else "the predicted values are"
            return Confidence(Level.CERTAIN, f"{what} the file's bit for bit ({where})")
        nearest = self.excluded[0] if self.excluded else None
        return by_residual(self.residual, self.tolerance or 0.0, measured_on=self.basis, next_best=nearest)


@dataclass(frozen=True)
class FilesReport:
    """What the two files have in common and what not.

    Attributes:
        config: `(model's, reference's)` of each key that differs.
        tensors: those that are not held in the same bytes.
        compared: how many tensors there are in either file.
        identical_bytes: how many of them are held in the same bytes.
        decoded: how many were decoded on both sides.
    """

    config: dict[str, tuple[Any, Any]]
    tensors: tuple[TensorDifference, ...]
    compared: int
    identical_bytes: int
    decoded: int = 0

    @property
    def dimensions(self) -> dict[str, tuple[Any, Any]]:
        """Differing keys that make the two models incomparable."""
        return {key: pair for key, pair in self.config.items() if key in _DIMENSIONS}

    @property
    def active_config(self) -> dict[str, tuple[Any, Any]]:
        """Differing keys that change a number of a forward pass."""
        return {key: pair for key, pair in self.config.items() if key not in _INERT_KEYS}

    @property
    def identical(self) -> bool:
        """Byte-identical blocks and equal configs."""
        return not self.config and not self.tensors

    @property
    def differing(self) -> tuple[TensorDifference, ...]:
        """The tensors whose values differ, the largest distance first; those without one before all."""
        found = [t for t in self.tensors if not t.same_values]
        return tuple(sorted(found, key=lambda t: -(float("inf") if t.rel_l2 is None else t.rel_l2)))

    def same_bytes(self, name: str) -> bool:
        """Whether both files hold this tensor in the same bytes."""
        return self.tensor(name) is None

    def sentence(self) -> str:
        """What the files comparison came to, in one sentence."""
        if self.identical:
            return f"The two files hold byte-identical blocks in all {self.compared} tensors, and equal configs."
        parts = [f"{self.identical_bytes} of {self.compared} tensors hold identical bytes"]
        same = sum(t.same_values for t in self.tensors)
        other = len(self.tensors) - same
        if same:
            parts.append(f"{same} hold equal values in another block type")
        if other:
            parts.append(f"{other} differ in value")
        parts.append(f"configs differ in {', '.join(self.config)}" if self.config else "configs are equal")
        return "; ".join(parts) + "."

    def tensor(self, name: str) -> TensorDifference | None:
        """The difference of one tensor, or None."""
        return next((t for t in self.tensors if t.name == name), None)

    def findings(self) -> tuple[Finding, ...]:
        """The differences as findings: errors where a value differs, info where only the encoding does."""
        found = [
            Finding(
                "config-differs",
                "info" if key in _INERT_KEYS else "error",
                f"{key} is {ours!r} in the model and {theirs!r} in the reference",
            )
            for key, (ours, theirs) in self.config.items()
        ]
        same = [t for t in self.tensors if t.same_values]
        if same:
            kinds = sorted({f"{a} for {b}" for t in same for a, b in [t.block_types]})
            found.append(
                Finding(
                    "block-types-differ",
                    "info",
                    f"{len(same)} tensors hold equal values in another block type ({', '.join(kinds)})",
                    tensor=same[0].name if len(same) == 1 else None,
                )
            )
        found += [
            Finding("tensor-differs", "error", t.explanation, tensor=t.name) for t in self.tensors if not t.same_values
        ]
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Cause:
    """One accident, and all tensors that it explains.

    Attributes:
        id: the hypothesis; empty for what nothing explains.
        sentence: in words, of the first tensor.
        tensors: their names, in the order of the files.
        residual: the largest that it leaves.
        basis: what that was measured on.
        next_step: what to do about it.
        confidence: how sure it is for the tensor of which it is least sure.
    """

    id: str
    sentence: str
    tensors: tuple[str, ...]
    residual: float | None
    basis: str
    next_step: str
    confidence: Confidence


def causes(tensors: Iterable[TensorDifference]) -> tuple[Cause, ...]:
    """The tensors whose values differ, grouped by what explains them: most tensors first, the unexplained last."""
    groups: dict[str, list[TensorDifference]] = {}
    for tensor in tensors:
        if not tensor.same_values:
            groups.setdefault(tensor.explanation_id, []).append(tensor)
    found = [
        Cause(
            name,
            group[0].explanation,
            tuple(t.name for t in group),
            max((t.residual for t in group if t.residual is not None), default=None),
            group[0].basis,
            group[0].next_step,
            max((t.confidence for t in group), key=lambda one: list(Level).index(one.level)),
        )
        for name, group in groups.items()
    ]
    return tuple(sorted(found, key=lambda cause: (not cause.id, -len(cause.tensors))))


@dataclass(frozen=True)
class FileInfo:
    """One file: what it is, and what it holds of each block type.

    Attributes:
        block_types: tensors and bytes by block type, the largest first.
        values: how many values all tensors hold.
    """

    path: str
    sha256: str
    format: str
    tensors: int
    values: int
    block_types: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> FileInfo:
        """The file's inventory; its digest is taken now."""
        held: dict[str, tuple[int, int]] = {}
        for tensor in checkpoint.tensors.values():
            count, size = held.get(tensor.block_type, (0, 0))
            held[tensor.block_type] = count + 1, size + tensor.nbytes
        return cls(
            str(checkpoint.path),
            checkpoint.sha256(),
            checkpoint.format,
            len(checkpoint.tensors),
            sum(tensor.size for tensor in checkpoint.tensors.values()),
            dict(sorted(held.items(), key=lambda entry: -entry[1][1])),
        )


@dataclass(frozen=True)
class FilesComparison:
    """The answer of `bisect files`.

    Attributes:
        verdict: agree where all values are equal, whatever holds them; unmeasured between models of other dimensions.
        reason: the verdict in a sentence.
        files: the comparison itself.
        causes: the accidents that explain it, and what nothing explains.
        sides: the two files.
        seconds: time spent on digests and on the comparison.
    """

    verdict: Verdict
    reason: str
    sides: dict[str, FileInfo]
    files: FilesReport
    causes: tuple[Cause, ...]
    findings: tuple[SidedFinding, ...]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.files/1`."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "config": {key: {"model": a, "ref": b} for key, (a, b) in self.files.config.items()},
            "compared": self.files.compared,
            "identical_bytes": self.files.identical_bytes,
            "decoded": self.files.decoded,
            "causes": [asdict(cause) for cause in self.causes],
            "tensors": [
                {
                    **asdict(t),
                    "same_values": t.same_values,
                    "exact": t.exact if t.explanation_id else None,
                    "confidence": None if t.same_values else t.confidence.to_json(),
                }
                for t in self.files.tensors
            ],
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": self.seconds,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each tensor that is not held in the same bytes."""
        return [
            {
                "tensor": t.name,
                "model_type": t.block_types[0],
                "ref_type": t.block_types[1],
                "rel_l2": t.rel_l2,
                "cosine": t.cosine,
                "max_abs": t.max_abs,
                "rows": t.rows,
                "first_row": t.first_row,
                "explanation": t.explanation_id or None,
                "residual": t.residual,
                "basis": t.basis,
                "sentence": t.explanation,
            }
            for t in self.files.tensors
        ]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k tensors that differ most."""
        order = {t.name: index for index, t in enumerate(self.files.differing)}
        return sorted((r for r in self.rows() if r["tensor"] in order), key=lambda r: order[r["tensor"]])[:k]

    def __repr__(self) -> str:
        return f"<FilesComparison: {self.verdict}; {self.reason}>"

    def plot(self) -> Any:
        """A matplotlib figure: which tensors differ, and how far."""
        from aprjax.bisect.files.plot import plot_differences

        return plot_differences(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.files.html import summary_html

        return summary_html(self)
