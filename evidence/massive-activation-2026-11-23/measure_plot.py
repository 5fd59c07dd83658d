"""The picture of `result.json`: where the channel is massive, what it does to neurons, and how far it goes."""

from __future__ import annotations

from typing import Any, BinaryIO

from matplotlib.figure import Figure

COLOURS = {"per 256": "tab:red", "per 32": "tab:blue"}


def save_plot(document: dict[str, Any], target: BinaryIO) -> None:
    """Writes the figure as PNG."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    _channel(axes[0, 0], document)
    _neurons(axes[0, 1], document)
    _cosine(axes[1, 0], document)
    _logits(axes[1, 1], document)
    site = document["site"]
    figure.suptitle(f"{document['model']['name']}: channel {site['channel']}, layer {site['layer']}, position 0")
    figure.savefig(target, dpi=110, format="png")


def _channel(axes: Any, document: dict[str, Any]) -> None:
    values = document["channel_by_layer"]["raw"]
    for stage, style in (("post_ffn_residual", "o-"), ("ffn_out", "s--"), ("ffn_norm", "^-")):
        axes.plot(values[stage], style, markersize=4, label=stage)
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylabel("value, float64")
    axes.set_xlabel("layer")
    axes.set_title(f"The channel at position 0 of {document['prompts']['raw']['text']!r}")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.legend()


def _neurons(axes: Any, document: dict[str, Any]) -> None:
    names = [
        n
        for n, _ in sorted(document["largest_neuron"]["Q8_K"].items(), key=lambda x: x[1])
        if n not in document["prompts"]
    ]
    for kind, colour in (("Q8_K", COLOURS["per 256"]), ("Q8_0", COLOURS["per 32"])):
        changes = [100 * document["largest_neuron"][kind][name] for name in names]
        axes.plot(changes, range(len(names)), "o", color=colour, label=f"{kind} activations")
    # Fonts lack some scripts; escaped, the tokens can be told apart all the same.
    axes.set_yticks(range(len(names)), [ascii(name) for name in names], fontsize=7)
    axes.axvline(-12.7, color=COLOURS["per 256"], linestyle=":", label="upstream, per 256: -12.7 %")
    axes.axvspan(-0.5, 0.5, color=COLOURS["per 32"], alpha=0.15, label="upstream, per 32: within 0.5 %")
    axes.set_xlabel("change of the largest ffn_swigl neuron against float64, %")
    axes.set_title("By first token, where the channel is massive")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)


def _cosine(axes: Any, document: dict[str, Any]) -> None:
    for prompt, style in (("raw", "-"), ("ChatML", "--")):
        for kind, colour in COLOURS.items():
            far = [1 - cosine for cosine in document["layer_output"][prompt][kind]["cosine"]]
            axes.plot(far, style, color=colour, label=f"{kind}, {prompt} prompt")
    axes.set_yscale("log")
    axes.set_ylabel("1 - cosine to float64")
    axes.set_xlabel("layer")
    axes.set_title("Layer outputs at position 0, all activations quantized")
    axes.legend(fontsize=8)


def _logits(axes: Any, document: dict[str, Any]) -> None:
    runs = [f"{kind}{site}" for kind in COLOURS for site in ("", ", this site", ", this site at position 0")]
    marks = (
        ("raw", "position_0", "o"),
        ("raw", "others", "x"),
        ("ChatML", "position_0", "s"),
        ("ChatML", "others", "+"),
    )
    for prompt, where, mark in marks:
        values = [document["logits"][prompt][name][where]["rms_delta"] for name in runs]
        label = f"{prompt}: {'position 0' if where == 'position_0' else 'worst later position'}"
        axes.plot(values, range(len(runs)), mark, label=label)
    axes.set_yticks(range(len(runs)), runs, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("rms difference of the logits from float64")
    axes.set_title("How far it reaches")
    axes.legend(fontsize=8, loc="lower left")
