"""What `bisect tokens` reports: frozen dataclasses that show themselves as JSON, frame, HTML or the worst few."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from aprjax.bisect.report import SidedFinding, Verdict

SCHEMA = "aprjax.tokens/1"


class Kind(StrEnum):
    """What a token id stands for in its vocabulary."""

    NORMAL = "normal"
    CONTROL = "control"
    USER_DEFINED = "user-defined"
    PADDING = "padding"
    OUTSIDE = "outside"


class Cause(StrEnum):
    """What a finding of severity error puts the blame on."""

    DOUBLE_WRAP = "double-wrap"
    BOS = "bos"
    SPECIAL_IDS = "special-token-ids"
    SPECIAL_AS_TEXT = "special-tokens-as-text"
    STOP_TOKENS = "stop-tokens"
    VOCABULARY = "vocabulary"
    PADDING = "padding-ids"
    TEMPLATE = "template"
    TOKENIZER = "tokenizer"
    TOKENIZER_MISSING = "tokenizer-missing"
    TOKENS = "tokens"


@dataclass(frozen=True)
class Token:
    """One token as it is fed.

    Attributes:
        id: its number.
        text: a readable piece, on one line; empty where no vocabulary is at hand.
        kind: what the id stands for.
        start: byte in the fed text at which it begins.
        end: byte after it.
    """

    id: int
    text: str
    kind: Kind
    start: int
    end: int


@dataclass(frozen=True)
class FedSide:
    """What one side is fed for one prompt.

    Attributes:
        source: where the ids come from: `tokenizer`, `llama.cpp`, `trace` or `given`; `none` without ids.
        tokens: in order.
        text: what the ids decode to; None where no vocabulary is at hand.
    """

    source: str
    tokens: tuple[Token, ...] = ()
    text: str | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids alone."""
        return tuple(token.id for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; text that is no UTF-8 has U+FFFD."""
        return {"source": self.source, "text": self.text, "tokens": [asdict(token) for token in self.tokens]}


@dataclass(frozen=True)
class FirstDifference:
    """Where the ids of two sides part.

    Attributes:
        position: of the first differing token.
        offset: byte of the reference's fed text there; None beyond its end.
        model: the model's next ids, at most four.
        ref: the reference's.
        explanation: what makes them differ.
    """

    position: int
    offset: int | None
    model: tuple[int, ...]
    ref: tuple[int, ...]
    explanation: str


@dataclass(frozen=True)
class PromptTokens:
    """One prompt on both sides.

    Attributes:
        name: of the probe, or `prompt`, `tokens`, `trace`.
        text: as given; None where ids were given.
        wrap: how often it was wrapped: none, once or twice.
        model: what the model is fed.
        ref: what the reference is fed.
        rows: positions `(model, ref)` of tokens that stand side by side; None opposite an unpaired one.
        first_difference: None where both are fed the same, or where a side has no ids.
    """

    name: str
    text: str | None
    wrap: str
    model: FedSide
    ref: FedSide
    rows: tuple[tuple[int | None, int | None], ...]
    first_difference: FirstDifference | None

    @property
    def measured(self) -> bool:
        """Whether both sides have ids."""
        return self.model.source != "none" and self.ref.source != "none"

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        first = self.first_difference
        return {
            "name": self.name,
            "text": self.text,
            "wrap": self.wrap,
            "model": self.model.to_json(),
            "ref": self.ref.to_json(),
            "rows": [list(row) for row in self.rows],
            "first_difference": None if first is None else asdict(first),
        }


@dataclass(frozen=True)
class TokenizerInfo:
    """One side's tokenizer settings, as its file has them; ids are None where it does not say."""

    path: str
    format: str
    tokens: int
    padding: int
    merges: int
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool | None
    pre_tokenizer: str | None
    stop_ids: tuple[int, ...]
    template: bool

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class VocabularyDifference:
    """How two vocabularies differ.

    Attributes:
        ids: how many ids stand for other tokens.
        examples: `(id, model's token, ref's token)` of the first of them; None beyond a vocabulary's end.
        special: `(text, model's id, ref's id)` of special tokens with other ids; None where it is not there.
        merges: how many merges only one side has, or 1 where the order alone differs.
    """

    ids: int
    examples: tuple[tuple[int, str | None, str | None], ...]
    special: tuple[tuple[str, int | None, int | None], ...]
    merges: int


@dataclass(frozen=True)
class TemplateReport:
    """The same conversation through both templates, and through `--wrap once`.

    Attributes:
        user: the user's turn that was rendered; a system turn was not given.
        model: the model's rendering; None where there is no template, or it failed (see the findings).
        ref: the reference's.
        wrapped: what `--wrap once` makes of it.
        llama_cpp: what llama.cpp's built-in rendering of the reference's template gives; None unmeasured.
        diff: unified diff of ref and model; empty where they are equal or one is missing.
        wrap_diff: unified diff of `wrapped` and the rendering (ref's, else the model's).
    """

    user: str
    model: str | None
    ref: str | None
    wrapped: str
    llama_cpp: str | None
    diff: str
    wrap_diff: str


@dataclass(frozen=True)
class TokensComparison:
    """The answer of `bisect tokens`.

    Attributes:
        verdict: divergence where the sides differ or what is fed is wrong on both; unmeasured where a side has no ids.
        reason: the verdict in a sentence.
        causes: what is to blame, each once, worst first.
        engine: what llama.cpp was asked, and why not where it was not.
    """

    verdict: Verdict
    reason: str
    causes: tuple[Cause, ...]
    sides: dict[str, TokenizerInfo | None]
    prompts: tuple[PromptTokens, ...]
    vocabulary: VocabularyDifference | None
    template: TemplateReport | None
    engine: dict[str, str] = field(default_factory=dict)
    findings: tuple[SidedFinding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.tokens/1`."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "causes": [str(cause) for cause in self.causes],
            "sides": {name: None if side is None else side.to_json() for name, side in self.sides.items()},
            "prompts": [prompt.to_json() for prompt in self.prompts],
            "vocabulary": None if self.vocabulary is None else asdict(self.vocabulary),
            "template": None if self.template is None else asdict(self.template),
            "engine": self.engine,
            "findings": [finding.to_json() for finding in self.findings],
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each pair of tokens, of every prompt."""
        rows = []
        for prompt in self.prompts:
            for pair in prompt.rows:
                row: dict[str, Any] = {"prompt": prompt.name}
                for name, side, at in zip(("model", "ref"), (prompt.model, prompt.ref), pair, strict=True):
                    token = None if at is None else side.tokens[at]
                    row |= {
                        f"{name}_position": at,
                        f"{name}_id": None if token is None else token.id,
                        f"{name}_text": None if token is None else token.text,
                        f"{name}_kind": None if token is None else str(token.kind),
                        f"{name}_start": None if token is None else token.start,
                        f"{name}_end": None if token is None else token.end,
                    }
                rows.append(row | {"same": row["model_id"] == row["ref_id"]})
        return rows

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The first k rows that differ."""
        return [row for row in self.rows() if not row["same"]][:k]

    def __repr__(self) -> str:
        return f"<TokensComparison: {self.verdict}; {self.reason}>"

    def _repr_html_(self) -> str:
        from aprjax.bisect.page import report_fragment

        return report_fragment(self.to_json())
