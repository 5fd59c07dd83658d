"""What a trace lacks: values that its engine computes and that are not there, so that nothing was measured of them.

Some engines never yield some stages: a fused kernel has nothing between its operations. A trace of such an engine lacks
nothing. A trace says so by its engine and options, or in words: `never_yields` in `TraceInfo.engine`, names of stages
with commas between them.
"""

from __future__ import annotations

from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.trace.memory import AnyTrace
from aprjax.trace.trace import TraceInfo

NEVER_YIELDS = "never_yields"
Place = tuple[int, Stage]


def never_yielded(info: TraceInfo) -> frozenset[Stage]:
    """The stages that a trace's engine computes without leaving a value behind, by what the trace says of it."""
    names = {name.strip() for name in info.engine.get(NEVER_YIELDS, "").split(",")}
    declared = {stage for stage in Stage if str(stage) in names}
    if info.arithmetic.startswith("llama.cpp (live)"):
        from aprjax.trace.ggml_nodes import absent_stages

        flash, step = info.engine.get("flash_attention") == "True", info.engine.get("step", "")
        stepwise = step.isdecimal() and int(step) < len(info.tokens)
        declared.update(absent_stages(flash_attention=flash, stepwise=stepwise))
    elif info.engine.get("name") == "transformers":
        from aprjax.trace.hf import ABSENT

        declared.update(ABSENT)
    return frozenset(declared)


def _wanted(num_layers: int) -> list[Place]:
    outside = [(OUTSIDE, stage) for stage in Stage if stage not in LAYER_STAGES]
    return outside + [(layer, stage) for layer in range(num_layers) for stage in LAYER_STAGES]


def lacking(trace: AnyTrace, num_layers: int) -> tuple[Place, ...]:
    """The values that a whole trace of `num_layers` layers by this engine has and that this one lacks.

    They are sorted by layer, those outside the layers first, and in execution order within a layer.
    """
    never, present = never_yielded(trace.info), set(trace)
    return tuple(place for place in _wanted(num_layers) if place not in present and place[1] not in never)


def places_in_words(places: tuple[Place, ...], num_layers: int) -> str:
    """`ffn_silu and ffn_out of layers 3 to 4; lm_head`: values by stages, those of the same layers together."""
    layers: dict[Stage, list[int]] = {}
    for layer, stage in places:
        layers.setdefault(stage, []).append(layer)
    whole = [layer for layer in range(num_layers) if all((layer, stage) in set(places) for stage in LAYER_STAGES)]
    words = [f"everything of {_layers(whole, num_layers)}"] if whole else []
    alike: dict[tuple[int, ...], list[str]] = {}
    for stage in [stage for stage in Stage if stage in layers]:
        rest = tuple(layer for layer in layers[stage] if layer not in whole)
        if rest:
            alike.setdefault(rest, []).append(str(stage))
    outside = alike.pop((OUTSIDE,), [])
    words += [f"{_and(stages)} of {_layers(list(rest), num_layers)}" for rest, stages in alike.items()]
    return "; ".join([*words, *([_and(outside)] if outside else [])])


def unmeasured_part(trace: AnyTrace, num_layers: int, whose: str) -> str:
    """A sentence on what was not compared since a trace lacks it, and what to do; empty where it lacks nothing."""
    places = lacking(trace, num_layers)
    if not places:
        return ""
    what = places_in_words(places, num_layers)
    held = tuple(place for place in _wanted(num_layers) if place in trace)
    if len(held) < len(places):
        what = f"all but {places_in_words(held, num_layers).removeprefix('everything of ')}" if held else "all"
    count = "1 value, which was" if len(places) == 1 else f"{len(places)} values, which were"
    return (
        f"{whose} lacks {count} not measured: {what}; "
        f"record it again with all stages, or let it say {NEVER_YIELDS!r} of the stages that its engine cannot give"
    )


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])


def _layers(layers: list[int], num_layers: int) -> str:
    """`layer 3`, `layers 3 to 9`, `layers 1, 4 and 7 more`."""
    if len(layers) == num_layers:
        return "all layers"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    shown = ", ".join(map(str, layers[:3]))
    return f"layers {shown}" + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
