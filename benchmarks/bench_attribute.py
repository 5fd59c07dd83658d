"""What `attribute` costs beside one traced forward pass of the same tokens, in time and memory.

    python benchmarks/bench_attribute.py [--model qwen2.5-coder-1.5b] [--tokens 64] [--steps 8] [--repeats 2]

The drift is that of one file: llama.cpp's arithmetic against float32. `traced forward`: the base network once, every
stage captured and held. `gradient`: one step of the path, forwards with every error added and backwards to all of
them. The two take turns in one process, and the least counts; compiled programs are in the cache. `whole`: `attribute`
from the call to the report. The peaks are those of processes of their own, one that traces and one that attributes,
files' pages included. Wall seconds mean something on an idle machine; processor seconds also beside other work. Exits
with 1 above the project's bars.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measured import Least, Results, Table, cores, measure, parser, shown

# Issue "Find the cause", acceptance 3.
MOST_TIME, MOST_MEMORY = 4.0, 2.0


def fed(tokens: int) -> list[int]:
    """Some tokens."""
    return [100 + 7 * index for index in range(tokens)]


def traced(path: str, tokens: int) -> None:
    """One traced forward pass of a process of its own, held until the end."""
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.trace.sides import open_side

    enable_compilation_cache()
    trace = open_side(path).trace(fed(tokens), arithmetic=PRESETS["float32"])
    assert len(trace) == 3 + 17 * (1 + max(layer for layer, _ in trace))


def attributed(path: str, tokens: int, steps: int) -> None:
    """The whole question in a process of its own; prints seconds, gap and passes."""
    import aprjax
    from aprjax.bisect.attribute.run import attribute
    from aprjax.bisect.files import compare_files
    from aprjax.bisect.lockstep import Runner
    from aprjax.bisect.tokens.fed import TokensReport
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache

    enable_compilation_cache()
    checkpoint = aprjax.open(path)
    least = Least()
    report = least.of(
        lambda: attribute(
            Runner(checkpoint, PRESETS["llama.cpp"]),
            Runner(checkpoint, PRESETS["float32"]),
            tokens=TokensReport("tokens", None, "none", tuple(fed(tokens))),
            positions=(tokens - 1,),
            files=compare_files(checkpoint, checkpoint),
            steps=steps,
            verify=1,
        )
    )
    print(json.dumps({"wall": least.wall, "processor": least.processor, "gap": report.gap, "passes": report.passes}))


def taking_turns(path: str, tokens: int, repeats: int) -> None:
    """A traced forward pass and a gradient, in turn; prints the least of either."""
    import tempfile

    import jax

    import aprjax
    from aprjax.bisect.attribute.metric import metric_between
    from aprjax.bisect.attribute.reverse import Perturbed, mixture
    from aprjax.bisect.attribute.values import Source, local_errors
    from aprjax.bisect.lockstep import Runner, WeightSource
    from aprjax.bisect.patching import PatchedModel
    from aprjax.qwen2 import PRESETS
    from aprjax.qwen2.compilation import enable_compilation_cache
    from aprjax.qwen2.model import run_head, run_layer, run_norm

    enable_compilation_cache()
    checkpoint, rows = aprjax.open(path), [tokens - 1]
    weights = WeightSource(lambda name: True)
    base = PatchedModel(Runner(checkpoint, PRESETS["float32"]), fed(tokens), rows, weights)
    arithmetic = base.runner.arithmetic

    def forward() -> Any:
        hidden, captured = jax.numpy.asarray(base.embedded), []
        for layer in base.layers:
            hidden, _, stages = run_layer(layer, hidden, base.context, {}, {}, arithmetic=arithmetic, capture=True)
            captured.append(stages)
        normed = run_norm(base.norm, hidden[rows[0] :][:1], arithmetic=arithmetic)
        return jax.block_until_ready((captured, run_head(base.head, normed, arithmetic=arithmetic)))

    with tempfile.TemporaryDirectory() as name:
        errors, logits = {}, {}
        for side in ("float32", "llama.cpp"):
            folder = Path(name) / side
            folder.mkdir()
            source = Source(Runner(checkpoint, PRESETS[side]), fed(tokens), rows, weights)
            errors[side], logits[side] = local_errors(source, base, folder)
        network = Perturbed(base, metric_between("margin", logits["llama.cpp"], logits["float32"], "float32"))
        added = mixture(errors["llama.cpp"], errors["float32"], base, 0.5)
        runs = {"traced forward": forward, "gradient": lambda: [None for _ in network.gradients(added)]}
        least = {kind: Least() for kind in runs}
        for kind, run in [*runs.items()] * (1 + repeats):
            least[kind].of(run)
    print(json.dumps({kind: {"wall": found.wall, "processor": found.processor} for kind, found in least.items()}))


def alone(kind: str, *arguments: object) -> tuple[dict[str, Any], float]:
    """One of the above in a process of its own: what it printed, and its peak in GB."""
    process = measure([sys.executable, __file__, "--alone", kind, *map(str, arguments)])
    lines = [line for line in process.said.splitlines() if line.startswith("{")]
    return json.loads(lines[-1] if lines else "{}"), process.peak_gb


def main() -> int:
    if sys.argv[1:2] == ["--alone"]:
        kind, path, *numbers = sys.argv[2:]
        {"traced": traced, "attributed": attributed, "turns": taking_turns}[kind](path, *map(int, numbers))
        return 0
    options = parser(__doc__)
    options.add_argument("--model", default="qwen2.5-coder-1.5b")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--repeats", type=int, default=2)
    arguments = options.parse_args()
    from aprjax.checkpoint.fetch import model_location

    path = model_location(arguments.model)
    turns, _ = alone("turns", path, arguments.tokens, arguments.repeats)
    whole, peak = alone("attributed", path, arguments.tokens, arguments.steps)
    _, peak_of_trace = alone("traced", path, arguments.tokens)
    about = f"{arguments.model}, {arguments.tokens} tokens, {cores()} cores, the least of {arguments.repeats}."
    results = Results("attribute", about, arguments.out)
    forward, gradient, passes = turns["traced forward"], turns["gradient"], whole["passes"]
    rows = [
        ("a traced forward pass", forward["wall"], forward["processor"], peak_of_trace),
        ("a gradient", gradient["wall"], gradient["processor"], None),
        (f"`attribute`, {arguments.steps} steps", whole["wall"], whole["processor"], peak),
    ]
    note = (
        f"The whole took {passes['forwards']} forward and {passes['backwards']} backward passes; its gap is "
        f"{whole['gap']:.2%}. The bars: a gradient at most {shown(MOST_TIME)} times a traced forward pass in processor "
        f"seconds, the whole at most {shown(MOST_MEMORY)} times its peak."
    )
    results.add(Table("Attributing a file's drift", ("", "wall s", "processor s", "peak GB"), rows, note))
    ratio = gradient["processor"] / forward["processor"]
    results.bar("a gradient, in traced forward passes (processor)", ratio, at_most=MOST_TIME)
    results.bar("the whole's memory, in traced forward passes", peak / peak_of_trace, at_most=MOST_MEMORY)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
