"""Greedy texts of a file under one arithmetic, judged as the golden gate judges them: shared by evidence of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What `aprjax.bisect.chatml.judged` says of a text, from best to worst, and the colours of pictures.
STATES = ("clean", "flagged", "wrong", "loops", "degenerate")
COLOURS = ("tab:green", "khaki", "tab:orange", "tab:red", "black")


def greedy_texts(
    model: Any, asked: Sequence[tuple[str, str]], *, budget: int, stop: bool = True
) -> list[dict[str, Any]]:
    """One row per (prompt's name, wrap): the tokens, the text, how it ended and what the gate says of it.

    Args:
        model: a `Qwen2`; its file's own tokenizer and stop tokens.
        asked: names of upstream's prompts, and how often each is wrapped.
        budget: the most tokens of a text.
        stop: whether stop tokens end it.
    """
    from aprjax.bisect.chatml.facts import decode_text
    from aprjax.bisect.chatml.prompts import chosen_prompts
    from aprjax.qwen2.batch import generate_batch
    from aprjax.text import Tokenizer

    tokenizer = Tokenizer.from_checkpoint(model.checkpoint)
    prompts = {prompt.name: prompt for prompt in chosen_prompts([name for name, _ in asked])}
    fed = [prompts[name].fed(times) for name, times in asked]
    stops = tokenizer.stop_ids if stop else frozenset[int]()
    ids = [list(tokenizer.encode(text)) for text in fed]
    found = generate_batch(model, ids, max_new_tokens=budget, stop_ids=stops)
    rows = []
    for (name, times), text, tokens in zip(asked, fed, found, strict=True):
        stopped = tokens[-1] in stops
        answer = tokens[:-1] if stopped else tokens
        judged = judged_text(decode_text(tokenizer, answer), answer, prompts[name], times)
        rows.append({"prompt": name, "wrap": times, "fed": text, "tokens": tokens, "stopped": stopped, **judged})
    return rows


def judged_text(text: str, tokens: Sequence[int], prompt: Any, times: str) -> dict[str, Any]:
    """The golden gate's verdict, and our own of repetition."""
    from aprjax.bisect.chatml.judged import state_of
    from aprjax.text.degenerate import judge_text
    from aprjax.text.repetition import measure_repetition

    # Upstream expects an answer of the wrapped prompt only.
    expected = prompt.expected if times != "none" else ()
    verdict, repetition = judge_text(text, expected=expected, prompt=prompt.fed(times)), measure_repetition(tokens)
    return {
        "text": text,
        "state": state_of(verdict, repetition),
        "gate": {"passed": verdict.passed, "rule": verdict.rule, "detail": verdict.detail},
        "repetition": repetition.to_json(),
    }


def shown(text: str, most: int = 60) -> str:
    """The beginning and, if long, the end of a text in a table's cell, escaped."""
    cut = text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
    escaped = cut.encode("unicode_escape").decode("ascii").replace("|", "\\|").replace("`", "'")
    return f"`{escaped}`" if escaped else ""


def state_picture(rows: Sequence[dict[str, Any]], line: Any, column: Any, title: str, target: Any) -> None:
    """Writes a PNG with one square per row, coloured by its state; `line(row)` and `column(row)` are its place."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    lines, columns = (list(dict.fromkeys(place(row) for row in rows)) for place in (line, column))
    grid = [[float("nan")] * len(columns) for _ in lines]
    for row in rows:
        grid[lines.index(line(row))][columns.index(column(row))] = STATES.index(row["state"])
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(lines)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=len(STATES) - 0.5, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, ticks=range(len(STATES))).ax.set_yticklabels(STATES)
    figure.savefig(target, dpi=110, format="png")
