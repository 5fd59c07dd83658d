"""Do two vocabularies number the same tokens alike, and end text at the same ones?"""

from __future__ import annotations

from aprjax.bisect.report import SidedFinding
from aprjax.bisect.tokens.report import VocabularyDifference
from aprjax.bisect.tokens.sides import TokenSide
from aprjax.checkpoint.types import Severity, Vocabulary
from aprjax.text import Tokenizer

# Where every Qwen2 and Qwen2.5 vocabulary has them (Hugging Face's tokenizer_config.json; apr-format.md 6.7).
KNOWN_IDS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
# The ids at which Qwen2.5's generation_config.json ends an answer, by their texts.
ENDS = ("<|im_end|>", "<|endoftext|>")
# Listed; the counts are of all.
_EXAMPLES = 8


def vocabulary_findings(model: TokenSide, ref: TokenSide) -> tuple[VocabularyDifference | None, list[SidedFinding]]:
    """The difference of two vocabularies (None where a side has none), and the findings on each and on both."""
    findings = [finding for side in (model, ref) for finding in _own_findings(side)]
    if model.tokenizer is None or ref.tokenizer is None:
        return None, findings
    ours, theirs = model.tokenizer, ref.tokenizer
    difference = _difference(ours, theirs, model.padding & ref.padding)
    return difference, findings + _between(ours, theirs, difference)


def _own_findings(side: TokenSide) -> list[SidedFinding]:
    if side.tokenizer is None:
        return []
    tokenizer, name = side.tokenizer, side.name
    vocabulary, ids = tokenizer.vocabulary, token_ids(tokenizer)
    findings = [SidedFinding(f.id, f.severity, f.message, reference=f.reference, side=name) for f in tokenizer.findings]
    # Small vocabularies (of tests) have no such convention.
    if len(tokenizer) > max(KNOWN_IDS.values()):
        for text, expected in KNOWN_IDS.items():
            index = ids.get(text)
            if index is None:
                message = f"{text} is not in the vocabulary; every Qwen2 vocabulary has it at {expected}"
                findings.append(SidedFinding("special-token-absent", "error", message, reference="GH-189", side=name))
            elif index != expected:
                message = f"{text} has the id {index}, every Qwen2 vocabulary has it at {expected}"
                findings.append(SidedFinding("special-id-wrong", "error", message, reference="GH-189", side=name))
    eos = side.declared_eos
    if eos is None:
        message = (
            f"the file declares no EOS token: an engine that goes by it does not stop (aprjax and llama.cpp know "
            f"{', '.join(text for text in ENDS if text in ids) or 'none'} by text)"
        )
        findings.append(SidedFinding("eos-missing", "error", message, reference="#1864", side=name))
    elif any(text in ids for text in ENDS) and vocabulary.tokens[eos] not in ENDS:
        message = f"the declared EOS token {eos} is {vocabulary.tokens[eos]!r}, expected {' or '.join(ENDS)}"
        findings.append(SidedFinding("eos-id-wrong", "error", message, side=name))
    if vocabulary.add_bos is None and side.checkpoint is not None and side.checkpoint.format == "gguf":
        message = "tokenizer.ggml.add_bos_token is not there: realizar then puts a BOS token first (apr-format.md 6.6)"
        findings.append(SidedFinding("add-bos-missing", "warning", message, side=name))
    if side.padding:
        first = min(side.padding)
        message = f"{len(side.padding)} of {len(tokenizer)} entries are padding, from {first}: no text has these ids"
        findings.append(SidedFinding("vocabulary-padding", "info", message, side=name))
    config = None if side.checkpoint is None else side.checkpoint.config
    if config is not None and len(tokenizer) > config.vocab_size:
        message = f"the vocabulary has {len(tokenizer)} tokens, the model {config.vocab_size} rows for them"
        findings.append(SidedFinding("vocabulary-too-large", "error", message, reference="P0-G", side=name))
    return findings


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of every special token's text; the first, where a text comes twice."""
    tokens = tokenizer.vocabulary.tokens
    found: dict[str, int] = {}
    wanted = {tokens[index] for index in tokenizer.special_ids} | set(KNOWN_IDS)
    for index, text in enumerate(tokens):
        if text in wanted:
            found.setdefault(text, index)
    return found


def _difference(ours: Tokenizer, theirs: Tokenizer, padding: frozenset[int]) -> VocabularyDifference:
    a, b = ours.vocabulary, theirs.vocabulary
    length = max(len(a.tokens), len(b.tokens))
    padded = [(*v.tokens, *(None,) * (length - len(v.tokens))) for v in (a, b)]
    differing = [] if a.tokens == b.tokens else [
        (index, mine, other)
        for index, (mine, other) in enumerate(zip(*padded, strict=True))
        if mine != other and index not in padding
    ]  # fmt: skip
    mine, other = _with(a, token_ids(ours), token_ids(theirs)), _with(b, token_ids(theirs), token_ids(ours))
    is_padding = {vocabulary.tokens[i] for vocabulary in (a, b) for i in padding if i < len(vocabulary.tokens)}
    special = tuple(
        (text, mine.get(text), other.get(text))
        for text in sorted(set(mine) | set(other), key=lambda text: (other.get(text, length), text))
        if mine.get(text) != other.get(text) and text not in is_padding
    )
    return VocabularyDifference(len(differing), tuple(differing[:_EXAMPLES]), special, _merges(a, b))


