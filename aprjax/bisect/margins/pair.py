"""`margins`: two sides teacher-forced over the same tokens, and what drift does to the choice of the next one.

Both sides are fed the same tokens whatever they would have chosen, so that every position is compared on equal
terms. A flip is judged by the noise floor measured on these tokens; the flips are foreseen from the
reference's margins before they are looked at. Nothing here prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from aprjax.bisect.files import FilesReport
from aprjax.bisect.layers.compare import findings_of
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.margins.measure import judge, measure, summarize
from aprjax.bisect.margins.report import FedTokens, MarginsReport, TokenMargin
from aprjax.bisect.margins.run import Shared, paired_logits
from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.noise.logits import LogitNoise, measure_logit_noise
from aprjax.bisect.report import SidedFinding, Verdict
from aprjax.bisect.token_texts import TokenTexts
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side, side_info
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.arithmetic import PRESETS

# The noise floor is measured on at most this many of the first tokens: each change is one more forward pass.
# 10 logits at each of 192 positions leave sigma a standard error of about 2 %, if they moved independently.
NOISE_TOKENS = 192

# A position drifts beyond noise where its ten likeliest logits move by this many sigma. The standard deviation of
# ten gaussian numbers is that far off once in 10^12 times; sigma is a mean, and some positions are noisier.
_BEYOND_NOISE = 3.0

# An engine runs anew for each piece: it is given as what yields the side for a piece's tokens.
AnySide = Side | Callable[[tuple[int, ...]], Side]


@dataclass(frozen=True)
class Piece:
    """Tokens that are fed from position 0, and the positions that are compared."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]


