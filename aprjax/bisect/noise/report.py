"""`noise`: how far one file is from itself under changes that every engine is free to make.

Each change is run on the same tokens and compared, stage by stage and at the logits, with the same
arithmetic unchanged. Differences are free-running: what a user of two engines would see.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from aprjax.bisect.lockstep import arbiter
from aprjax.bisect.margins.top_two import margins
from aprjax.bisect.metrics import relative_l2
from aprjax.bisect.open_sides import opened_file
from aprjax.bisect.replay.layers import BY_KEY, visible_part
from aprjax.checkpoint.types import Checkpoint, CheckpointError, Finding
from aprjax.qwen2.arithmetic import Arithmetic, preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.generate import Cache
from aprjax.qwen2.loading import embed
from aprjax.qwen2.model import Qwen2, bucket, causal_context, precision_scope, run_head, run_layer, run_norm
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage
from aprjax.text.probes import PROBES
from aprjax.text.prompt import encode_prompt, read_prompt_file
from aprjax.trace.engine import check_tokens

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "aprjax.noise/1"
Values = Mapping[tuple[int, Stage], np.ndarray]


@dataclass(frozen=True)
class ChangeReport:
    """One change: how far it moves every stage and the logits.

    Attributes:
        name: of the change.
        stages: by stage: the median and the largest relative L2 over the layers; stages that a side lacks are
            left out.
        logits_rel_l2: of all logits.
        rms_delta: root mean square of the logits' difference, of the worst position.
        max_delta: the largest difference of one logit.
        max_kl: the largest KL divergence of a position, in nats.
        flips: positions whose best token changes.
        positions: how many were compared.
    """

    name: str
    stages: dict[Stage, tuple[float, float]]
    logits_rel_l2: float | None
    rms_delta: float | None
    max_delta: float | None
    max_kl: float | None
    flips: int
    positions: int

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        stages = {str(stage): {"median": median, "max": most} for stage, (median, most) in self.stages.items()}
        return {**asdict(self), "stages": stages}


@dataclass(frozen=True)
class NoiseReport:
    """The noise floor of one file under one arithmetic."""

    path: str
    sha256: str
    arithmetic: str
    tokens: tuple[int, ...]
    changes: tuple[ChangeReport, ...]
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The JSON contract `aprjax.noise/1`."""
        return {
            "schema": SCHEMA,
            "file": {"path": self.path, "sha256": self.sha256},
            "arithmetic": self.arithmetic,
            "tokens": list(self.tokens),
            "changes": [change.to_json() for change in self.changes],
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": round(self.seconds, 3),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per (change, stage)."""
        return [
            {"change": change.name, "stage": str(stage), "median_rel_l2": median, "max_rel_l2": most}
            for change in self.changes
            for stage, (median, most) in change.stages.items()
        ]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (extra `notebooks`)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The k (change, stage) that move most."""
        return sorted(self.rows(), key=lambda row: -row["max_rel_l2"])[:k]

    def __repr__(self) -> str:
        return f"<NoiseReport: {len(self.changes)} changes of {self.arithmetic}, {len(self.tokens)} tokens>"

    def plot(self) -> Any:
        """A matplotlib figure: what every change moves, by stage."""
        from aprjax.bisect.noise.plot import plot_report

        return plot_report(self)

    def _repr_html_(self) -> str:
        from aprjax.bisect.page import report_fragment

        return report_fragment(self.to_json())


def noise_of(
    file: str | Path | Checkpoint,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    tokens: list[int] | None = None,
    times: str = "none",
    arithmetic: str | Arithmetic = "llama.cpp",
    engine: bool = True,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> NoiseReport:
    """What `python -m bisect noise` does: `measure_noise` of a file on a prompt, by default the first probe.

    Raises:
        CheckpointError: the file cannot be read or run, or cannot encode the prompt.
    """
    enable_compilation_cache()
    checkpoint = opened_file(file)
    if tokens is None:
        if prompt_file is not None:
            prompt = read_prompt_file(prompt_file)
        text = PROBES[0].text if prompt is None else prompt
        tokens = encode_prompt(checkpoint, text, times)
    chosen = preset(arithmetic) if isinstance(arithmetic, str) else arithmetic
    return measure_noise(checkpoint, tokens, chosen, engine=engine, progress=progress)


def render(report: NoiseReport, console: Console) -> None:
    """A line per change: the stage it moves most, and the logits; in 80 columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console.print(f"{escape(Path(report.path).name)}, {report.arithmetic} arithmetic, {len(report.tokens)} tokens")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("change", "layers\nrel L2", "logits\nrel L2", "rms Δ", "max KL", "flips"):
        table.add_column(heading, justify="left" if heading == "change" else "right")
    for change in report.changes:
        output = change.stages.get(Stage.POST_FFN_RESIDUAL, (None, None))[1]
        numbers = (output, change.logits_rel_l2, change.rms_delta, change.max_kl)
        flips = f"{change.flips}/{change.positions}"
        table.add_row(escape(change.name), *("–" if x is None else f"{x:.1e}" for x in numbers), flips)
    console.print(table)
    for finding in report.findings:
        console.print(f"{finding.severity} {escape(finding.message)} [dim]({finding.id})[/]")


def measure_noise(
    checkpoint: Checkpoint,
    tokens: list[int],
    arithmetic: Arithmetic,
    *,
    engine: bool = True,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> NoiseReport:
    """Runs the changes that apply to this arithmetic, and llama.cpp's own where it is installed.

    Args:
        checkpoint: the file.
        tokens: what it is fed.
        arithmetic: what is changed.
        engine: also run llama.cpp, if the file is GGUF.
        progress: told what is being run.

    Raises:
        CheckpointError: the file cannot be run, or has no such tokens.
    """
    check_tokens(checkpoint, tokens)
    start = time.perf_counter()
    model = Qwen2(checkpoint, arithmetic)
    runs = _runs(model, tokens)
    engines = _engine_runs(checkpoint, tokens) if engine and checkpoint.format == "gguf" else {}
    total = 1 + len(runs) + len(engines)
    progress("as it is", 0, total)
    base = batched(model, tokens)
    changes: list[ChangeReport] = []
    findings: list[Finding] = []
    for name, run in runs.items():
        progress(name, 1 + len(changes), total)
        changes.append(compare(name, run(), base))
    reference: Values | None = None
    for name, run in engines.items():
        progress(name, 1 + len(changes), total)
        try:
            values = run()
        except CheckpointError as error:
            findings.append(Finding("engine-not-run", "warning", f"{name}: {error.message}"))
            continue
        # The first is llama.cpp as `arithmetic` emulates it; the others are compared with it.
        changes.append(compare(name, values, base if reference is None else reference))
        reference = values if reference is None else reference
    progress("done", total, total)
    return NoiseReport(
        path=str(checkpoint.path),
        sha256=checkpoint.sha256(),
        arithmetic=arithmetic.name,
        tokens=tuple(tokens),
        changes=tuple(changes),
        findings=tuple(findings),
        seconds=time.perf_counter() - start,
    )


def _runs(model: Qwen2, tokens: list[int]) -> dict[str, Callable[[], Values]]:
    """The changes, by name; only those that change something."""
    arithmetic = model.arithmetic
    runs: dict[str, Callable[[], Values]] = {"one position at a time": lambda: stepwise(model, tokens)}
    others: dict[str, Arithmetic] = {}
    if arithmetic.dtype == "float32":
        others["float64 sums"] = arbiter(arithmetic)
    else:
        others["float32 sums"] = replace(arithmetic, name="in float32", dtype="float32")
    if arithmetic.matmul == "integer" and arithmetic.activations == "engine" and arithmetic.dtype == "float32":
        name = "sums re-associated" if arithmetic.exact else "sums in llama.cpp's order"
        others[name] = replace(arithmetic, name=name, exact=not arithmetic.exact)
    if arithmetic.kv_cache != "float16":
        others["float16 KV cache"] = replace(arithmetic, name="float16 KV cache", kv_cache="float16")
    for name, other in others.items():
        runs[name] = lambda other=other: batched(with_arithmetic(model, other), tokens)
    return runs


def _engine_runs(checkpoint: Checkpoint, tokens: list[int]) -> dict[str, Callable[[], Values]]:
    """The installed llama.cpp and its options, and the builds beside it that are there (`trace.llama_builds`)."""
    from aprjax.trace.llama_builds import installed_builds
    from aprjax.trace.llama_cpp import LlamaOptions, run_llama_cpp

    options = {
        "llama.cpp": LlamaOptions(),
        "llama.cpp, tiled (against llama.cpp)": LlamaOptions(tiled=True),
        "llama.cpp, float16 KV (against llama.cpp)": LlamaOptions(type_k="f16", type_v="f16"),
        "llama.cpp, float16 KV and flash attention (against llama.cpp)": LlamaOptions(
            type_k="f16", type_v="f16", flash_attention=True
        ),
        **{
            f"llama.cpp, {name} build (against llama.cpp)": LlamaOptions(tiled=True, repack=True, library=str(folder))
            for name, folder in installed_builds().items()
        },
    }
    return {
        name: lambda chosen=chosen: run_llama_cpp(checkpoint.path, tokens, chosen).values
        for name, chosen in options.items()
    }


def with_arithmetic(model: Qwen2, arithmetic: Arithmetic) -> Qwen2:
    """The same loaded weights under another arithmetic."""
    other = copy.copy(model)
    other.arithmetic = arithmetic
    return other


def batched(model: Qwen2, tokens: list[int]) -> Values:
    """Every stage of one forward pass over all tokens."""
    _, trace = model.run_with_cache(tokens)
    return {key: np.asarray(value) for key, value in trace.items()}


def stepwise(model: Qwen2, tokens: list[int]) -> Values:
    """Every stage when the tokens are fed one by one, with a KV cache: what decoding does."""
    arithmetic, config = model.arithmetic, model.config
    capacity, count = bucket(len(tokens)), len(tokens)
    rows: dict[tuple[int, Stage], list[np.ndarray]] = {}
    embedded = embed(model.checkpoint, tokens)
    with precision_scope(arithmetic):
        cache = Cache.empty(config, capacity, arithmetic.dtype)
        keys, values = list(cache.keys), list(cache.values)
        for position in range(count):
            hidden = jnp.asarray(embedded[position : position + 1]).astype(arithmetic.dtype)
            rows.setdefault((OUTSIDE, Stage.EMBEDDING), []).append(np.asarray(hidden))
            context = replace(
                causal_context(config, arithmetic, length=1, start=position),
                visible=jnp.arange(capacity)[None, :] <= position,
                start=jnp.asarray(position, jnp.int32),
            )
            for index, layer in enumerate(model.layers):
                here = replace(context, keys=keys[index], values=values[index])
                hidden, (keys[index], values[index]), captured = run_layer(
                    layer, hidden, here, {}, {}, arithmetic=arithmetic, capture=True
                )
                for stage in LAYER_STAGES:
                    value = np.asarray(captured[stage])
                    if stage in BY_KEY:
                        value = value.reshape(-1, capacity)[:, :count].reshape(1, -1)
                    rows.setdefault((index, stage), []).append(value)
            normed = run_norm(model.norm, hidden, arithmetic=arithmetic)
            logits = run_head(model.head, normed, arithmetic=arithmetic)
            rows.setdefault((OUTSIDE, Stage.FINAL_NORM), []).append(np.asarray(normed))
            rows.setdefault((OUTSIDE, Stage.LM_HEAD), []).append(np.asarray(logits))
    return {key: np.concatenate(parts) for key, parts in rows.items()}


def compare(name: str, changed: Values, base: Values) -> ChangeReport:
    """How far every stage is from what it was; stages that a side lacks are left out."""
    by_stage: dict[Stage, list[float]] = {}
    for (layer, stage), value in base.items():
        if (layer, stage) not in changed:
            continue
        far = relative_l2(visible_part(stage, changed[layer, stage]), visible_part(stage, value))
        by_stage.setdefault(stage, []).append(0.0 if far is None else far)
    head = (OUTSIDE, Stage.LM_HEAD)
    found = margins(changed[head], base[head], list(range(len(base[head])))) if head in changed else []
    return ChangeReport(
        name=name,
        stages={s: (float(np.median(by_stage[s])), max(by_stage[s])) for s in Stage if s in by_stage},
        logits_rel_l2=max(by_stage.get(Stage.LM_HEAD, []), default=None),
        rms_delta=max((m.rms_delta for m in found), default=None),
        max_delta=max((m.max_delta for m in found), default=None),
        max_kl=max((m.kl for m in found), default=None),
        flips=sum(m.flip for m in found),
        positions=len(found),
    )
