"""One prompt on both sides: what each is fed, where the ids part and why, and what is wrong with the prompt itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from difflib import SequenceMatcher, get_close_matches

from aprjax.bisect.report import SidedFinding
from aprjax.bisect.tokens.report import FedSide, FirstDifference, Kind, PromptTokens, Token
from aprjax.bisect.tokens.sides import TokenSide
from aprjax.text import is_wrapped, wrap
from aprjax.text.lookalikes import oddities
from aprjax.text.wrapping import nested_turns, user_text

# Ids shown of a difference.
_SHOWN = 4
# Findings of one kind for one prompt; the message of the last says how many more there are.
_MOST = 8
# Longer stretches are paired by position: SequenceMatcher takes time that grows with the product of both.
_MOST_ALIGNED = 1000
# What a special token of the ChatML family looks like in text.
_MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>")


def compare_prompt(
    name: str, text: str | None, times: str, model: FedSide, ref: FedSide
) -> tuple[PromptTokens, FirstDifference | None]:
    """The two sides' tokens side by side, and where they part."""
    first = None
    if "none" not in (model.source, ref.source) and model.ids != ref.ids:
        first = _first_difference(model, ref)
    rows = tuple(_aligned(model, ref))
    return PromptTokens(name, text, times, model, ref, rows, first), first


def _first_difference(model: FedSide, ref: FedSide) -> FirstDifference:
    ours, theirs = model.ids, ref.ids
    shorter = min(len(ours), len(theirs))
    at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    offset = ref.tokens[at].start if at < len(theirs) and ref.text is not None else None
    explanation = _explain(model, ref, at)
    return FirstDifference(at, offset, ours[at : at + _SHOWN], theirs[at : at + _SHOWN], explanation)


def _explain(model: FedSide, ref: FedSide, at: int) -> str:
    ours, theirs = model.ids, ref.ids
    for name, longer, shorter, fed in (("model", ours, theirs, model), ("reference", theirs, ours, ref)):
        if longer[1:] == shorter:
            return f"the {name}'s side begins with one more token: {longer[0]} {fed.tokens[0].text!r}"
    if model.text is None or ref.text is None:
        return "no vocabulary says which texts these are"
    if model.text == ref.text:
        return _same_text(model, ref, at)
    return _other_text(model.text, ref.text)


def _same_text(model: FedSide, ref: FedSide, at: int) -> str:
    for name, whole, pieces in (("model", model, ref), ("reference", ref, model)):
        token = whole.tokens[at] if at < len(whole.tokens) else None
        if token is not None and token.kind in (Kind.CONTROL, Kind.USER_DEFINED):
            parts = [piece for piece in pieces.tokens if token.start <= piece.start < token.end]
            if len(parts) > 1:
                return f"{token.text} is one token to the {name}, and {len(parts)} pieces to the other side"
    if [token.text for token in model.tokens] == [token.text for token in ref.tokens]:
        return "the same pieces of text have other ids"
    return "the same text is cut into other pieces: the merges or the tokens differ"


def _other_text(model: str, ref: str) -> str:
    for name, outer, inner in (("model", model, ref), ("reference", ref, model)):
        if outer == wrap(inner, "once"):
            return f"the {name}'s side is the other one's prompt wrapped once more in a ChatML turn"
        if outer == wrap(inner, "twice"):
            return f"the {name}'s side is the other one's prompt wrapped twice more in a ChatML turn"
    for name, longer, shorter in (("model", model, ref), ("reference", ref, model)):
        if longer.endswith(shorter) and longer.startswith("<|im_start|>system\n"):
            return f"the {name}'s side has a system turn before the other one's prompt"
    if unicodedata.normalize("NFC", model) == unicodedata.normalize("NFC", ref):
        return "the texts are equal but for Unicode's composed forms (NFC)"
    if model.strip() == ref.strip():
        return "the texts are equal but for white space at their ends"
    return "the sides are fed different texts"


