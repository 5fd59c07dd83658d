"""Tokenizers and chat templates: what both sides are fed, byte by byte and id by id."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from aprjax.bisect.report import SidedFinding
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.contracts.check.measurement import Asked, Measurement, measures
from aprjax.text import PROBES, Tokenizer, render_chat, wrap
from aprjax.text.template import TemplateError

# Ids that Hugging Face, APR and GGUF all give "What is 2+2?" (contracts.md 1.3, tokenizer parity).
GATE_TEXT, GATE_IDS = "What is 2+2?", (3838, 374, 220, 17, 10, 17, 30)
# Qwen2's vocabulary without padding begins at this size; a smaller one is another model's, with other ids.
QWEN2_TOKENS = 151_643
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

GOLDEN_SYSTEM = "You are a helpful coding assistant."
GOLDEN_USER = "Write a Python function to compute the nth Fibonacci number."
# The golden conversation of GATE-CHAT-SHIP-008 (contracts.md 1.3), written out.
GOLDEN = (
    f"<|im_start|>system\n{GOLDEN_SYSTEM}<|im_end|>\n<|im_start|>user\n{GOLDEN_USER}<|im_end|>\n<|im_start|>assistant\n"
)
_CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is 2+2?"),),
    (("system", GOLDEN_SYSTEM), ("user", GOLDEN_USER)),
    (("user", "Hello"), ("assistant", "Hi."), ("user", "And in German?")),
    (("system", ""), ("user", " leading space\n\nand a blank line ")),
)
# Texts that have to come back from their ids as they were: scripts, white space, marks, control tokens.
ROUND_TRIP = (
    *(probe.prompt() for probe in PROBES),
    "def f(x):\n\treturn x  # tabs,   runs of spaces\n\n\n",
    "naïve café — “quotes” … ½ ≤ π · e\u0301 (combining)",
    "中文，日本語のテキスト、한국어, العربية, עברית, हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
    "<|im_start|>system\n<|im_end|><|endoftext|>",
    " \r\n\u00a0\u3000 ",
)


def _tokenizer(asked: Asked, side: str) -> Tokenizer:
    return asked.bench.once(("tokenizer", side), lambda: Tokenizer.from_checkpoint(asked.bench.checkpoint(side)))


def _without_tokenizer(asked: Asked, side: str) -> Measurement | None:
    """A side without a usable tokenizer breaks the rule: no text can be fed to it."""
    try:
        _tokenizer(asked, side)
    except CheckpointError as error:
        if asked.bench.side(side).checkpoint is None:
            return Measurement(unmeasured=str(error))
        return Measurement(failed=f"the {_who(side)} has no usable tokenizer: {error.message}")
    return None


def _who(side: str) -> str:
    return "model" if side == "model" else "reference"


def _both(asked: Asked) -> Measurement | None:
    return _without_tokenizer(asked, "model") or _without_tokenizer(asked, "ref")


@measures("APRJAX-TOKENIZER-001")
def gate_tokens(asked: Asked) -> Measurement:
    """The ids of upstream's gate text, on both sides."""
    missing = _both(asked)
    if missing is not None:
        return missing
    sizes = [len(_tokenizer(asked, side)) for side in ("model", "ref")]
    if min(sizes) < QWEN2_TOKENS:
        return Measurement(
            unmeasured=f"the ids are those of Qwen2's vocabulary of {QWEN2_TOKENS} tokens; here are {min(sizes)}"
        )
    found = {side: tuple(_tokenizer(asked, side).encode(GATE_TEXT)) for side in ("model", "ref")}
    wrong = [side for side, ids in found.items() if ids != GATE_IDS]
    shown = f"; the {_who(wrong[0])} gives {list(found[wrong[0]])}" if wrong else ""
    return Measurement({"sides_with_other_ids": len(wrong)}, f"{GATE_TEXT!r}{shown}")


