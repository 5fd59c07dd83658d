"""The page: headline, sides and provenance, a section for each report, findings, and where the numbers lie."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from markupsafe import Markup

from aprjax import __version__
from aprjax.bisect.page import causes, judged, margins_view, measured, parts, words
from aprjax.bisect.page.documents import VERSIONS, Document
from aprjax.bisect.page.formats import number, seconds
from aprjax.bisect.page.headline import Headline, deciding, headline
from aprjax.bisect.page.parts import FOLDER, Block, Row, columns, environment, table
from aprjax.checkpoint.types import CheckpointError

# Characters of a prompt that stand before the whole text is unfolded: two lines.
_EXCERPT = 180
_SEVERITIES = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Part:
    """A report's part: one prompt of it.

    Attributes:
        title: which prompt; "" where there is but one.
        verdict, where, reason: of this prompt.
        blocks: what is shown.
        open: whether it is unfolded at first.
    """

    title: str
    verdict: str
    where: str
    reason: str
    blocks: list[Block]
    open: bool


@dataclass(frozen=True)
class Section:
    """A report on the page."""

    key: str
    headline: Headline
    overview: Markup
    parts: list[Part]
    source: str


def render_page(documents: Sequence[Document], *, links: Mapping[str, str] | None = None) -> str:
    """A whole HTML document.

    Args:
        documents: one report at least.
        links: relative addresses of files beside the page, by the words that name them.

    Raises:
        ValueError: no report.
    """
    if not documents:
        raise ValueError("a page needs at least one report")
    ordered = sorted(documents, key=lambda document: list(VERSIONS).index(document.command))
    texts = token_texts(ordered)
    sections = [_section(document, index, texts) for index, document in enumerate(ordered)]
    top = deciding([section.headline for section in sections])
    styles, script = (_asset(name) for name in ("page.css", "page.js"))
    return (
        environment()
        .get_template("page.html")
        .render(
            title=_title(ordered, top),
            top=top,
            sections=sections,
            sides=_sides(ordered),
            prompts=_prompts(ordered),
            findings=_findings(ordered),
            made=_made(ordered),
            links=links or {},
            styles=Markup(styles),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
        )
    )


def fragment(document: Document) -> str:
    """Verdict, cause and tables, without style sheet and script: for notebooks."""
    section = _section(document, 0, token_texts([document]))
    return environment().get_template("fragment.html").render(section=section)


def checked(document: Document) -> Document:
    """The document, if all of its sections can be made.

    Raises:
        CheckpointError: a field is missing, or of another kind than the schema says.
    """
    try:
        texts = token_texts([document])
        section = _section(document, 0, texts)
        _title([document], section.headline)
        for make in (_sides, _prompts, _findings, _made):
            make([document])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"no complete aprjax.{document.command}/{VERSIONS[document.command]} report: {what}",
            file=document.source or None,
            fix="run the command again with --json",
        ) from error
    return document


@cache
def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def token_texts(documents: Iterable[Document]) -> dict[int, str]:
    """The texts of token ids, from whichever reports have them."""
    found: dict[int, str] = {}
    for document in documents:
        for part in document.parts:
            found |= {int(token): str(text) for token, text in (part.get("token_texts") or {}).items()}
            if document.command == "margins":
                found |= {row["token"]: row["text"] for row in part["tokens"]}
            if document.command == "tokens":
                for prompt in part["prompts"]:
                    found |= {
                        t["id"]: t["text"] for side in ("model", "ref") for t in prompt[side]["tokens"] if t["text"]
                    }
    return found


_BLOCKS: dict[str, Callable[..., list[Block]]] = {
    "files": causes.files_blocks,
    "locate": causes.locate_blocks,
    "attribute": causes.attribute_blocks,
    "explain": judged.explain_blocks,
    "check": judged.check_blocks,
    "tokens": words.tokens_blocks,
    "margins": margins_view.margins_blocks,
    "generate": words.generate_blocks,
    "chatml": words.chatml_blocks,
    "noise": measured.noise_blocks,
}


def _section(document: Document, index: int, texts: Mapping[int, str]) -> Section:
    found = document.parts
    several = len(found) > 1
    said = [headline(Document(document.command, part)) for part in found]
    # The prompt that decides is open, the others are folded.
    decides = next((n for n, one in enumerate(said) if one.verdict == document.verdict), 0)
    made = []
    for order, (part, one) in enumerate(zip(found, said, strict=True)):
        key = f"{index}-{order}"
        make = {
            "layers": partial(measured.layers_blocks, part, key, texts),
            "replay": partial(measured.replay_blocks, part, key),
        }.get(document.command) or partial(_BLOCKS[document.command], part)
        name = _prompt_name(part) if several else ""
        made.append(Part(name, one.verdict, one.where, one.cause, make(), order == decides))
    overview = _overview(document) if several else Markup("")
    return Section(f"{document.command}-{index}", headline(document), overview, made, document.source)


def _prompt_name(part: Mapping[str, Any]) -> str:
    prompt = part.get("prompt") or part.get("fed") or {}
    return str(prompt.get("name") or "prompt")


def _overview(document: Document) -> Markup:
    """A row for each prompt."""
    rows = []
    for part in document.parts:
        said = headline(Document(document.command, part))
        margins = part.get("margins") or part.get("tokens") or []
        flips = sum(bool(row.get("flip")) for row in margins)
        count = len((part.get("prompt") or {}).get("tokens") or []) or len(part.get("tokens") or [])
        largest = max((row["kl"] for row in margins if row.get("kl") is not None), default=None)
        cells = [_prompt_name(part), count, said.verdict, said.where, flips if margins else "", number(largest, 3)]
        rows.append(Row(cells, "bad" if said.tone == "bad" else ""))
    return table(columns("prompt", "#tokens", "?verdict", "where", "#flips", "#largest KL"), rows, label="Prompts")


def _title(documents: Sequence[Document], top: Headline) -> str:
    where = f" at {top.where}" if top.where and top.tone == "bad" and top.command != "files" else ""
    names = ", ".join(dict.fromkeys(document.command for document in documents))
    return f"aprjax {names}: {top.verdict}{where}"


def _sides(documents: Sequence[Document]) -> Markup:
    """Every file that was looked at, once, with the reports that did."""
    used: dict[tuple[str, ...], list[str]] = {}
    for document in documents:
        value = document.value
        held = dict(value.get("sides") or {})
        held |= {name: value[name] for name in ("trace", "file") if isinstance(value.get(name), Mapping)}
        for name, side in held.items():
            if not side:
                continue
            run_by = side.get("arithmetic") or (value.get("arithmetic") if name == "file" else None)
            known = (side.get("path"), side.get("format"), run_by, side.get("sha256"))
            used.setdefault((name, *(str(word or "") for word in known)), []).append(document.command)
    found = []
    for key, commands in used.items():
        # A report that leaves the arithmetic or the digest out says nothing against one that has them.
        if any(other != key and all(a in ("", b) for a, b in zip(key, other, strict=True)) for other in used):
            continue
        card = dict(zip(("role", "path", "format", "arithmetic", "sha256"), key, strict=True))
        found.append({**card, "used": _used(commands, documents)})
    return parts.sides(found)


def _used(commands: Iterable[str], documents: Sequence[Document]) -> str:
    """Which reports; "" where there is but one."""
    return ", ".join(dict.fromkeys(commands)) if len(documents) > 1 else ""


def _prompts(documents: Sequence[Document]) -> Markup:
    """What was fed, once."""
    used: dict[tuple[str, str, str, int], list[str]] = {}
    for document in documents:
        for part in document.parts:
            prompt = part.get("prompt") or part.get("fed")
            if not isinstance(prompt, Mapping):
                continue
            fed = prompt.get("tokens") or [*(prompt.get("prompt") or []), *(prompt.get("continuation") or [])]
            key = (str(prompt.get("name", "")), str(prompt.get("text") or ""), str(prompt.get("wrap", "")), len(fed))
            used.setdefault(key, []).append(document.command)
    found = [
        {
            "name": name,
            "text": text,
            "excerpt": _excerpt(text),
            "wrap": wrap,
            "count": count,
            "used": _used(c, documents),
        }
        for (name, text, wrap, count), c in used.items()
    ]
    return parts.prompts(found) if found else Markup("")


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT and text.count("\n") < 4 else " ".join(text.split())[:_EXCERPT] + " …"


def _findings(documents: Sequence[Document]) -> Markup:
    """Every finding once, errors first."""
    found: dict[tuple[str, ...], None] = {}
    for document in documents:
        for part in document.parts:
            for f in part.get("findings") or []:
                keys = ("severity", "id", "side", "tensor", "message", "reference")
                found[tuple(str(f.get(key) or "") for key in keys)] = None
    ordered = sorted(found, key=lambda row: _SEVERITIES.get(row[0], 3))
    tones = {"error": "bad", "warning": "near"}
    rows = [Row(row, tones.get(row[0], "")) for row in ordered]
    return table(columns("severity", "'id", "side", "'tensor", "message", "upstream’s ids"), rows, label="Findings")


def _made(documents: Sequence[Document]) -> Markup:
    """Which program, platform and command made each report, as far as it says."""
    found = []
    for document in documents:
        value = document.value
        made, took = value.get("made") or {}, value.get("seconds")
        versions = ", ".join(f"{key} {made[key]}" for key in ("aprjax", "python", "jax", "numpy") if made.get(key))
        total = sum(took.values()) if isinstance(took, Mapping) else took
        lines = [
            ("schema", str(value["schema"])),
            ("command", str(made.get("command") or value.get("command") or "")),
            ("versions", versions),
            ("platform", str(made.get("platform") or value.get("backend") or "")),
            *_engines(value),
            ("when", str(made.get("date") or value.get("started") or "")),
            ("took", "" if total is None else seconds(total)),
        ]
        kept = [(name, text) for name, text in lines if text]
        if not versions:
            kept.append(("not recorded", "the versions that computed it: made without --report"))
        found.append({"command": document.command, "lines": kept})
    return parts.provenance(found)


def _engines(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Version, features and options of what ran outside aprjax, by side."""
    engines = dict(value.get("engines") or {})
    trace = value.get("trace")
    if isinstance(trace, Mapping) and trace.get("engine"):
        engines["trace"] = trace["engine"]
    return [
        (f"engine of {side}", ", ".join(f"{key} {what}" for key, what in told.items()))
        for side, told in engines.items()
        if isinstance(told, Mapping)
    ]


__all__ = ["Part", "Section", "checked", "fragment", "render_page", "token_texts"]
