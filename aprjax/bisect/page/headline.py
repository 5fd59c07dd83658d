"""What stands at the top of the page: verdict, place, cause, how sure it is, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aprjax.bisect.page.documents import Document
from aprjax.bisect.page.formats import file_name, place, sign, tone

# Whose words stand at the top when several reports are on one page: what proves a cause before what shows
# a symptom. The worst verdict goes before any order.
_TELLING = (
    "locate",
    "explain",
    "layers",
    "files",
    "tokens",
    "chatml",
    "check",
    "generate",
    "margins",
    "replay",
    "attribute",
    "noise",
)
_WORST = ("bad", "none", "near", "good", "plain")
QUESTIONS = {
    "check": "Which contracts hold?",
    "files": "Do the two files hold the same model?",
    "tokens": "Are both fed the same?",
    "layers": "Where do the two sides part?",
    "locate": "Which places cause the drift?",
    "attribute": "Which stages' errors make up the change?",
    "explain": "What explains the trace?",
    "margins": "How safe is each choice of the next token?",
    "generate": "Do the two sides say the same?",
    "chatml": "Why does ChatML go bad?",
    "replay": "Which nodes of the trace does the file explain?",
    "noise": "How far is the file from itself?",
}


@dataclass(frozen=True)
class Headline:
    """One report in a few words.

    Attributes:
        command: which command's.
        verdict, tone, sign: in a word, as a class and as a character.
        where: the place found; "" where there is none.
        cause: in a sentence or two.
        level, basis: how sure the cause is and what that rests on; "" where the report does not say.
        next_step: what to do; "" where there is nothing.
    """

    command: str
    verdict: str
    where: str = ""
    cause: str = ""
    level: str = ""
    basis: str = ""
    next_step: str = ""

    @property
    def question(self) -> str:
        """What the command answers."""
        return QUESTIONS[self.command]

    @property
    def tone(self) -> str:
        """Of the verdict."""
        return tone(self.verdict)

    @property
    def sign(self) -> str:
        """Of the verdict."""
        return sign(self.verdict)


def headline(document: Document) -> Headline:
    """The headline of one report."""
    value = document.value
    plain = Headline(document.command, document.verdict, cause=str(value.get("reason") or ""))
    if value.get("next_step"):
        plain = replace(plain, next_step=str(value["next_step"]))
    special = {
        "layers": _layers,
        "files": _files,
        "locate": _locate,
        "generate": _generate,
        "chatml": _chatml,
        "replay": _replay,
        "attribute": _attribute,
        "noise": _noise,
        "explain": _explain,
        "check": _check,
    }.get(document.command)
    return _confident(plain, value) if special is None else special(plain, value)


def deciding(headlines: Sequence[Headline]) -> Headline:
    """The one that stands at the top."""
    return min(headlines, key=lambda found: (_WORST.index(found.tone), _TELLING.index(found.command)))


def _confident(found: Headline, holder: Mapping[str, Any]) -> Headline:
    """With the holder's confidence, if it has one."""
    confidence = holder.get("confidence")
    if not isinstance(confidence, Mapping):
        return found
    return replace(found, level=str(confidence.get("level") or ""), basis=str(confidence.get("basis") or ""))


def _layers(plain: Headline, value: Mapping[str, Any]) -> Headline:
    first = value.get("first_divergence")
    if not first:
        return plain
    where = place(first["layer"], first["stage"])
    found = replace(plain, where=where, cause=str(first["cause"]), next_step=str(first.get("next_step") or ""))
    return _confident(found, first)


def _files(plain: Headline, value: Mapping[str, Any]) -> Headline:
    causes = value.get("causes") or []
    if not causes:
        return plain
    first = causes[0]
    tensors = first["tensors"]
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return _confident(
        replace(plain, where=f"{tensors[0]}{more}", cause=str(first["sentence"]), next_step=str(first["next_step"])),
        first,
    )


def _locate(plain: Headline, value: Mapping[str, Any]) -> Headline:
    faults = value.get("faults") or []
    if not faults:
        return plain
    where = "; ".join(place(fault["layer"], fault["stage"]) for fault in faults)
    causes = "; ".join(dict.fromkeys(str(fault["cause"]) for fault in faults))
    return _confident(
        replace(plain, where=where, cause=causes, next_step=str(faults[0].get("next_step") or "")), faults[0]
    )


def _generate(plain: Headline, value: Mapping[str, Any]) -> Headline:
    first = value.get("first_difference")
    return plain if not first else replace(plain, where=f"new token {first['step'] + 1}")


def _chatml(plain: Headline, value: Mapping[str, Any]) -> Headline:
    causes = value["causes"]
    return replace(plain, where=", ".join(causes.get("blamed") or []), cause=str(causes.get("reason") or ""))


def _replay(plain: Headline, value: Mapping[str, Any]) -> Headline:
    unexplained = value.get("unexplained") or []
    if not unexplained:
        return plain
    first = unexplained[0]
    return _confident(replace(plain, where=place(first["layer"], first["stage"])), value)


def _attribute(plain: Headline, value: Mapping[str, Any]) -> Headline:
    contributions, causes = value.get("contributions") or [], value.get("causes") or []
    if not contributions:
        return plain
    if causes and plain.tone != "none":
        first = causes[0]
        cause = f"{plain.cause}; most of it: {first['sentence']}"
        return _confident(replace(plain, cause=cause, next_step=str(first.get("next_step") or "")), first)
    return replace(plain, where=f"most of it: {place(contributions[0]['layer'], contributions[0]['stage'])}")


def _noise(plain: Headline, value: Mapping[str, Any]) -> Headline:
    count = len(value["changes"])
    name = file_name(value["file"]["path"])
    return replace(plain, cause=f"{count} changes that every engine is free to make, of {name}")


def _explain(plain: Headline, value: Mapping[str, Any]) -> Headline:
    found = (value.get("identity") or []) + (value.get("explanations") or [])
    if not found:
        return plain
    # The reason quotes one of them; what to do, and how sure that is, are said of the same one.
    quoted = next((one for one in found if one["sentence"] in plain.cause), found[0])
    return _confident(replace(plain, next_step=str(quoted.get("next_step") or "")), quoted)


def _check(plain: Headline, value: Mapping[str, Any]) -> Headline:
    counts = f"{value['passed']} passed, {value['failed']} failed, {value['unmeasured']} unmeasured"
    failed = next((o for o in value["outcomes"] if o["status"] == "fail"), None)
    if failed is None:
        return replace(plain, cause=f"{counts}; what is unmeasured has not passed")
    return replace(plain, where=failed["test_id"], cause=f"{counts}; {failed['reason']}")
