"""What `chatml` reports: the cells, why the sides part, the claims; as JSON, frame, HTML or the worst few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from aprjax.bisect.chatml.causes import Causes
from aprjax.bisect.chatml.cells import STOPS, Comparison, Condition, Factorial
from aprjax.bisect.chatml.claims import Claim
from aprjax.bisect.chatml.judged import BAD, Cell, CellKey
from aprjax.bisect.chatml.partings import parting
from aprjax.bisect.report import SidedFinding

SCHEMA = "aprjax.chatml/1"
EXIT_CODES = {"alike": 0, "part": 1, "undecidable": 3}


@dataclass(frozen=True)
class ChatmlReport:
    """The settled factorial.

    Attributes:
        factorial: what was measured.
        cells: every cell, judged.
        causes: whether the sides part in the compared cells, and why.
        claims: what the two files say of upstream's claims.
        findings: what was met on the way.
        asked: how each side is said to have run, where that is not alike: factor by factor, (model, ref).
        seconds: what it took.
    """

    factorial: Factorial
    cells: Mapping[CellKey, Cell]
    causes: Causes
    claims: tuple[Claim, ...]
    findings: tuple[SidedFinding, ...] = ()
    asked: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> Literal["alike", "part", "undecidable"]:
        """Whether both sides behave alike in every compared cell."""
        return self.causes.verdict

    @property
    def exit_code(self) -> int:
        """0 alike, 1 they part, 3 not decidable."""
        return EXIT_CODES[self.verdict]

    @property
    def computed(self) -> int:
        """Runs that were computed, and not shared by proof."""
        return sum(not run.shared_with for run in self.factorial.runs.values())

    def sharing(self) -> dict[str, int]:
        """How many runs stand for others, by the proof."""
        proofs = [run.shared_with for run in self.factorial.runs.values() if run.shared_with]
        return {proof: proofs.count(proof) for proof in dict.fromkeys(proofs)}

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.chatml/1`."""
        factorial = self.factorial
        sides = {
            name: {
                **asdict(side),
                "declared_stops": sorted(side.declared_stops),
                "named_stops": sorted(side.named_stops),
            }
            for name, side in factorial.sides.items()
        }
        facts = factorial.facts
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "causes": self.causes.to_json(),
            "claims": [claim.to_json() for claim in self.claims],
            "sides": sides,
            "files": {
                **asdict(facts),
                "special_row_ids": sorted(facts.special_row_ids),
                "ids_differ": sorted(facts.ids_differ),
            },
            "prompts": [prompt.to_json() for prompt in factorial.prompts.values()],
            "factors": {
                "wrap": list(factorial.wraps),
                "stop": list(STOPS),
                "arithmetic": list(factorial.arithmetics),
                "max_new_tokens": factorial.max_new_tokens,
                "asked": {name: list(pair) for name, pair in self.asked.items()},
            },
            "backend": factorial.backend,
            "runs": {"computed": self.computed, "shared": self.sharing()},
            "cells": [cell.to_json() for cell in self.cells.values()],
            "first_logits": [asdict(pair) for pair in factorial.first_logits],
            "noise": [{"model": a, "ref": b, "sigma": sigma} for (a, b), sigma in factorial.noise.items()],
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": round(self.seconds, 3),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per cell."""
        left_out = ("tokens", "margins", "gate", "repetition")
        return [
            {
                **{k: v for k, v in cell.to_json().items() if k not in left_out},
                "gate_rule": cell.verdict.rule,
                "repetition": cell.repetition.grade,
            }
            for cell in self.cells.values()
        ]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k cells to look at first: bad ones, then those with the smallest margins."""
        return sorted(self.rows(), key=lambda row: (row["state"] not in BAD, row["least_margin"]))[:k]

    def __repr__(self) -> str:
        return f"<ChatmlReport: {self.verdict}; {len(self.cells)} cells>"

    def plot(self) -> Any:
        """A matplotlib figure: every answer of the factorial as a tile."""
        from aprjax.bisect.chatml.plot import plot_cells

        return plot_cells(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.chatml.render_html import summary_html

        return summary_html(self)


def parted_at(factorial: Factorial, left: CellKey, right: CellKey) -> int | None:
    """The token at which two cells of one prompt part; None where they do not."""
    found = parting(factorial, Comparison(left[1], _condition(left), _condition(right)))
    return None if found is None else found.step


def _condition(key: CellKey) -> Condition:
    side, _, wrap, arithmetic, stop = key
    return Condition.as_run(side, wrap, arithmetic, stop)