@measures("APRJAX-TOKENIZER-002")
def same_ids(asked: Asked) -> Measurement:
    """Both sides give every text the same ids."""
    missing = _both(asked)
    if missing is not None:
        return missing
    texts = ROUND_TRIP
    differing = [t for t in texts if _tokenizer(asked, "model").encode(t) != _tokenizer(asked, "ref").encode(t)]
    where = f"; first {differing[0][:40]!r}" if differing else ""
    return Measurement({"differing_texts": len(differing), "texts": len(texts)}, f"{len(texts)} texts{where}")


@measures("APRJAX-TOKENIZER-003")
def round_trip(asked: Asked) -> Measurement:
    """Every text comes back from its ids, byte for byte, on both sides."""
    missing = _both(asked)
    if missing is not None:
        return missing
    lossy = [
        (side, text)
        for side in ("model", "ref")
        for text in ROUND_TRIP
        if _tokenizer(asked, side).decode(_tokenizer(asked, side).encode(text)) != text
    ]
    where = f"; first {lossy[0][1][:40]!r} of the {_who(lossy[0][0])}" if lossy else ""
    return Measurement({"lossy_texts": len(lossy), "texts": len(ROUND_TRIP)}, f"{len(ROUND_TRIP)} texts{where}")


@measures("APRJAX-TOKENIZER-004")
def control_tokens(asked: Asked) -> Measurement:
    """Each control token of ChatML is one id, the same on both sides."""
    missing = _both(asked)
    if missing is not None:
        return missing
    broken = []
    for text in CONTROL_TOKENS:
        ids = [_tokenizer(asked, side).encode(text) for side in ("model", "ref")]
        if any(len(one) != 1 for one in ids) or ids[0] != ids[1]:
            broken.append(f"{text} is {ids[0]} and {ids[1]}")
    return Measurement({"broken_control_tokens": len(broken)}, "; ".join(broken) or ", ".join(CONTROL_TOKENS))


def _errors(asked: Asked, wanted: Callable[[str], bool]) -> list[SidedFinding]:
    return [f for f in asked.bench.tokens.findings if f.severity == "error" and wanted(f.id)]


_ABOUT_TEMPLATES = ("template-error", "templates-differ")


def _counted(name: str, found: list[SidedFinding], clean: str) -> Measurement:
    text = "; ".join(f"{finding.side}: {finding.message}" for finding in found[:3])
    return Measurement({name: len(found)}, text or clean)


def _compared(asked: Asked, name: str, wanted: Callable[[str], bool], clean: str) -> Measurement:
    try:
        found = _errors(asked, wanted)
    except CheckpointError as error:
        return Measurement(failed=str(error))
    asked.bench.keep("tokens.json", asked.bench.tokens.to_json())
    return replace(_counted(name, found, clean), artifacts=("tokens.json",))


@measures("APRJAX-TOKENIZER-005")
def special_and_stop_ids(asked: Asked) -> Measurement:
    """No special, stop or beginning-of-text id is missing, wrong or another one on the other side."""
    missing = _both(asked)
    if missing is not None:
        return missing
    clean = "special, stop and beginning-of-text ids agree"
    return _compared(asked, "errors", lambda found: found not in _ABOUT_TEMPLATES, clean)


@measures("NOTE-CHAT-BOS-FALSE-POSITIVE")
def one_beginning(asked: Asked) -> Measurement:
    """No text begins with two beginning-of-text tokens."""
    missing = _both(asked)
    if missing is not None:
        return missing
    return _compared(asked, "doubled_bos", lambda found: found == "double-bos", "no rendered prompt begins with two")


def _no_template(asked: Asked) -> Measurement | None:
    """Two files without a template are two base models: there is nothing to render."""
    if any(asked.bench.checkpoint(side).chat_template for side in ("model", "ref")):
        return None
    return Measurement(unmeasured="neither file holds a chat template (tokenizer.chat_template): both are base models")


