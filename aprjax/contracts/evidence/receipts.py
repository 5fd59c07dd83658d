"""What a check says in upstream's words: a parity receipt for every raw report of logits, and the gates of `apr qa`.

`check` keeps the reports of `margins` that its rules rest on (`aprjax.margins/1`). A receipt (`apr-parity-receipt/v2`)
is made of one of these and the bound that a test of the check put on its least cosine. What `margins` does not keep is
null in the rows, and listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aprjax.contracts.reading import Unreadable, parse_document
from aprjax.contracts.types import Status, TestOutcome, Threshold
from aprjax.contracts.upstream.qa import OUR_GATES, Gate, gates_of, qa_report
from aprjax.contracts.upstream.receipt import PERFECT, TOLERANCE, receipt, row_verdict

MARGINS = "aprjax.margins/1"
# Upstream's name for the output of `apr qa --json` (its evidence of SHIP-006).
QA_OUTPUT = "apr-qa-output.json"
FOLDER = "receipts"
# The measure that the contracts of output parity bound.
_MEASURE = "least_cosine"
_NOT_KEPT = "mean_abs_diff and cpk of each position: the raw report does not keep the mean difference"


def receipt_name(artifact: str) -> str:
    """Where the receipt of a raw report lies in the evidence folder."""
    return f"{FOLDER}/{artifact.removesuffix('.json')}.parity-receipt-v2.json"


def rows_of_margins(document: Any) -> list[dict[str, Any]] | None:
    """Upstream's rows from a report of `margins`; None where it is none, or a position has no numbers.

    Raises:
        KeyError, TypeError: it claims to be one, and is not.
    """
    if not isinstance(document, dict) or document.get("schema") != MARGINS or not document["tokens"]:
        return None
    rows = []
    for token in document["tokens"]:
        if token["cosine"] is None or token["model"] is None or token["ref"] is None:
            return None
        rms = token["rms_delta"]
        row = {
            "position": token["position"],
            "token_id": token["token"],
            "cpu_argmax": token["ref"]["top1"],
            "gpu_argmax": token["model"]["top1"],
            "max_abs_diff": token["max_delta"],
            "mean_abs_diff": None,
            "cosine_similarity": token["cosine"],
            "kl_divergence": token["kl"],
            "sigma_level": TOLERANCE / rms if rms else PERFECT,
            "cpk": None,
        }
        rows.append(row | {"verdict": row_verdict(row)})
    return rows


def receipts(
    raw: Mapping[str, Any],
    artifacts: Mapping[str, str],
    *,
    folder: str,
    host: Mapping[str, Any],
    versions: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The receipts of a check, by their names in its folder.

    Args:
        raw: the raw report, `aprjax.check/1`.
        artifacts: its raw files' texts, by name.
        folder: the evidence folder's name.
        host: see `facts.host_facts`.
        versions: see `facts.version_facts`.
    """
    found = {}
    for name, text in artifacts.items():
        bound = _bound(raw, name)
        if bound is None or bound.minimum is None:
            continue
        try:
            document = parse_document(text)
            rows = rows_of_margins(document)
        except (Unreadable, KeyError, TypeError):
            continue
        if rows is None:
            continue
        model, ref = (document["sides"][side] for side in ("model", "ref"))
        file = model["path"].replace("\\", "/").rpartition("/")[2]
        comparator, reason = _comparator(ref, versions)
        found[receipt_name(name)] = receipt(
            rows,
            model=file.rpartition(".")[0] or file,
            file=file,
            quant=_quantization(file),
            sha256=model["sha256"] or None,
            threshold=bound.minimum,
            threshold_source=f"evidence/{folder}/check.json",
            comparator=comparator,
            host=f"{host['cpu']}, {host['cores']} cores, {host['platform']}",
            backend="cpu",
            version=f"aprjax {versions['aprjax']}",
            generated_at=raw["started"],
            provenance={
                "record": f"evidence/{folder}/raw/{name}",
                "command": raw["command"],
                "model_arithmetic": model["arithmetic"],
                "ref_arithmetic": ref["arithmetic"],
                "threshold_basis": bound.basis,
                "git_commit": versions["git_commit"],
                "rows": "the reference stands as cpu, the model as gpu",
            },
            unmeasured=[_NOT_KEPT, *reason],
        )
    return found


def _quantization(file: str) -> str:
    """What a file's name says of its block types, as upstream's receipts have it."""
    found = re.search(r"(?:^|[-_.])(i?q\d(?:_[0-9a-z]+)*|b?f16|f32)(?=[-.]|$)", file, re.IGNORECASE)
    return found[1].upper() if found else "unknown"


def _bound(raw: Mapping[str, Any], artifact: str) -> Threshold | None:
    """The bound that a test which rests on the raw file puts on its least cosine: the strictest of them."""
    bounds = [
        Threshold(**{key: threshold[key] for key in ("measure", "basis", "minimum")})
        for outcome in raw["outcomes"]
        if artifact in outcome["artifacts"]
        for threshold in outcome["thresholds"]
        if threshold["measure"] == _MEASURE and threshold.get("minimum") is not None
    ]
    return max(bounds, key=lambda bound: bound.minimum or 0.0, default=None)


def _comparator(ref: Mapping[str, Any], versions: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Who the model is compared with, in upstream's words, and what that leaves unmeasured."""
    if "(live)" in ref["arithmetic"] and "llama.cpp" in ref["arithmetic"]:
        version = versions["packages"].get("llama-cpp-python") or "of unknown version"
        return {"kind": "llama_cpp", "comparator_sha": f"llama-cpp-python {version}, {ref['arithmetic']}"}, []
    if ref["arithmetic"].startswith("transformers"):
        version = versions["packages"].get("transformers") or "of unknown version"
        return {"kind": "transformers", "comparator_sha": f"transformers {version}"}, []
    reason = "Both sides are computed by aprjax: two files or two arithmetics, and no other engine"
    return {"kind": "self", "reason": f"{reason} ({ref['arithmetic']})."}, ["ORACLE ARM: not measured; see comparator"]


def qa_gates(raw: Mapping[str, Any]) -> dict[str, Gate] | None:
    """Upstream's gates from a raw report; None where none of their tests was checked."""
    ids = {test_id for wanted in OUR_GATES.values() for test_id in wanted}
    outcomes = [
        TestOutcome(o["contract_id"], o["test_id"], Status(o["status"]), o["reason"], seconds=o["seconds"])
        for o in raw["outcomes"]
        if o["test_id"] in ids
    ]
    return gates_of(outcomes) if outcomes else None


def qa_document(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of `apr qa` that a check makes up; None where no gate's test was checked."""
    gates = qa_gates(raw)
    if gates is None:
        return None
    model = raw["sides"].get("model", {}).get("path", "")
    return qa_report(model.replace("\\", "/").rpartition("/")[2], gates).to_json()
