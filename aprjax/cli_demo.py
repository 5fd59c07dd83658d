"""The command `demo`: a planted fault in the embedded model, found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import INTERNAL_ERROR, command
from aprjax.demo_fault import DemoFault


@command
def demo(
    *,
    fault: Annotated[DemoFault, typer.Option(help="What is planted.")] = DemoFault.GATE_UP_SWAPPED,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The faulty file and the report go here.")] = Path(
        "out/demo"
    ),
) -> int:
    """Plant a fault in the model that aprjax carries, find it, and write the report: seconds, nothing is fetched."""
    from aprjax.bisect.layers.command import run_layers
    from aprjax.checkpoint.types import CheckpointError
    from aprjax.demo import PLANS, PROBES, missed, prepare

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot make the folder: {error.strerror}", file=out, fix="choose another --out"
        ) from None
    model, ref = prepare(fault, out)
    # From a clone, as a reader would type it; wherever else aprjax is installed, in full.
    ref = ref.relative_to(Path.cwd()) if ref.is_relative_to(Path.cwd()) else ref
    words = PLANS[fault].words
    print(f"Planted: {words}.", flush=True)
    run_layers(model=str(model), ref=str(ref), json_out=str(out / "layers.json"), report=out / "report", probes=PROBES)
    wrong = missed(fault, json.loads((out / "layers.json").read_text(encoding="utf-8")))
    if wrong:
        print(f"error: a fault in aprjax itself: planted was {words}; {'; '.join(wrong)}", file=sys.stderr)
        return INTERNAL_ERROR
    print(f"\nFound where it was planted: {words}." if PLANS[fault].site else "\nBoth agree, as they should.")
    print(f"Go on with the same two files, for instance:\n  python -m bisect locate --model {model} --ref {ref}")
    return 0