def _render(file: Checkpoint, conversation: Iterable[tuple[str, str]], **options: Any) -> str:
    return render_chat(file, [{"role": role, "content": content} for role, content in conversation], **options)


@measures("FALSIFY-CHAT-001")
def same_rendering(asked: Asked) -> Measurement:
    """Both files' own templates give every conversation the same bytes, with and without the assistant's header."""
    missing = _no_template(asked)
    if missing is not None:
        return missing
    differing = 0
    first = ""
    for conversation in _CONVERSATIONS:
        for header in (True, False):
            rendered = []
            for side in ("model", "ref"):
                try:
                    rendered.append(_render(asked.bench.checkpoint(side), conversation, add_generation_prompt=header))
                except TemplateError as error:
                    return Measurement(failed=f"the {_who(side)}'s template: {error.message}")
            if rendered[0] != rendered[1]:
                differing += 1
                first = first or f"first {conversation[0][1][:30]!r}"
    count = 2 * len(_CONVERSATIONS)
    return Measurement({"differing_renderings": differing, "renderings": count}, f"{count} renderings {first}".strip())


@measures("FALSIFY-CHAT-003")
def missing_template_is_an_error(asked: Asked) -> Measurement:
    """A file without a template is refused where its template is asked for."""
    file = replace(asked.bench.checkpoint("model"), chat_template=None)
    try:
        _render(file, _CONVERSATIONS[0])
    except TemplateError:
        return Measurement({"refused": True}, "the model's file, its template taken away")
    return Measurement({"refused": False}, "the model's file, its template taken away")


@measures("FALSIFY-CHAT-762")
def one_system_turn(asked: Asked) -> Measurement:
    """Of several system messages none is lost, and the first turn is a system turn."""
    first, second = "You are terse.", "Answer in English."
    conversation = (("system", first), ("system", second), ("user", "Hello"))
    missing = _no_template(asked)
    if missing is not None:
        return missing
    try:
        text = _render(asked.bench.checkpoint("model"), conversation)
    except TemplateError as error:
        return Measurement(failed=f"the model's template: {error.message}")
    lost = sum(message not in text for message in (first, second))
    return Measurement(
        {"lost_messages": lost, "begins_with_system": text.startswith("<|im_start|>system\n")}, "two system messages"
    )


@measures("FALSIFY-CHAT-763")
def messages_stay_apart(asked: Asked) -> Measurement:
    """Without a template, too, messages do not run into each other: the plain wrap closes what it opens."""
    text = wrap("Hello", "once")
    apart = text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = _without_tokenizer(asked, "model")
    if ids is not None:
        return ids
    tokenizer = _tokenizer(asked, "model")
    turns = sum(tokenizer.token(index) == "<|im_start|>" for index in tokenizer.encode(text))
    return Measurement({"messages_apart": apart, "turns": turns}, "a user turn and the assistant's header")


@measures("GATE-CHAT-SHIP-008")
def golden_rendering(asked: Asked) -> Measurement:
    """The golden conversation, rendered by the model's own template, is the golden text to the byte."""
    conversation = (("system", GOLDEN_SYSTEM), ("user", GOLDEN_USER))
    missing = _no_template(asked)
    if missing is not None:
        return missing
    try:
        text = _render(asked.bench.checkpoint("model"), conversation)
    except TemplateError as error:
        return Measurement(failed=f"the model's template: {error.message}")
    asked.bench.keep("golden-rendering.txt", text)
    rendered, golden = text.encode(), GOLDEN.encode()
    at = next((i for i, (a, b) in enumerate(zip(rendered, golden, strict=False)) if a != b), None)
    if at is None and len(rendered) != len(golden):
        at = min(len(rendered), len(golden))
    return Measurement(
        {
            "equal_bytes": rendered == golden,
            "im_start": text.count("<|im_start|>"),
            "im_end": text.count("<|im_end|>"),
        },
        f"{len(golden)} bytes" if at is None else f"they differ from byte {at} on",
        artifacts=("golden-rendering.txt",),
    )