def _with(vocabulary: Vocabulary, own: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    """The ids of the special tokens, and of those that are special on the other side only."""
    absent = set(others) - set(own)
    ordinary = {text: index for index, text in enumerate(vocabulary.tokens) if text in absent} if absent else {}
    return own | ordinary


def _merges(a: Vocabulary, b: Vocabulary) -> int:
    if a.merges == b.merges:
        return 0
    return len(set(a.merges) ^ set(b.merges)) or 1


def _between(ours: Tokenizer, theirs: Tokenizer, difference: VocabularyDifference) -> list[SidedFinding]:
    a, b = ours.vocabulary, theirs.vocabulary
    findings: list[SidedFinding] = []

    def add(finding_id: str, severity: Severity, message: str, reference: str | None = None) -> None:
        findings.append(SidedFinding(finding_id, severity, message, reference=reference, side="both"))

    for text, mine, other in difference.special:
        if mine is None or other is None:
            where = "model" if other is None else "reference"
            add("special-token-absent", "error", f"{text} is a token of the {where} alone", "GH-189")
        else:
            add("special-id-differs", "error", f"{text} is {mine} in the model, {other} in the reference")
    moved = {index for _, *ids in difference.special for index in ids if index is not None}
    ordinary = difference.ids - len(moved)
    if ordinary > 0:
        shown = "; ".join(f"{i}: {m!r} against {r!r}" for i, m, r in difference.examples if i not in moved)
        add("vocabulary-differs", "error", f"{ordinary} ids stand for other tokens ({shown})")
    if difference.merges:
        add("merges-differ", "error", f"{difference.merges} merges differ ({len(a.merges)} against {len(b.merges)})")
    if a.pre_tokenizer != b.pre_tokenizer:
        message = f"pre-tokenizer {a.pre_tokenizer!r} in the model, {b.pre_tokenizer!r} in the reference"
        add("pre-tokenizer-differs", "info", message + "; both split text alike here", "GH-277")
    if a.eos_token_id != b.eos_token_id:
        severity = "info" if difference.special else "error"
        message = f"EOS {_named(a, a.eos_token_id)} in the model, {_named(b, b.eos_token_id)} in the reference"
        # A missing one has its own finding.
        if a.eos_token_id is not None and b.eos_token_id is not None:
            add("eos-id-differs", severity, message)
    if a.bos_token_id != b.bos_token_id:
        message = f"BOS {_named(a, a.bos_token_id)} in the model, {_named(b, b.bos_token_id)} in the reference"
        # Without add_bos nothing is put first, so that the id has no effect.
        add("bos-id-differs", "error" if a.add_bos or b.add_bos else "warning", message)
    if bool(a.add_bos) != bool(b.add_bos):
        message = f"add_bos is {a.add_bos} in the model, {b.add_bos} in the reference: engines feed one more token"
        add("add-bos-differs", "error", message)
    findings += _stop_findings(ours, theirs, difference)
    apart = {t.vocabulary.tokens[i] for t, o in ((ours, theirs), (theirs, ours)) for i in t.special_ids - o.special_ids}
    if apart and not difference.special:
        shown = ", ".join(map(repr, sorted(apart)[:_EXAMPLES]))
        add("special-tokens-differ", "warning", f"special on one side only: {shown} ({len(apart)} in all)", "GH-320")
    return findings


def _stop_findings(ours: Tokenizer, theirs: Tokenizer, difference: VocabularyDifference) -> list[SidedFinding]:
    if ours.stop_ids == theirs.stop_ids:
        return []
    only = [
        f"only the {name}: {', '.join(_named(own.vocabulary, index) for index in sorted(extra))}"
        for name, own, extra in (
            ("model", ours, ours.stop_ids - theirs.stop_ids),
            ("reference", theirs, theirs.stop_ids - ours.stop_ids),
        )
        if extra
    ]
    # What follows from a special token's other id, or from the declared EOS, is no fault of its own.
    declared = {ours.vocabulary.eos_token_id, theirs.vocabulary.eos_token_id}
    follows = bool(difference.special) or (ours.stop_ids ^ theirs.stop_ids) <= declared
    message = f"generation ends at other ids; {'; '.join(only)}" + (
        " (it follows from the ids above)" if follows else ""
    )
    return [SidedFinding("stop-ids-differ", "info" if follows else "error", message, side="both")]


def _named(vocabulary: Vocabulary, index: int | None) -> str:
    if index is None:
        return "none"
    return f"{index} ({vocabulary.tokens[index]!r})" if 0 <= index < len(vocabulary.tokens) else f"{index} (outside)"
