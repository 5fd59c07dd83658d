"""`apr-parity-receipt/v2` (contracts.md section 6): a row per position of two engines' logits, and what is unmeasured.

The numbers are those of upstream's `apr parity --json` (`parity.rs`, `SpcMetrics`), whose sides are called `cpu` and
`gpu`: the reference stands as `cpu`, the model as `gpu`. The rules are those of upstream's `parity-receipt-v2.yaml`
(PRC-INV-001 to 005).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from aprjax.contracts.reading import Unreadable, expect

SCHEMA = "apr-parity-receipt/v2"
BACKENDS = ("cpu", "cuda", "wgpu", "metal")
COMPARATORS = ("llama_cpp", "transformers", "self")
# Upstream's constants (parity.rs after PMAT-919): the unit of sigma and Cpk, and the bounds of a row's verdict.
TOLERANCE = 4.0
COSINE_MIN, COSINE_CATASTROPHIC = 0.95, 0.9
# An rms below this counts as none: upstream calls that row perfect, with the Cpk and sigma of `PERFECT`.
_NO_DIFFERENCE, PERFECT = 1e-10, 99.9
# Upstream judges no receipt of fewer positions (evidence/parity/thresholds.yaml, rule I8).
MIN_POSITIONS = 64
_FAILS = ("FailDivergent", "FailCatastrophic", "FailNan")
_VERDICTS = ("Pass", "WarnArgmax", "WarnOutOfSpec", *_FAILS)


def parity_rows(
    ref: Float[np.ndarray, "positions vocabulary"],
    model: Float[np.ndarray, "positions vocabulary"],
    tokens: Sequence[int],
    positions: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Upstream's metrics of each position; sums are taken in float64.

    Args:
        ref: the reference's logits.
        model: the model's.
        tokens: the tokens fed at these positions.
        positions: of the rows; by default from 0.

    Raises:
        ValueError: the sides differ in shape, or tokens are not one per row: nothing can be compared.
    """
    places = list(range(len(ref))) if positions is None else list(positions)
    if ref.shape != model.shape or len(tokens) != len(ref) or len(places) != len(ref):
        raise ValueError(f"expected one token per row of equal shapes, found {ref.shape}, {model.shape}, {len(tokens)}")
    return [
        _row(np.asarray(a, np.float64), np.asarray(b, np.float64), int(token), int(place))
        for a, b, token, place in zip(ref, model, tokens, places, strict=True)
    ]


def _row(ref: np.ndarray, model: np.ndarray, token: int, position: int) -> dict[str, Any]:
    finite = bool(np.isfinite(ref).all() and np.isfinite(model).all())
    row: dict[str, Any] = {"position": position, "token_id": token}
    if not finite:
        names = ("cpu_argmax", "gpu_argmax", "max_abs_diff", "mean_abs_diff", "cosine_similarity", "kl_divergence")
        return row | dict.fromkeys((*names, "sigma_level", "cpk")) | {"verdict": "FailNan"}
    difference = np.abs(ref - model)
    mean, rms = float(difference.mean()), float(np.sqrt(np.mean(difference**2)))
    norms = float(np.linalg.norm(ref) * np.linalg.norm(model))
    row |= {
        "cpu_argmax": int(ref.argmax()),
        "gpu_argmax": int(model.argmax()),
        "max_abs_diff": float(difference.max()),
        "mean_abs_diff": mean,
        "cosine_similarity": float(ref @ model) / norms if norms else 0.0,
        "kl_divergence": _kl(ref, model),
        "sigma_level": PERFECT if rms < _NO_DIFFERENCE else TOLERANCE / rms,
        "cpk": PERFECT if rms < _NO_DIFFERENCE else (TOLERANCE - mean) / (3 * rms),
    }
    return row | {"verdict": row_verdict(row)}


