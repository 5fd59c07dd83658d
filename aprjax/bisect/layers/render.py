"""The `layers` report for a terminal of 80 columns. Rich colours it on a terminal and not in a pipe."""

from __future__ import annotations

import os

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aprjax.bisect.report import VALUES_LACKING, LayerReport, LayersReport, Verdict
from aprjax.qwen2.stages import OUTSIDE, Stage

_STYLES = {
    Verdict.AGREE: "bold green",
    Verdict.NEAR_TIE: "bold yellow",
    Verdict.DIVERGENCE: "bold red",
    Verdict.UNMEASURED: "bold magenta",
}
# Findings shown in full; the JSON has all of them.
_MOST_FINDINGS = 8
# Positions whose margins are shown when no position flips.
_MOST_MARGINS = 6


def print_reports(reports: list[LayersReport], console: Console | None = None) -> None:
    """Prints what was compared, the findings, a line per prompt, and the table of the prompt that decides."""
    console = console or Console(highlight=False, soft_wrap=False)
    _print_sides(console, reports[0])
    _print_findings(console, reports)
    deciding = next((r for r in reports if r.verdict is not Verdict.AGREE), reports[-1])
    _print_layers(console, deciding)
    _print_margins(console, deciding)
    for report in reports:
        _print_verdict(console, report)


def _print_sides(console: Console, report: LayersReport) -> None:
    for name, side in report.sides.items():
        console.print(f"{name:6} {escape(os.path.basename(side.path))}", soft_wrap=True)
        console.print(f"       [dim]{side.format}, {side.arithmetic} arithmetic, sha256 {side.sha256[:16]}…[/]")


def _print_findings(console: Console, reports: list[LayersReport]) -> None:
    findings = list(dict.fromkeys(f for report in reports for f in report.findings))
    order = {"error": 0, "warning": 1, "info": 2}
    summary = [f for f in findings if f.id == "files-compared"]
    # The verdict says what a trace lacks, stage by stage; it stands below.
    said = {
        f.side for f in findings if f.id == VALUES_LACKING and any(f.message in report.reason for report in reports)
    }
    hidden = [f for f in findings if f.side in said and f.id in (VALUES_LACKING, "stages-unmeasured")]
    rest = sorted(
        (f for f in findings if f.id != "files-compared" and f not in hidden), key=lambda f: order[f.severity]
    )
    for finding in summary:
        console.print(f"files  {escape(finding.message)}")
    for finding in rest[:_MOST_FINDINGS]:
        colour = {"error": "red", "warning": "yellow", "info": "dim"}[finding.severity]
        side = f"{finding.side}: " if finding.side not in ("", "both") else ""
        tensor = f"{finding.tensor}: " if finding.tensor and finding.tensor not in finding.message else ""
        console.print(
            f"[{colour}]{finding.severity:7}[/] {escape(f'{side}{tensor}{finding.message}')} [dim]({finding.id})[/]"
        )
    if len(rest) > _MOST_FINDINGS:
        console.print(f"[dim]… and {len(rest) - _MOST_FINDINGS} more findings (all are in the JSON)[/]")


def _print_layers(console: Console, report: LayersReport) -> None:
    if not report.layers:
        return
    console.print(f"{report.prompt.name}: model against ref, {_positions_text(report)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("std ratio\nffn_swigl", justify="right")
    table.add_column("output\ncosine", justify="right")
    table.add_column("output\nrel L2", justify="right")
    table.add_column("max local\nrel L2", justify="right")
    table.add_column("at stage")
    table.add_column("")
    first = report.first_divergence
    ordered = [layer for layer in report.layers if layer.layer != OUTSIDE]
    outside = {layer.layer: layer for layer in report.layers}.get(OUTSIDE)
    if outside is not None:
        _add_row(table, _part(outside, (Stage.EMBEDDING,)), "embed", report)
    for layer in ordered:
        _add_row(table, layer, str(layer.layer), report)
    if outside is not None:
        _add_row(table, _part(outside, (Stage.FINAL_NORM, Stage.LM_HEAD)), "head", report)
    console.print(table)
    if first is not None:
        console.print("[dim]local: the stage computed from the reference's own inputs; the rest is inherited.[/]")


def _part(layer: LayerReport, stages: tuple[Stage, ...]) -> LayerReport:
    return LayerReport(layer.layer, {s: r for s, r in layer.stages.items() if s in stages})


def _add_row(table: Table, layer: LayerReport, label: str, report: LayersReport) -> None:
    if not layer.stages:
        return
    output = list(layer.stages.values())[-1].distance
    swigl = layer.stages.get(Stage.FFN_SWIGL)
    stage, worst = max(layer.stages.items(), key=lambda item: item[1].local_rel_l2 or 0.0)
    first = report.first_divergence
    here = first is not None and first.layer == layer.layer and first.stage in layer.stages
    if here and first is not None:
        # In the guilty layer the first guilty stage is what matters, not the loudest.
        stage, worst = first.stage, layer.stages[first.stage]
    local = worst.local_rel_l2
    table.add_row(
        label,
        _number(swigl.distance.std_ratio, ".4f") if swigl else "",
        _number(output.cosine, ".6f"),
        _small(output.rel_l2),
        _small(local),
        str(stage) if local else "",
        "← first" if here else "",
        style="bold red" if here else None,
    )


def _print_margins(console: Console, report: LayersReport) -> None:
    if not report.margins:
        return
    flips = [m for m in report.margins if m.flip]
    kl = max(m.kl for m in report.margins)
    console.print(
        f"margins: {len(flips)} flips in {len(report.margins)} positions, "
        f"smallest reference margin {min(m.ref.margin for m in report.margins):.3g} logits, largest KL {kl:.2g} nats"
    )
    for m in flips[:_MOST_MARGINS]:
        console.print(
            f"  position {m.position}: ref {m.ref.top1} by {m.ref.margin:.3g}, model {m.model.top1} by "
            f"{m.model.margin:.3g}, across {m.gap:.3g} logits"
        )
    if len(flips) > _MOST_MARGINS:
        console.print(f"  … and {len(flips) - _MOST_MARGINS} more")


def _print_verdict(console: Console, report: LayersReport) -> None:
    style = _STYLES[report.verdict]
    first = report.first_divergence
    place = ""
    if first is not None:
        place = f" at {_layer_text(first.layer)}{first.stage}"
    fed = f"{report.prompt.name}, {len(report.prompt.tokens)} tokens"
    console.print(f"[{style}]{str(report.verdict).upper()}{place}[/]  [dim]({fed})[/]")
    console.print(f"  {escape(report.reason)}")
    if first is not None and first.next_step:
        console.print(f"  next: {escape(first.next_step)}")
    if first is not None and first.confidence is not None:
        console.print(f"  [dim]{escape(first.confidence.sentence())}[/]")


def _layer_text(layer: int) -> str:
    return "" if layer == OUTSIDE else f"layer {layer}, "


def _positions_text(report: LayersReport) -> str:
    chosen, count = report.prompt.positions, len(report.prompt.tokens)
    if not chosen or len(chosen) == count:
        return f"all {count} positions"
    first, last = min(chosen), max(chosen)
    return f"positions {first} to {last} of {count}" if last > first else f"position {first} of {count}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _small(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}"
