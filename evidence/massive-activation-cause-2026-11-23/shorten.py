"""Shortens reports of `attribute` and `locate` for keeping: names for paths, the largest contributions, no wall times.

python evidence/massive-activation-cause-2026-11-23/shorten.py REPORT.json KEPT.json

The README beside this file has the commands that make the reports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# The others of 201 make less than a thousandth of the change each.
KEPT = 24


def main() -> None:
    """Reads one report, writes what is kept of it."""
    source, target = map(Path, sys.argv[1:])
    report = json.loads(source.read_text(encoding="utf-8"))
    for side in report["sides"].values():
        side["path"] = Path(side["path"]).name
    report.pop("seconds")
    if "contributions" in report:
        report["contributions_left_out"] = max(0, len(report["contributions"]) - KEPT)
        report["contributions"] = report["contributions"][:KEPT]
    target.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