def _aligned(model: FedSide, ref: FedSide) -> Iterator[tuple[int | None, int | None]]:
    same_bytes = model.tokens and ref.tokens and model.tokens[-1].end == ref.tokens[-1].end
    if model.text is not None and model.text == ref.text and same_bytes:
        yield from _by_bytes(model.tokens, ref.tokens)
        return
    ours, theirs = model.ids, ref.ids
    shorter = min(len(ours), len(theirs))
    head = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    tail = next((i for i in range(shorter - head) if ours[-1 - i] != theirs[-1 - i]), shorter - head)
    yield from ((i, i) for i in range(head))
    middle = (head, len(ours) - tail, head, len(theirs) - tail)
    if max(middle[1] - head, middle[3] - head) > _MOST_ALIGNED:
        yield from _in_pairs(*middle)
    else:
        cut = SequenceMatcher(None, ours[head : middle[1]], theirs[head : middle[3]], autojunk=False)
        for _, a, b, c, d in cut.get_opcodes():
            yield from _in_pairs(head + a, head + b, head + c, head + d)
    yield from ((len(ours) - tail + i, len(theirs) - tail + i) for i in range(tail))


def _by_bytes(ours: tuple[Token, ...], theirs: tuple[Token, ...]) -> Iterator[tuple[int | None, int | None]]:
    """Pairs within the shortest stretches that begin and end at the same bytes on both sides."""
    i = j = 0
    while i < len(ours) and j < len(theirs):
        a, c = i, j
        i, j = i + 1, j + 1
        while ours[i - 1].end != theirs[j - 1].end:
            if ours[i - 1].end < theirs[j - 1].end:
                i += 1
            else:
                j += 1
        yield from _in_pairs(a, i, c, j)
    # Tokens without bytes (padding) may be left on one side.
    yield from _in_pairs(i, len(ours), j, len(theirs))


def _in_pairs(a: int, b: int, c: int, d: int) -> Iterator[tuple[int | None, int | None]]:
    for i in range(max(b - a, d - c)):
        yield (a + i if a + i < b else None, c + i if c + i < d else None)


def prompt_findings(prompt: PromptTokens, model: TokenSide, ref: TokenSide) -> list[SidedFinding]:
    """What is wrong with a prompt, whatever the two files say of each other."""
    findings = _text_findings(prompt, model, ref)
    for side, fed, other in ((model, prompt.model, ref), (ref, prompt.ref, model)):
        findings += [*_wrapping(prompt, side, fed), *_ids(side, fed), *_markers(side, fed, other)]
    return findings


def _text_findings(prompt: PromptTokens, model: TokenSide, ref: TokenSide) -> list[SidedFinding]:
    text = prompt.text
    if text is None:
        return []
    findings = []
    tokenizers = [side.tokenizer for side in (model, ref) if side.tokenizer is not None]
    special = {t.vocabulary.tokens[index] for t in tokenizers for index in t.special_ids}
    odd = oddities(text, special)
    for oddity in odd[:_MOST]:
        finding_id = f"prompt-{oddity.kind}"
        findings.append(SidedFinding(finding_id, "warning", oddity.sentence(), offset=oddity.offset, side="both"))
    if len(odd) > _MOST:
        message = f"{len(odd) - _MOST} more unusual characters in the prompt"
        findings.append(SidedFinding("prompt-unusual", "warning", message, side="both"))
    if is_wrapped(text) and prompt.wrap == "none":
        message = (
            "the prompt is ChatML already and is fed as it is; upstream's `apr run --prompt` would wrap it once more"
        )
        findings.append(SidedFinding("prompt-wrapped", "info", message, reference="#3672, #3743", side="both"))
    return findings


