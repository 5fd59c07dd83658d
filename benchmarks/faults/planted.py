"""What a planter is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the command line asked for; `layer`, `tensor` and `token` may be None for the fault's default."""

    layer: int | None = None
    tensor: str | None = None
    token: str | None = None


@dataclass(frozen=True)
class Planted:
    """What was changed, and where it must show: a site, a reader's finding, or a cause of `bisect tokens`."""

    detail: str
    tensors: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    layer: int | None = None
    stage: str | None = None
    finding: str | None = None
    cause: str | None = None

    def expected(self) -> dict[str, Any]:
        """The site, the finding or the cause, as printed."""
        if self.cause:
            return {"cause": self.cause}
        return {"finding": self.finding} if self.finding else {"layer": self.layer, "stage": self.stage}
