"""The gates of `apr qa` on the model, tri-state, and the criterion that all eight of them pass (SHIP-006)."""

from __future__ import annotations

from aprjax.bisect.report import Verdict
from aprjax.checkpoint.types import Checkpoint
from aprjax.contracts.check.measurement import RULES, Asked, Measurement, measures
from aprjax.contracts.types import Status

# The eight of AC-SHIP1-006, in upstream's order (apr-model-qa-v1, contracts.md 1.3).
GATES = (
    *("golden_output", "throughput", "ollama_parity", "gpu_speedup"),
    *("tensor_contract", "format_parity", "ptx_parity", "metadata_plausibility"),
)
# contracts.md section 5: plausible ranges of a Qwen's metadata.
ROPE_THETA_LEAST = 100_000
CONTEXT = (128, 1_048_576)
EPSILON_MOST = 0.01
_NOT_HERE = {
    "throughput": "speed is not what `check` measures, and a shared machine's says nothing",
    "ollama_parity": "ollama is not here",
    "gpu_speedup": "no GPU",
    "ptx_parity": "no CUDA kernels here",
}


def _metadata(file: Checkpoint) -> list[str]:
    config, found = file.config, []
    if config.rope_theta < ROPE_THETA_LEAST:
        found.append(f"rope_theta {config.rope_theta:g}, a Qwen's is {ROPE_THETA_LEAST} at least")
    if not CONTEXT[0] <= config.max_position_embeddings <= CONTEXT[1]:
        found.append(f"max_position_embeddings {config.max_position_embeddings}")
    if not 0 < config.rms_norm_eps <= EPSILON_MOST:
        found.append(f"rms_norm_eps {config.rms_norm_eps:g}")
    return found


@measures("APRJAX-QA-METADATA")
def plausible_metadata(asked: Asked) -> Measurement:
    """Rotation base, context and epsilon lie where a Qwen's do."""
    found = _metadata(asked.bench.checkpoint("model"))
    return Measurement({"implausible": len(found)}, "; ".join(found) or "rope_theta, context and epsilon")


@measures("APRJAX-QA-FORMAT")
def formats_choose_alike(asked: Asked) -> Measurement:
    """Both formats choose the same token after the ChatML probe, or are in a near-tie."""
    report = asked.bench.traced("chatml").report
    if not report.margins:
        return Measurement(unmeasured=report.reason)
    last = report.margins[-1]
    near = report.verdict in (Verdict.AGREE, Verdict.NEAR_TIE)
    return Measurement(
        {"argmax_equal_or_near_tie": not last.flip or near},
        f"the model chooses {last.model.top1}, the reference {last.ref.top1}",
    )


@measures("FALSIFY-QA-SHIP-006")
def all_eight_gates(asked: Asked) -> Measurement:
    """Pass only if all eight gates were executed, and passed; one that could not be executed has not passed."""
    gates: dict[str, tuple[Status, str]] = {}
    for name, rule_id in (
        ("golden_output", "APRJAX-GOLDEN-001"),
        ("tensor_contract", "APRJAX-FORMAT-004"),
        ("format_parity", "APRJAX-QA-FORMAT"),
        ("metadata_plausibility", "APRJAX-QA-METADATA"),
    ):
        gates[name] = _gate(RULES[rule_id](asked))
    gates |= {name: (Status.UNMEASURED, reason) for name, reason in _NOT_HERE.items()}
    artifact = asked.bench.keep(
        "qa-gates.json", [{"name": n, "status": str(gates[n][0]), "message": gates[n][1]} for n in GATES]
    )
    failed = [name for name in GATES if gates[name][0] is Status.FAIL]
    if failed:
        return Measurement(failed=f"{failed[0]}: {gates[failed[0]][1]}", artifacts=(artifact,))
    open_ones = [name for name in GATES if gates[name][0] is Status.UNMEASURED]
    passed = len(GATES) - len(open_ones)
    measured = {"passed": passed, "gates": len(GATES)}
    if open_ones:
        why = "; ".join(f"{name}: {gates[name][1]}" for name in open_ones)
        return Measurement(measured, unmeasured=f"{passed} of 8 gates pass, {why}", artifacts=(artifact,))
    return Measurement(measured, "all eight were executed", artifacts=(artifact,))


# What each gate's rule must have measured for the gate to pass: no refused answer, no missing tensor, …
_CLEAN = {
    "refused_answers": 0,
    "missing": 0,
    "wrong_shapes": 0,
    "argmax_equal_or_near_tie": True,
    "implausible": 0,
}


def _gate(found: Measurement) -> tuple[Status, str]:
    if found.unmeasured:
        return Status.UNMEASURED, found.unmeasured
    if found.failed:
        return Status.FAIL, found.failed
    bad = [name for name, clean in _CLEAN.items() if name in found.measured and found.measured[name] != clean]
    return (Status.FAIL if bad else Status.PASS), found.reason
