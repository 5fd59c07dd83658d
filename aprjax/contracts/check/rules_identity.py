"""What a trace is: its values, layers, positions, order and tokens are those that it claims."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from aprjax.bisect.explain.identity import identify
from aprjax.bisect.explain.identity_finding import IdentityFinding
from aprjax.bisect.open_sides import run_side
from aprjax.bisect.traced import Traced
from aprjax.contracts.check.bench import Bench
from aprjax.contracts.check.measurement import Asked, Measurement, measures
from aprjax.contracts.check.rules_trace import TOKENS
from aprjax.trace.aprt import SIDECAR
from aprjax.trace.aprt_writer import write_aprt
from aprjax.trace.sides import run_checkpoint


def _findings(bench: Bench, name: str) -> tuple[str, tuple[IdentityFinding, ...]]:
    """What the side's trace is said to be, and what it is instead."""
    side, arithmetic = bench.side(name), bench.run_by[0 if name == "model" else 1]
    if side.side.recorded is not None:
        # The file that it was made from, or the one that it claims to have run.
        file = side.checkpoint or bench.checkpoint("ref" if name == "model" else "model")
        return "recorded", identify(side.side.recorded, file, arithmetic=arithmetic)
    tokens = tuple(bench.prompt("direct").ids[:TOKENS])
    if side.runs_here:
        # As upstream leaves a dump: bare numbers and a provenance, without a word on shapes and positions.
        file, folder = bench.checkpoint(name), Path(bench.keep_folder()) / "dump"
        write_aprt(run_checkpoint(file, list(tokens), arithmetic), folder)
        (folder / SIDECAR).unlink()
        return "as dumped by aprjax", identify(folder, file, arithmetic=arithmetic)
    with ExitStack() as stack:
        live = run_side(side, tokens, arithmetic, stack)
        assert isinstance(live, Traced)
        return f"traced by {side.side.kind}", identify(live.trace, bench.checkpoint(name), arithmetic=arithmetic)


@measures("APRJAX-TRACE-001")
def is_what_it_says(asked: Asked) -> Measurement:
    """Both sides' traces: nothing was taken elsewhere, of other layers, positions or tokens, or in another order."""
    bench = asked.bench
    # Beside a recorded trace a file that runs here is what that trace is held against.
    recorded = [name for name in ("model", "ref") if bench.side(name).side.recorded is not None]
    names = recorded or (["ref"] if bench.same_computation else ["model", "ref"])
    found = {name: bench.once(("identity", name), lambda name=name: _findings(bench, name)) for name in names}
    document = {name: {"trace": what, "findings": [f.to_json() for f in told]} for name, (what, told) in found.items()}
    artifact = bench.keep("identity.json", document)
    told = [(name, finding) for name, (_, findings) in found.items() for finding in findings]
    shared = " (the same bytes under one arithmetic: one trace)" if not recorded and len(names) == 1 else ""
    return Measurement(
        {
            "mislabelled": len(told),
            "forbid_a_comparison": sum(finding.severity == "error" for _, finding in told),
            "traces": len(found),
        },
        "; ".join(f"{name}: {finding.id}: {finding.sentence}" for name, finding in told)
        or ", ".join(f"{name} {what}" for name, (what, _) in found.items()) + shared,
        artifacts=(artifact,),
    )
