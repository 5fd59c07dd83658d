"""Reports for the page's tests: real ones that were saved, and made-up ones of any size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.bisect.confidence import Confidence, Level
from aprjax.bisect.metrics import UNMEASURED, Distance
from aprjax.bisect.report import (
    FirstDivergence,
    LayerReport,
    LayersReport,
    MarginReport,
    PromptInfo,
    SidedFinding,
    SideInfo,
    SideMargin,
    StageReport,
    Verdict,
)
from aprjax.bisect.spread import Spread
from aprjax.qwen2.stages import LAYER_STAGES, OUTSIDE, Stage

# Written by the commands on the 0.5B model, two feed-forward matrices of layer 9 exchanged, then cut to a few layers.
SAVED = Path(__file__).with_name("saved")
COMMANDS = tuple(sorted(path.stem for path in SAVED.glob("*.json")))
FAULT = (9, Stage.FFN_GATE)
LACKING = Stage.FFN_SILU


def saved(command: str) -> dict[str, Any]:
    return json.loads((SAVED / f"{command}.json").read_text(encoding="utf-8"))


def _spread(generator: np.random.Generator, level: float, positions: int, width: int) -> Spread:
    logs = np.log2(level) + generator.normal(0, 0.3, positions)
    groups = generator.dirichlet(np.ones(64))
    channels = tuple((int(c), 0.01) for c in generator.integers(0, width, 8))
    return Spread(logs.astype("<f2").tobytes(), channels, groups.astype("<f2").tobytes(), width)


def _stage(generator: np.random.Generator, positions: int, *, guilty: bool, after: bool) -> StageReport:
    local = 0.7 if guilty else float(10 ** generator.uniform(-7.2, -6.1))
    free = 0.8 if guilty else (float(10 ** generator.uniform(-2, -0.5)) if after else 1.2 * local)
    ratio = 1 + 0.6 * free * generator.uniform(-1, 1)
    distance = Distance(ratio, ratio, 1 - free**2 / 2, free, 3 * free, (positions - 1, 190), free / 2, free / 4, 4864)
    spreads = {
        "free": _spread(generator, free, positions, 4864),
        "local": _spread(generator, local, positions, 4864),
    }
    return StageReport(distance, local, 8e-7, spreads=spreads)


def made_up(
    *, verdict: Verdict = Verdict.DIVERGENCE, layers: int = 28, positions: int = 511, name: str = "long"
) -> LayersReport:
    """A `layers` report as large as asked for. The model's trace lacks `LACKING` where the verdict is unmeasured."""
    generator = np.random.default_rng(7)
    diverges = verdict is Verdict.DIVERGENCE
    found = []
    for layer in range(layers):
        stages = {}
        for stage in LAYER_STAGES:
            after = diverges and (layer, LAYER_STAGES.index(stage)) > (FAULT[0], LAYER_STAGES.index(FAULT[1]))
            stages[stage] = _stage(generator, positions, guilty=diverges and (layer, stage) == FAULT, after=after)
            if verdict is Verdict.UNMEASURED or stage is LACKING:
                stages[stage] = StageReport(UNMEASURED, None, unmeasured="the model's trace lacks this stage")
        found.append(LayerReport(layer, stages))
    outside = {s: _stage(generator, positions, guilty=False, after=False) for s in (Stage.EMBEDDING, Stage.LM_HEAD)}
    margins = []
    for position in range(positions if verdict is not Verdict.UNMEASURED else 0):
        flip = diverges and position % 9 == 4
        gap = float(generator.uniform(0.01, 3)) if flip else 0.0
        ours, theirs = SideMargin(17 if flip else 16, 18, 0.5), SideMargin(16, 17, max(gap, 0.02))
        margins.append(MarginReport(position, ours, theirs, flip, gap, 0.01, 0.2, 0.9))
    first = None
    if diverges:
        sure = Confidence(Level.CERTAIN, "the prediction is met bit for bit (all values)")
        first = FirstDivergence(*FAULT, "gate_proj holds up_proj's values", "convert the model again", sure)
    return LayersReport(
        verdict=verdict,
        reason={Verdict.AGREE: "no stage differs by more than rounding explains"}.get(verdict, "the values differ"),
        first_divergence=first,
        sides={
            "model": SideInfo("models/model.apr", "a" * 64, "apr", "llama.cpp"),
            "ref": SideInfo("models/ref.gguf", "b" * 64, "gguf", "llama.cpp"),
        },
        prompt=PromptInfo(name, "the " * positions, "none", (16,) * positions, tuple(range(positions))),
        findings=(SidedFinding("files-compared", "info", "all tensors hold identical bytes", side="both"),),
        layers=(LayerReport(OUTSIDE, outside), *found) if verdict is not Verdict.UNMEASURED else tuple(found),
        margins=tuple(margins),
        noise={"method": "measured", "factor": 8, "layers": [0], "rel_l2": {"ffn_gate": 1e-7}},
        seconds={"layers": 12.5},
        token_texts={16: " the", 17: " a", 18: "</script>"},
    )