def _wrapping(prompt: PromptTokens, side: TokenSide, fed: FedSide) -> list[SidedFinding]:
    inner = () if fed.text is None else nested_turns(fed.text)
    if not inner:
        return []
    # Asked for with --wrap twice, it is a study and no mistake.
    asked = prompt.wrap == "twice" and prompt.text is not None and not is_wrapped(prompt.text)
    how = "was wrapped twice, as asked" if asked else "is wrapped twice"
    message = (
        f"the prompt {how}: a turn begins inside an open turn at byte {inner[0]} of {shortened(fed.text or '', 48)!r}; "
        f"the prompt itself is {shortened(user_text(fed.text or ''), 32)!r}"
    )
    severity = "warning" if asked else "error"
    reference = "#3672, #3743, #3848, #1658, #638"
    return [SidedFinding("prompt-wrapped-twice", severity, message, reference=reference, side=side.name)]


def _ids(side: TokenSide, fed: FedSide) -> list[SidedFinding]:
    findings = []
    wrong = [(at, t) for at, t in enumerate(fed.tokens) if t.kind in (Kind.PADDING, Kind.OUTSIDE)]
    for at, token in wrong[:_MOST]:
        what = "beyond the vocabulary" if token.kind is Kind.OUTSIDE else f"padding ({token.text})"
        message = f"position {at} has the id {token.id}, which is {what}: no text has it"
        findings.append(SidedFinding("padding-id-fed", "error", message, reference="P0-G", side=side.name))
    if side.tokenizer is None:
        return findings
    vocabulary = side.tokenizer.vocabulary
    bos = vocabulary.bos_token_id
    begins = bos is not None and fed.ids[:1] == (bos,)
    # llama.cpp and realizar put it first where the file says so, whatever the text begins with.
    adds = bool(vocabulary.add_bos) and fed.source == "tokenizer"
    if bos is not None and (fed.ids[:2] == (bos, bos) or (begins and adds)):
        how = "add_bos puts one before the one in the text" if adds else "the ids begin with two"
        message = f"two BOS tokens ({bos}, {vocabulary.tokens[bos]!r}): {how}"
        findings.append(SidedFinding("double-bos", "error", message, side=side.name))
    return findings


def _markers(side: TokenSide, fed: FedSide, other: TokenSide) -> list[SidedFinding]:
    """Texts of the shape `<|…|>` that are not one special token."""
    if side.tokenizer is None or fed.text is None:
        return []
    whole = {token.start: token for token in fed.tokens if token.kind in (Kind.CONTROL, Kind.USER_DEFINED)}
    findings: dict[str, SidedFinding] = {}
    for match in _MARKER.finditer(fed.text):
        start = len(fed.text[: match.start()].encode("utf-8", "surrogatepass"))
        text = match[0]
        if text in findings or (start in whole and whole[start].text == text):
            continue
        findings[text] = _marker(text, start, fed.tokens, side, other)
        if len(findings) == _MOST:
            break
    return list(findings.values())


def _marker(text: str, start: int, tokens: tuple[Token, ...], side: TokenSide, other: TokenSide) -> SidedFinding:
    assert side.tokenizer is not None
    end = start + len(text.encode())
    pieces = [str(token.id) for token in tokens if start <= token.start < end]
    what = f"{text} at byte {start} is fed as {len(pieces)} ordinary tokens ({', '.join(pieces)})"
    vocabulary = side.tokenizer.vocabulary.tokens
    if text in vocabulary:
        index = vocabulary.index(text)
        kind = "special" if index in side.tokenizer.special_ids else "typed as an ordinary token"
        message = f"{what}, though the vocabulary has it at {index}, {kind}"
        return SidedFinding("special-token-as-text", "error", message, reference="GH-189, GH-320", side=side.name)
    if other.tokenizer is not None and text in other.tokenizer.vocabulary.tokens:
        message = f"{what}: this vocabulary lacks it, the other side's has it"
        return SidedFinding("special-token-missing", "error", message, reference="GH-189", side=side.name)
    special = [vocabulary[index] for index in side.tokenizer.special_ids]
    near = get_close_matches(text, special, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    message = f"{what}: no vocabulary here has such a special token{hint}"
    return SidedFinding("special-token-unknown", "warning", message, side=side.name)


def shortened(text: str, length: int) -> str:
    """The text, or its beginning with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"
