"""Sections of what was measured stage by stage: `layers`, `replay`, `noise`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from aprjax.bisect.margins.top_two import NEAR_TIE_SIGMAS
from aprjax.bisect.page import heat
from aprjax.bisect.page.charts import Band, Mark, Series, bar_chart, line_chart
from aprjax.bisect.page.formats import number, place, seconds, tone
from aprjax.bisect.page.parts import Block, Row, Token, columns, heat_map, paragraph, strip, table
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

# Bands of the std ratio: upstream's (apr-vs-gguf-forward-parity-v1, contracts.md 1.3), and a tighter one beside it.
BANDS = ((0.5, 2.0), (0.7, 1.4))
# The stages whose ratio is drawn: the one that upstream's contract speaks of, attention's part, the hidden state.
_RATIO_STAGES = (Stage.FFN_SWIGL, Stage.ATTN_OUT, Stage.POST_FFN_RESIDUAL)
# So far the axis reaches even where nothing differs: a little beyond the wider band.
_RATIO_TICKS = (0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.5)
_MOST_BARS = 2048
_WORST = 12


def layers_blocks(report: Mapping[str, Any], key: str, texts: Mapping[int, str]) -> list[Block]:
    """The parts of one prompt's `layers` report."""
    blocks = []
    found = heat.of_layers(report, key, texts)
    if found is not None:
        note = "Columns are stages in the order of execution, rows are layers. Local: what a stage adds by itself."
        blocks.append(Block(found.title, heat_map(found), note))
        if any(found.get("std_ratio") for _, _, found in _stages(report)):
            title = "Ratio of standard deviations, model over reference"
            blocks.append(Block(title, _ratios(report), _ratio_note(report)))
        blocks.append(Block("Largest local differences", _largest(report), plain=True))
    if report.get("margins"):
        blocks += _margins(report, texts)
    noise = report.get("noise")
    if noise:
        blocks.append(Block("What rounding explains", _floor(noise), folded=True))
    return blocks


def _ratios(report: Mapping[str, Any]) -> Markup:
    layers = [layer for layer in report["layers"] if layer["layer"] != OUTSIDE]
    labels = [str(layer["layer"]) for layer in layers]
    lines = [
        Series(str(stage), [_stage(layer, stage).get("std_ratio") for layer in layers], index)
        for index, stage in enumerate(_RATIO_STAGES)
    ]
    farthest = [_farthest([_stage(layer, stage).get("std_ratio") for stage in LAYER_STAGES]) for layer in layers]
    lines.append(Series("the stage farthest from 1", farthest, 3))
    bands = [Band(f"band {low} to {high}", low, high, index) for index, (low, high) in enumerate(BANDS)]
    first = report.get("first_divergence")
    marks = []
    if first and str(first["layer"]) in labels:
        marks = [Mark(labels.index(str(first["layer"])), f"first divergence: {first['stage']}")]
    about = "Ratio of standard deviations by layer, with the bands 0.5 to 2 and 0.7 to 1.4"
    return line_chart(
        about, labels, lines, x_name="layer", y_name="ratio", bands=bands, marks=marks, ticks=_RATIO_TICKS
    )


def _stage(layer: Mapping[str, Any], stage: Stage) -> Mapping[str, Any]:
    return layer["stages"].get(str(stage)) or {}