def made_up_json(**options: Any) -> dict[str, Any]:
    return json.loads(json.dumps(made_up(**options).to_json(), allow_nan=False))


def one_stage_less(report: LayersReport) -> LayersReport:
    """A stage that the report does not even mention."""
    layer = report.layers[1]
    stages = {stage: found for stage, found in layer.stages.items() if stage is not Stage.ATTN_OUT}
    return replace(report, layers=(report.layers[0], replace(layer, stages=stages), *report.layers[2:]))


def explained() -> dict[str, Any]:
    """An `explain` report by hand: one mistake of identity, one explanation, one node that is left."""
    sure = {"level": "strong", "basis": "residual 2e-6 against 1e-6 that rounding explains"}
    return {
        "schema": "aprjax.explain/1",
        "verdict": "divergence",
        "reason": "rope_theta = 10 000 ± 3 instead of 1 000 000",
        "explained": False,
        "trace": {"path": "trace.safetensors", "sha256": "c" * 64, "arithmetic": "float32"},
        "file": {"path": "ref.gguf", "sha256": "d" * 64, "format": "gguf"},
        "arithmetic": "float32",
        "tokens": 11,
        "identity": [
            {
                "id": "capture-point",
                "severity": "error",
                "sentence": "qkv_bias was captured before the bias",
                "next_step": "capture after the bias",
                "confidence": sure,
                "stages": ["qkv_bias"],
                "layers": [0, 1],
                "evidence": {},
            }
        ],
        "explanations": [
            {
                "id": "rope-theta",
                "kind": "config",
                "sentence": "rope_theta = 10 000 ± 3 instead of 1 000 000",
                "next_step": "set rope_theta in the engine",
                "parameters": {"theta": {"value": 10000.4, "error": 3.1, "file": 1e6}, "axis": "row"},
                "everywhere": True,
                "layers": [0, 1, 2, 3],
                "stages": ["q_post_rope", "k_post_rope"],
                "nodes": [{"layer": 0, "stage": "q_post_rope"}],
                "before": 0.3,
                "residual": 2e-6,
                "tolerance": 1e-6,
                "complete": False,
                "confidence": sure,
                "rivals": [{"id": "position-offset", "residual": 0.2, "sentence": ""}],
            }
        ],
        "unexplained": [
            {
                "layer": 3,
                "stage": "ffn_out",
                "reason": "channel 7 is not a number",
                "before": None,
                "tolerance": None,
                "excluded": [{"id": "scaled", "residual": 0.9, "sentence": ""}],
                "like": None,
            }
        ],
        "counts": {"exact": 20, "unexplained": 3},
        "findings": [],
        "seconds": {"search": 3.2},
    }


def checked() -> dict[str, Any]:
    """A `check` report by hand: a pass, a failure, and one unmeasured."""
    outcomes = [
        {
            "contract_id": "forward-parity-v1",
            "test_id": f"F-{number}",
            "status": status,
            "reason": f"the ratio is {number}.25",
            "rule": "every ratio lies within the band",
            "measured": {"worst_ratio": 1.25, "layers": 28, "side": "model"},
            "thresholds": [],
            "threshold": "0.5 ≤ worst_ratio ≤ 2",
            "basis": "contracts.md 1.3",
            "command": "",
            "seconds": 0.1,
            "artifacts": ["layers.json"],
        }
        for number, status in enumerate(("pass", "fail", "unmeasured"))
    ]
    return {
        "schema": "aprjax.check/1",
        "passed": 1,
        "failed": 1,
        "unmeasured": 1,
        "allowed_unmeasured": [],
        "exit_code": 1,
        "sides": {"model": {"path": "a.apr", "sha256": None, "format": "apr", "arithmetic": "float32"}},
        "contracts": [{"id": "forward-parity-v1", "version": "1.0.0", "kind": "kernel", "status": None}],
        "outcomes": outcomes,
        "command": "aprjax check",
        "started": "2026-11-23T10:00:00Z",
        "seconds": 0.3,
    }


def every_report() -> list[dict[str, Any]]:
    """One of each command."""
    return [*map(saved, COMMANDS), explained(), checked()]
