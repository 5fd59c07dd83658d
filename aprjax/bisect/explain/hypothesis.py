"""The words of the search: what a hypothesis is, what it proposes, and what the scoring says of a proposal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from aprjax.bisect.explain.variant import Variant
from aprjax.qwen2.stages import Stage

if TYPE_CHECKING:
    from aprjax.bisect.explain.evidence import Evidence
    from aprjax.bisect.explain.fit import FitSpec

# A layer (-1 outside the layers) and a stage.
Node = tuple[int, Stage]
# What a fault does to the computation of a node.
Change = Callable[[Variant], Variant]
Kind = Literal["config", "computation", "weights"]


@dataclass(frozen=True)
class Parameter:
    """A number of a hypothesis.

    Attributes:
        value: what was found.
        error: how far off it may be: as far as what the fit leaves, and float32, could push it (`fit.Fit`, `unseen`);
            None where it was not fitted.
        file: what the file has in its place; None where it has no such thing.
    """

    value: float
    error: float | None = None
    file: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """A dict of plain JSON values."""
        return {"value": self.value, "error": self.error, "file": self.file}


@dataclass(frozen=True)
class Candidate:
    """One proposal: a changed computation. The search scores it; a hypothesis only proposes.

    Attributes:
        sentence: what happened, in words, without a full stop ("rope_theta = 10,000 ± 3 instead of 1,000,000").
        change: from a node's computation so far (other faults may have been accepted) to the changed one.
        parameters: of the hypothesis: `Parameter`s, or plain JSON values.
        scope: the nodes whose own computation it changes; None: all nodes of the hypothesis's stages.
        next_step: what to do about it; empty: the hypothesis's.
        spec: the fitted parameter, if there is one, so that it can be fitted again on all nodes it explains.
        value: its value.
        rebuild: the proposal with another value and its error.
        idle: the value is the right one, as far as the fit can tell: no fault, whatever it leaves.
    """

    sentence: str
    change: Change
    parameters: dict[str, Any] = field(default_factory=dict)
    scope: frozenset[Node] | None = None
    next_step: str = ""
    spec: FitSpec | None = None
    value: float | None = None
    rebuild: Callable[[float, float | None], Candidate] | None = None
    idle: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """One kind of fault.

    Attributes:
        id: a stable slug.
        kind: what is wrong: a config key, the engine's computation, or the weights that it read.
        stages: those whose own computation it changes.
        test: yields proposals for one unexplained node, the likeliest first. That node is computed, perhaps through
            stages that the trace lacks, by at least one of `stages`; `evidence` has its value, its inputs and what
            the file gives. It must yield nothing, and raise nothing, where it does not apply.
        next_step: what to do where it holds wherever it could show.
        local_step: what to do where it holds at some nodes only: then it is no config key, but a kernel.
        generalises: hypotheses of which it is the general case, so that it is no rival of theirs.
        cheap: whether a proposal costs no more than the node: dear ones (searches through weights) come last.
    """

    id: str
    kind: Kind
    stages: frozenset[Stage]
    test: Callable[[Evidence, Node], Iterator[Candidate]]
    next_step: str
    local_step: str = ""
    generalises: tuple[str, ...] = ()
    cheap: bool = True


@dataclass(frozen=True)
class Scored:
    """A proposal, and what it does to the unexplained nodes.

    Attributes:
        hypothesis: whose it is.
        candidate: the proposal.
        residual: at the node that was looked at: largest relative L2 of any position, with the proposal.
        before: the same without it.
        tolerance: what rounding explains there.
        explained: unexplained nodes that it explains.
        broken: explained nodes that it leaves unexplained.
    """

    hypothesis: Hypothesis
    candidate: Candidate
    residual: float
    before: float
    tolerance: float
    explained: tuple[Node, ...] = ()
    broken: tuple[Node, ...] = ()

    @property
    def explains(self) -> bool:
        """Whether what it leaves is within rounding."""
        return self.residual <= self.tolerance and not self.candidate.idle