def _farthest(ratios: Sequence[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio]
    return max(known, key=lambda ratio: max(ratio, 1 / ratio), default=None)


def _ratio_note(report: Mapping[str, Any]) -> str:
    positions = len(report["prompt"]["positions"])
    ratios = [found["std_ratio"] for _, _, found in _stages(report) if found.get("std_ratio")]
    counts = [sum(not low <= ratio <= high for ratio in ratios) for low, high in BANDS]
    return (
        f"Sample standard deviations over {positions} positions, the same on both sides. Outside the band of "
        f"[0.5, 2.0] lie {counts[0]} of {len(ratios)} stages, outside [0.7, 1.4] {counts[1]}."
    )


def _stages(report: Mapping[str, Any]) -> list[tuple[int, str, Mapping[str, Any]]]:
    """Every (layer, stage, what was found)."""
    return [(layer["layer"], stage, found) for layer in report["layers"] for stage, found in layer["stages"].items()]


def _largest(report: Mapping[str, Any]) -> Markup:
    known = [row for row in _stages(report) if row[2].get("local_rel_l2") is not None]
    if not known:
        return paragraph("No stage was measured: nothing is known about what a stage does by itself.")
    rows = sorted((row for row in known if row[2]["local_rel_l2"]), key=lambda row: -row[2]["local_rel_l2"])
    if not rows:
        return paragraph(f"All {len(known)} stages that were measured are bit-identical, given the same inputs.")
    first = report.get("first_divergence") or {}
    keys = ("local_rel_l2", "tolerance", "rel_l2", "cosine", "std_ratio", "max_abs")
    cells = [
        Row(
            ["" if layer == OUTSIDE else layer, stage, *(number(found.get(key)) for key in keys), _at(found)],
            "first" if (layer, stage) == (first.get("layer"), first.get("stage")) else "",
        )
        for layer, stage, found in rows[:_WORST]
    ]
    heads = columns(
        "#layer",
        "'stage",
        "#local rel L2",
        "#rounding explains",
        "#running rel L2",
        "#cosine",
        "#std ratio",
        "#max |Δ|",
        "at",
    )
    return table(heads, cells, label="Largest local differences")


def _at(found: Mapping[str, Any]) -> str:
    at = found.get("max_abs_at")
    return f"position {at[0]}, channel {at[1]}" if at else ""


def layers_token_verdict(margin: Mapping[str, Any]) -> str:
    """A position's verdict by the rule of `layers`: noise is the rms difference of the position's logits."""
    if not margin["flip"]:
        return "agree"
    within = margin["rms_delta"] > 0 and margin["gap"] / margin["rms_delta"] <= NEAR_TIE_SIGMAS
    return "near-tie" if within else "divergence"


def _margins(report: Mapping[str, Any], texts: Mapping[int, str]) -> list[Block]:
    tokens, margins = report["prompt"]["tokens"], report["margins"]

    def readable(token: int) -> str:
        return texts.get(token, f"[{token}]")

    verdicts = [layers_token_verdict(margin) for margin in margins]
    words = [
        f"position {m['position']}, {verdict}: after “{readable(tokens[m['position']])}” the reference says "
        f"“{readable(m['ref']['top1'])}” by {number(m['ref']['margin'], 3)}, the model "
        f"“{readable(m['model']['top1'])}” by {number(m['model']['margin'], 3)}, KL {number(m['kl'], 2)}"
        for m, verdict in zip(margins, verdicts, strict=True)
    ]
    shown = [
        Token(readable(tokens[m["position"]]), verdict, text)
        for m, verdict, text in zip(margins, verdicts, words, strict=True)
    ]
    flips = [m for m in margins if m["flip"]]
    note = "What both sides were fed; each token is marked by what the two say after it. "
    note += f"{len(flips)} of {len(margins)} positions flip. "
    note += "By keyboard: left and right move, up and down go to the next flip."
    blocks = [Block("Tokens by verdict", strip(shown, label="Tokens by verdict"), note)]
    blocks.append(
        Block(
            "Margin of the reference’s choice",
            margin_bars([str(m["position"]) for m in margins], [m["ref"]["margin"] for m in margins], verdicts, words),
        )
    )
    if flips:
        rows = [
            [
                m["position"],
                readable(tokens[m["position"]]),
                readable(m["ref"]["top1"]),
                number(m["ref"]["margin"]),
                readable(m["model"]["top1"]),
                number(m["model"]["margin"]),
                number(m["gap"]),
                number(m["kl"]),
                verdict,
            ]
            for m, verdict in zip(margins, verdicts, strict=True)
            if m["flip"]
        ]
        heads = columns(
            "#position", "'after", "'ref says", "#by", "'model says", "#by", "#gap", "#KL, nats", "?verdict"
        )
        blocks.append(Block("Flips", table(heads, rows, label="Flips"), plain=True))
    return blocks


def margin_bars(
    labels: Sequence[str],
    margins: Sequence[float | None],
    verdicts: Sequence[str],
    words: Sequence[str],
    bands: Sequence[Band] = (),
) -> Markup:
    """The margins as bars; flips have a sign on top."""
    cut = slice(_MOST_BARS)
    kinds = [tone(verdict) for verdict in verdicts]
    about = "Margin of the reference's next choice at every position, in logits, on a logarithmic scale"
    return bar_chart(
        about,
        labels[cut],
        margins[cut],
        kinds[cut],
        words[cut],
        x_name="position",
        y_name="margin, logits",
        bands=bands,
    )


def _floor(noise: Mapping[str, Any]) -> Markup:
    text = paragraph(str(noise.get("method") or ""))
    floors = noise.get("rel_l2") or {}
    if not floors:
        return text
    layers = ", ".join(map(str, noise.get("layers") or []))
    rows = [[stage, number(floor), number(floor * noise["factor"])] for stage, floor in floors.items()]
    text += paragraph(
        f"Measured at layers {layers} (−1 stands for the stages outside); {noise['factor']} times as much is tolerated."
    )
    return text + table(columns("'stage", "#measured", "#tolerated"), rows, label="Noise floor by stage")


def replay_blocks(report: Mapping[str, Any], key: str) -> list[Block]:
    """The parts of a `replay` report."""
    counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items() if count)
    text = f"{counts}; {report['tokens']} tokens, judged by {', '.join(report['arithmetics'])}."
    blocks = [Block("Nodes", paragraph(text), plain=True)]
    explained = report.get("explained") or {}
    if explained:
        blocks.append(
            Block(
                "Which arithmetic explains it",
                table(columns("'stage", "explained by"), explained.items(), label="Arithmetics"),
                plain=True,
            )
        )
    unexplained = report.get("unexplained") or []
    if unexplained:
        rows = [
            [
                place(n["layer"], n["stage"]),
                number(n.get("worst_row")),
                number(n.get("tolerance")),
                n.get("reason") or "",
            ]
            for n in unexplained
        ]
        heads = columns("node", "#worst position", "#rounding explains", "what is wrong")
        blocks.append(
            Block("What the file does not explain", table(heads, rows, label="Unexplained nodes"), plain=True)
        )
    found = heat.of_replay(report, key)
    if found is not None:
        blocks.append(Block(found.title, heat_map(found)))
    blocks.append(Block("By stage", _by_stage(report), plain=True))
    return blocks