def pieces_of(fed: FedTokens, positions: tuple[int, ...] | None = None) -> list[Piece]:
    """The pieces in which the tokens are fed.

    A text is cut into contexts, of which the second half is compared, as `llama-perplexity` does: every
    prediction then has at least half a context before it. The last, incomplete context is left out, unless it
    is the only one: then all of it is compared.
    """
    ids = fed.ids
    if fed.context is None:
        return [Piece(ids, tuple(range(len(ids))) if positions is None else positions)]
    size = fed.context
    if len(ids) < size:
        return [Piece(ids, tuple(range(max(1, len(ids) - 1))))]
    return [
        Piece(ids[begin : begin + size], tuple(range(size // 2, size - 1)))
        for begin in range(0, len(ids) - size + 1, size)
    ]


def compare_margins(
    model: AnySide,
    ref: AnySide,
    *,
    fed: FedTokens,
    tokens: TokensReport,
    positions: tuple[int, ...] | None = None,
    files: FilesReport | None = None,
    with_noise: bool = True,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> MarginsReport:
    """Compares the two sides' choices at every position.

    Args:
        model: the side under suspicion.
        ref: the side it is judged by.
        fed: what both are fed.
        tokens: the prompt's tokens, and whether the two tokenizers agree on them.
        positions: the compared ones, of tokens fed in one piece; by default all.
        files: the files comparison, if it is at hand.
        with_noise: measure the noise floor; without it no flip can be judged.
        progress: told what is being done, and how far it is.

    Raises:
        CheckpointError: there are no tokens, or more than a model's context; see also `paired_logits`.
    """
    start = time.perf_counter()
    pieces = pieces_of(fed, positions)
    pair = _sides((model, ref), pieces[0])
    check_context(pair, fed)
    noise = _noise(*pair, pieces[0], progress) if with_noise else None
    measured_noise = time.perf_counter()
    texts = TokenTexts(pair[1].checkpoint, pair[0].checkpoint)
    shared = Shared()
    rows: list[TokenMargin] = []
    for number, piece in enumerate(pieces):
        label = f"piece {number + 1} of {len(pieces)}, " if len(pieces) > 1 else ""
        sides = _sides((model, ref), piece) if number else pair
        batches = paired_logits(
            *sides,
            piece.tokens,
            piece.positions,
            files=files,
            shared=shared,
            progress=lambda what, done, total, label=label: progress(f"{label}{what}", done, total),
        )
        for chosen, ours, theirs in batches:
            for position, a, b in zip(chosen, ours, theirs, strict=True):
                row = measure(_row(fed, piece, number, position, texts), a, b)
                rows.append(_with_choices(row, texts))
    judged, bounds = judge(rows, noise)
    verdict, reason = _verdict(judged, noise, tokens)
    drift = _drift_beyond_noise(judged, noise)
    if verdict is Verdict.AGREE:
        reason += f", but {drift.message}" if drift is not None else ""
    return MarginsReport(
        verdict=verdict,
        reason=reason,
        sides={"model": side_info(pair[0]), "ref": side_info(pair[1])},
        fed=fed,
        rows=judged,
        summary=summarize(judged),
        bounds=bounds,
        noise=noise,
        findings=(
            # What a trace lacks beside the logits is no loss here.
            *(found for found in findings_of(*pair, files, tokens) if found.id != "stages-unmeasured"),
            *([drift] if drift is not None else []),
            *_findings(fed, pieces, shared, noise, with_noise),
        ),
        seconds={"noise": measured_noise - start, "margins": time.perf_counter() - measured_noise},
    )


def _sides(given: tuple[AnySide, AnySide], piece: Piece) -> tuple[Side, Side]:
    model, ref = (side(piece.tokens) if callable(side) else side for side in given)
    return model, ref


def check_context(sides: tuple[Side, Side], fed: FedTokens) -> None:
    """Refuses what no model could be fed.

    Raises:
        CheckpointError: no tokens, or more at once than the model's context.
    """
    length = len(fed.ids) if fed.context is None else min(fed.context, len(fed.ids))
    checkpoints = [side.checkpoint for side in sides if side.checkpoint is not None]
    if not length:
        raise CheckpointError(
            "the prompt has no tokens",
            file=checkpoints[0].path if checkpoints else None,
            fix="give a prompt that is not empty",
        )
    for checkpoint in checkpoints:
        most = checkpoint.config.max_position_embeddings
        if length > most:
            raise CheckpointError(
                f"{length} tokens are to be fed at once, and the model's context has {most}",
                file=checkpoint.path,
                fix="shorten the prompt or the continuation; a text is cut into pieces by --text-file with --context",
            )


def _noise(model: Side, ref: Side, piece: Piece, progress: Callable[[str, int, int], None]) -> LogitNoise | None:
    """The floor on the first tokens of a piece; None where no side's file is at hand."""
    runners = [_noise_runner(side) for side in (model, ref)]
    if runners == [None, None]:
        return None
    tokens = piece.tokens[:NOISE_TOKENS]
    inside = [position for position in piece.positions if position < len(tokens)]
    return measure_logit_noise(runners[0], runners[1], tokens, inside or range(len(tokens)), progress=progress)


def _noise_runner(side: Side) -> Runner | None:
    """The side as a run of its file, not in an engine's order of sums: any order shows the same noise, sooner."""
    if side.checkpoint is None:
        return None
    arithmetic = side.arithmetic
    if arithmetic.exact:
        free = replace(arithmetic, name=f"{arithmetic.name}, re-associated", exact=False, kernels=(), vectors="avx2")
        arithmetic = next((known for known in PRESETS.values() if replace(free, name=known.name) == known), free)
    return Runner(side.checkpoint, arithmetic)


def _with_choices(row: TokenMargin, texts: TokenTexts) -> TokenMargin:
    """The row with both sides' choices readable."""
    if row.model is None or row.ref is None:
        return row
    return replace(row, model_text=texts(row.model.top1), ref_text=texts(row.ref.top1))


def _row(fed: FedTokens, piece: Piece, number: int, position: int, texts: TokenTexts) -> TokenMargin:
    token = piece.tokens[position]
    target = piece.tokens[position + 1] if position + 1 < len(piece.tokens) else None
    if fed.context is not None:
        part = "text"
    else:
        part = "continuation" if fed.continuation and position + 1 >= len(fed.prompt) else "prompt"
    return TokenMargin(number, position, token, texts(token), part, target)


def _findings(
    fed: FedTokens, pieces: list[Piece], shared: Shared, noise: LogitNoise | None, with_noise: bool
) -> list[SidedFinding]:
    found = []
    if shared.layers:
        text = (
            f"{shared.layers} of {shared.of} layers hold the same bytes on both sides and got the same inputs: "
            "they were computed once"
        )
        found.append(SidedFinding("computed-once", "info", text, side="both"))
    left_out = len(fed.ids) - sum(len(piece.tokens) for piece in pieces)
    if left_out:
        text = f"the last {left_out} tokens of the text do not fill a context of {fed.context}, and are left out"
        found.append(SidedFinding("text-cut", "info", text, side="both"))
    if noise is None:
        why = "no side's file is at hand" if with_noise else "it was not asked for"
        text = f"the noise floor was not measured ({why}): no flip can be judged"
        found.append(SidedFinding("noise-unmeasured", "warning" if with_noise else "info", text, side="both"))
    for reason in noise.skipped if noise is not None else ():
        found.append(SidedFinding("change-skipped", "info", reason, side="both"))
    return found


def _drift_beyond_noise(rows: tuple[TokenMargin, ...], noise: LogitNoise | None) -> SidedFinding | None:
    """Where no choice flips, the logits may still part: wide margins hide it, and other tokens may not."""
    measured = [row for row in rows if row.drift is not None]
    beyond = [row for row in measured if noise is not None and (row.drift or 0.0) > _BEYOND_NOISE * noise.sigma]
    if noise is None or not beyond:
        return None
    worst = max(beyond, key=lambda row: row.drift or 0.0)
    times = "where noise moves none" if noise.sigma == 0 else f"{(worst.drift or 0.0) / noise.sigma:.3g} sigma"
    text = (
        f"the logits drift by more than noise at {len(beyond)} of {len(measured)} positions, most at {_place(worst)} "
        f"(fed {worst.text!r}): by {worst.drift:.3g}, {times}"
    )
    return SidedFinding("drift-beyond-noise", "warning", text, side="both")


def _verdict(rows: tuple[TokenMargin, ...], noise: LogitNoise | None, tokens: TokensReport) -> tuple[Verdict, str]:
    if not tokens.agree:
        return Verdict.DIVERGENCE, tokens.reason
    counted = {verdict: [row for row in rows if row.verdict is verdict] for verdict in Verdict}
    broken = [row for row in rows if row.ref is None]
    if broken:
        side = "model" if broken[0].verdict is Verdict.DIVERGENCE else "reference"
        text = f"the {side}'s logits are not all finite at {_place(broken[0])}"
        return broken[0].verdict, text
    flips = [row for row in rows if row.flip]
    if not flips:
        return Verdict.AGREE, f"no flip in {len(rows)} positions"
    share = f"{len(flips)} of {len(rows)} positions flip"
    if any(row.part == "continuation" for row in rows):
        # What a side would have said within the prompt is never said.
        share += f" ({sum(row.part == 'continuation' for row in flips)} where text is generated)"
    if noise is None:
        return Verdict.UNMEASURED, f"{share}, and the noise that could explain it was not measured"
    worst = max(counted[Verdict.DIVERGENCE] or flips, key=lambda row: row.widest_gap or 0.0)
    gap = f"{worst.widest_gap:.3g} logits ({_sigmas(worst)}) at {_place(worst)}"
    if counted[Verdict.DIVERGENCE]:
        beyond = len(counted[Verdict.DIVERGENCE])
        what = f"{beyond} beyond the noise" if worst.rank == 2 else f"{beyond} beyond the noise or the second rank"
        return Verdict.DIVERGENCE, f"{share}, {what}, the widest across {gap}, to the reference's rank {worst.rank}"
    return (
        Verdict.NEAR_TIE,
        f"{share}, all between the two best and within {NEAR_TIE_SIGMAS:.1f} sigma, the widest across {gap}",
    )


def _sigmas(row: TokenMargin) -> str:
    return "no noise at all" if row.gap_sigmas is None else f"{row.gap_sigmas:.1f} sigma"


def _place(row: TokenMargin) -> str:
    return f"position {row.position}" + (f" of piece {row.chunk + 1}" if row.chunk else "")