def row_verdict(row: dict[str, Any]) -> str:
    """Upstream's verdict of a row from its numbers."""
    if row["cosine_similarity"] is None:
        return "FailNan"
    if row["cosine_similarity"] < COSINE_CATASTROPHIC:
        return "FailCatastrophic"
    if row["cosine_similarity"] < COSINE_MIN:
        return "FailDivergent"
    if row["max_abs_diff"] > TOLERANCE:
        return "WarnOutOfSpec"
    return "Pass" if row["cpu_argmax"] == row["gpu_argmax"] else "WarnArgmax"


def _kl(ref: np.ndarray, model: np.ndarray) -> float:
    """KL(softmax(ref) || softmax(model)) in nats."""
    log_p, log_q = (logits - logits.max() for logits in (ref, model))
    log_p, log_q = (logits - np.log(np.exp(logits).sum()) for logits in (log_p, log_q))
    return float(max(np.sum(np.exp(log_p) * (log_p - log_q)), 0.0))


def receipt(
    rows: Sequence[dict[str, Any]],
    *,
    model: str,
    file: str,
    quant: str,
    sha256: str | None,
    threshold: float,
    threshold_source: str,
    comparator: dict[str, str],
    host: str,
    backend: str,
    version: str,
    generated_at: str,
    provenance: dict[str, Any],
    unmeasured: Sequence[str] = (),
) -> dict[str, Any]:
    """A receipt.

    Args:
        rows: see `parity_rows`.
        model: the model's name, as upstream's manifest has it.
        file: the file's name.
        quant: `Q4_K_M`, ….
        sha256: of the file; None is listed as not measured.
        threshold: the least cosine that passes.
        threshold_source: the file that it comes from, from the repository's root.
        comparator: `{"kind": "llama_cpp", "comparator_sha": …}`, `{"kind": "self", "reason": …}`, ….
        host: the machine in words; no name.
        backend: one of `BACKENDS`.
        version: of what was measured.
        generated_at: UTC, ISO 8601.
        provenance: command, raw file, versions.
        unmeasured: what was not measured; `none` is written where there is nothing.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("a receipt without a position receipts nothing")
    missing = [*unmeasured, *(["model_sha256: the file's digest is not known"] if sha256 is None else [])]
    if len(rows) < MIN_POSITIONS:
        missing.append(f"{len(rows)} positions, and upstream judges none of fewer than {MIN_POSITIONS}")
    failed = sum(row["verdict"] in _FAILS for row in rows)
    raw = {
        "model": file,
        "tokens": len(rows),
        "passed": len(rows) - failed,
        "failed": failed,
        "parity": not failed,
        "metrics": list(rows),
    }
    return {
        "schema": SCHEMA,
        "cell": {"model": model, "file": file, "quant": quant, **({} if sha256 is None else {"model_sha256": sha256})},
        "host": host,
        "backend": backend,
        "apr_version": version,
        "generated_at": generated_at,
        "comparator": dict(comparator),
        "partially_receipted": bool(missing),
        "threshold_source": threshold_source,
        "unmeasured": missing or ["none"],
        "provenance": provenance,
        "result": _result(raw, threshold),
        "raw": raw,
    }


def _result(raw: dict[str, Any], threshold: float) -> dict[str, Any]:
    """The verdict by upstream's judge: enough positions, none below the threshold."""
    known = [row for row in raw["metrics"] if row["cosine_similarity"] is not None]
    worst = min(known, key=lambda row: row["cosine_similarity"], default=None)
    enough = len(known) >= MIN_POSITIONS
    kept = worst is not None and len(known) == len(raw["metrics"]) and worst["cosine_similarity"] >= threshold
    return {
        "positions": len(raw["metrics"]),
        "parity": raw["parity"],
        "passed": raw["passed"],
        "failed": raw["failed"],
        "min_cosine": None if worst is None else worst["cosine_similarity"],
        "min_cosine_position": None if worst is None else worst["position"],
        "threshold": threshold,
        "verdict": "FAIL" if not kept else "PASS" if enough else "UNMEASURED",
        "judged_by": f"min cosine over >= {MIN_POSITIONS} positions >= threshold (aprjax)",
    }