def _by_stage(report: Mapping[str, Any]) -> Markup:
    rows = []
    verdicts = list(report["counts"])
    for stage in dict.fromkeys(node["stage"] for node in report["nodes"]):
        nodes = [node for node in report["nodes"] if node["stage"] == stage]
        counts = [sum(node["verdict"] == verdict for node in nodes) or "" for verdict in verdicts]
        unequal = sum(node.get("mismatches") or 0 for node in nodes)
        worst = max((n["worst_row"] for n in nodes if n.get("worst_row") is not None), default=None)
        rows.append([stage, *counts, unequal, number(worst)])
    heads = columns("'stage", *(f"#{verdict}" for verdict in verdicts), "#unequal values", "#worst position")
    return table(heads, rows, label="Nodes by stage")


def noise_blocks(report: Mapping[str, Any]) -> list[Block]:
    """The parts of a `noise` report."""
    changes = report["changes"]
    rows = [
        [
            c["name"],
            *(number(c.get(k)) for k in ("logits_rel_l2", "rms_delta", "max_delta", "max_kl")),
            f"{c['flips']} of {c['positions']}",
        ]
        for c in changes
    ]
    heads = columns("change", "#rel L2", "#rms Δ", "#max |Δ|", "#max KL", "#flips")
    text = f"{report['arithmetic']} arithmetic, {len(report['tokens'])} tokens, {seconds(report.get('seconds'))}."
    blocks = [Block("At the logits", paragraph(text) + table(heads, rows, label="Changes at the logits"), plain=True)]
    stages = [str(stage) for stage in Stage if any(str(stage) in c["stages"] for c in changes)]
    lines = [
        Series(c["name"], [(c["stages"].get(stage) or {}).get("max") for stage in stages], index)
        for index, c in enumerate(changes)
    ]
    about = "The largest relative L2 of every stage over the layers, a line for each change"
    chart = line_chart(about, stages, lines, x_name="", y_name="largest rel L2", slanted=True)
    blocks.append(
        Block(
            "By stage, the largest over the layers", chart, "A gap is a stage that the change leaves equal to the bit."
        )
    )
    heads = columns("'stage", *(f"#{c['name']}" for c in changes))
    rows = [[stage, *(number((c["stages"].get(stage) or {}).get("median")) for c in changes)] for stage in stages]
    blocks.append(
        Block("By stage, the median over the layers", table(heads, rows, label="Medians by stage"), folded=True)
    )
    return blocks
