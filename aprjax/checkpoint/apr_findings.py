"""Collecting findings while an APR file is read.

Severities: `info`, every real reader gets the same model; `warning`, the model is whole, but a real reader refuses it
or reads something else; `error`, a reader that accepts the file computes wrong numbers, or the model is incomplete.
"""

from __future__ import annotations

from aprjax.checkpoint.types import Finding, Severity


class FindingLog:
    """Findings in the order in which they were met."""

    def __init__(self) -> None:
        self._findings: list[Finding] = []

    def add(
        self,
        id: str,  # noqa: A002 - the field of Finding
        severity: Severity,
        message: str,
        *,
        tensor: str | None = None,
        offset: int | None = None,
        reference: str | None = None,
    ) -> None:
        """Note one deviation; the arguments are `Finding`'s."""
        self._findings.append(Finding(id, severity, message, tensor, offset, reference))

    def all(self) -> tuple[Finding, ...]:
        """What was noted so far."""
        return tuple(self._findings)


def shown(text: str, *, length: int = 80) -> str:
    """Text from a file as a message may hold it: quoted, without control characters, and not long."""
    return repr(text if len(text) <= length else f"{text[:length]}…")


def listing(names: list[str], *, count: int = 3) -> str:
    """The first few names and how many more there are, for messages that concern many tensors or keys."""
    text = ", ".join(shown(name) for name in names[:count])
    return f"{text} and {len(names) - count} more" if len(names) > count else text
