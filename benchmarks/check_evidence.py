"""The evidence of a check of a real pair, as `check --evidence` writes it, with a page made of its raw report.

    python benchmarks/check_evidence.py --out evidence

Converts the official file to `.apr` and checks the contracts below on the pair, both by llama.cpp's arithmetic; the
folder is `evidence/check-DATE`. Evidence of a source that was changed since its commit moves no contract: run it on a
clean checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "qwen2.5-coder-0.5b"
# What speaks of two files of one model, and takes some minutes: forward parity, formats, what traces are.
CONTRACTS = ("apr-vs-gguf-forward-parity-v1", "format-parity-v1", "trace-identity-v1")


def main() -> int:
    """Checks, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, required=True, help="the folder that evidence folders lie in")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="only the page of a folder that is there")
    options = parser.parse_args()
    folder = options.page or checked(options.model, options.out.resolve())
    (folder / "README.md").write_text(readme(found_in(folder)), encoding="utf-8")
    # The page is of the folder, and the manifest names every file.
    return aprjax("evidence", "--seal", str(folder)).returncode


def checked(model: str, out: Path) -> Path:
    """The folder that `check --evidence` writes."""
    from aprjax.checkpoint.convert import convert
    from aprjax.checkpoint.fetch import fetch

    official = Path(fetch(model, None, lambda what, done, total: None)).resolve()
    before = set(out.glob("check-*"))
    with tempfile.TemporaryDirectory(prefix="aprjax-") as name:
        folder = Path(name)
        (folder / official.name).symlink_to(official)
        convert(folder / official.name, folder / "A.apr")
        sides = ("--model", "A.apr", "--ref", official.name)
        run = aprjax("check", *CONTRACTS, *sides, "--evidence", str(out), cwd=folder)
    if run.returncode not in (0, 1, 3):
        raise SystemExit(f"error: check ended with exit code {run.returncode}")
    (found,) = set(out.glob("check-*")) - before
    return found


def aprjax(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    """One command of aprjax."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", "aprjax", *words], cwd=cwd, env=env, check=False)


def found_in(folder: Path) -> dict[str, Any]:
    """The raw report of a folder."""
    return json.loads((folder / "check.json").read_text(encoding="ascii"))


def readme(report: dict[str, Any]) -> str:
    """What the report says."""
    counts: dict[str, int] = {}
    for one in report["outcomes"]:
        counts[one["status"]] = counts.get(one["status"], 0) + 1
    lines = [
        "# A check of a real pair",
        "",
        "    python benchmarks/check_evidence.py --out evidence",
        "",
        "on a clean checkout writes this folder: what `check --evidence` leaves",
        "([docs/upstream.md](../../docs/upstream.md) has its files), and this page, which is made of",
        "[check.json](check.json) (`tests/evidence/test_check_evidence.py` holds that). `python -m aprjax evidence`",
        "examines the folder; with `--discharge CONTRACT` it moves the statuses of a contract's file.",
        "",
        f"`{report['command']}`: {', '.join(f'{number} {status}' for status, number in counts.items())}, in",
        f"{report['seconds']:.0f} seconds beside other work.",
        "",
        "| side | file | SHA-256 | bytes | arithmetic |",
        "|---|---|---|---:|---|",
    ]
    for name, side in report["sides"].items():
        lines.append(f"| {name} | {side['text']} | `{side['sha256']}` | {side['nbytes']} | {side['arithmetic']} |")
    lines += ["", "| test | status | reason |", "|---|---|---|"]
    for one in report["outcomes"]:
        reason = " ".join(one["reason"].split()).replace("|", "&#124;").replace("<", "&lt;")
        lines.append(f"| `{one['test_id']}` | {one['status']} | {reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