def receipt_problems(document: Any, folder: Path) -> list[str]:
    """Where a receipt breaks a rule of its contract, or contradicts its own raw rows.

    Args:
        document: the JSON.
        folder: the evidence folder; `threshold_source` is looked for in it and in the folders above.
    """
    try:
        return list(_problems(document, folder))
    except (Unreadable, TypeError, KeyError) as error:
        return [str(error)]


def _problems(document: Any, folder: Path) -> Iterator[str]:
    for key in ("host", "backend", "apr_version", "generated_at", "threshold_source"):
        if not expect(document, key, str):
            yield f"{key} is empty"
    if document["backend"] not in BACKENDS:
        yield f"the backend {document['backend']!r:.40} is none of {', '.join(BACKENDS)}"
    missing = expect(document, "unmeasured", list)
    if not missing:
        yield "unmeasured is empty: that nothing is missing is written as `none`"
    if expect(document, "partially_receipted", bool) != (missing not in ([], ["none"])):
        yield "partially_receipted contradicts what is listed as unmeasured"
    sha256 = expect(document, "cell", dict).get("model_sha256")
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(sha256)):
        yield "model_sha256 is no 64 lower-case hex digits"
    comparator = expect(document, "comparator", dict)
    kind = expect(comparator, "kind", str)
    if kind not in COMPARATORS:
        yield f"the comparator {kind!r:.40} is none of {', '.join(COMPARATORS)}"
    if kind == "self" and (not comparator.get("reason") or "comparator_sha" in comparator):
        yield "a comparison with itself says why, and names no other binary (PRC-INV-002, 003)"
    if kind != "self" and not comparator.get("comparator_sha"):
        yield "an oracle is named by comparator_sha (PRC-INV-004)"
    source = document["threshold_source"]
    inside = folder / source.removeprefix(f"evidence/{folder.name}/")
    above = [parent / source for parent in [folder, *folder.resolve().parents][:6]]
    if (
        ".." in Path(source).parts
        or Path(source).is_absolute()
        or not any(place.is_file() for place in [inside, *above])
    ):
        yield f"threshold_source {source!r:.120} names no file (PRC-INV-005)"
    yield from _raw_problems(expect(document, "raw", dict), expect(document, "result", dict))


def _raw_problems(raw: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    rows = expect(raw, "metrics", list)
    for row in rows:
        expect(row, "position", int)
        expect(row, "cosine_similarity", int, float, type(None))
        if expect(row, "verdict", str) not in _VERDICTS:
            yield f"position {row['position']} has the verdict {row['verdict']!r:.40}, which is none"
        elif (row["verdict"] in _FAILS) != (row_verdict(row) in _FAILS):
            yield f"position {row['position']} is called {row['verdict']}, and its numbers make it {row_verdict(row)}"
    positions = [row["position"] for row in rows]
    if len(set(positions)) != len(positions):
        yield "a position is there twice"
    failed = sum(row["verdict"] in _FAILS for row in rows)
    truth = {"tokens": len(rows), "passed": len(rows) - failed, "failed": failed, "parity": not failed}
    for key, value in truth.items():
        if raw.get(key) != value:
            yield f"raw.{key} is {raw.get(key)!r:.40}, and its rows come to {value}"
    threshold = expect(result, "threshold", int, float)
    expected = _result({**raw, **truth}, threshold)
    for key in ("positions", "parity", "passed", "failed", "min_cosine", "min_cosine_position"):
        if result.get(key) != expected[key]:
            yield f"result.{key} is {result.get(key)!r:.60}, and the rows come to {expected[key]!r:.60}"
    if expect(result, "verdict", str) != expected["verdict"]:
        yield f"the verdict is {result['verdict']!r:.40}, and the rows come to {expected['verdict']}"
