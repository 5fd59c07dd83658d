"""Makes `python -m bisect` the toolkit in every environment where aprjax is installed.

From a folder other than the repository's root Python would find the standard library's `bisect` first,
run it, print nothing and exit 0: a missed divergence in somebody's CI. An installation (editable or not)
therefore puts a copy of this file, `_aprjax_front_door.py`, and one start-up line,
`aprjax_front_door.pth`, into site-packages. The line imports the copy only in a process whose command
line has an argument that ends in "bisect", and the copy changes that process only if it really is
`python -m bisect`.

It runs before the interpreter's path is complete: only the standard library may be imported here, and
aprjax itself not at all.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAME = "bisect"


def runs_bisect(original: list[str], arguments: list[str]) -> bool:
    """Whether a command line is `python … -m bisect …`.

    Args:
        original: `sys.orig_argv`, interpreter and its options included.
        arguments: `sys.argv` during start-up: `-m` stands for the module that is yet to be found,
            and the module's own arguments follow.
    """
    if arguments[:1] != ["-m"]:
        return False
    interpreter_part = original[: len(original) - len(arguments) + 1]
    last = interpreter_part[-1]
    # `-m bisect`, or joined to the option and to options before it: `-mbisect`, `-Imbisect`. Of the options
    # that may be joined before `m` none contains that letter.
    return last == NAME or (last.startswith("-") and last.partition("m")[2] == NAME)


class FrontDoor:
    """A finder for the one name `bisect`: the package that lies beside `aprjax`, wherever that is."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of our package, or None while `aprjax` cannot be found yet."""
        if name != NAME:
            return None
        aprjax = PathFinder.find_spec("aprjax")
        if aprjax is not None and aprjax.origin is not None:
            return PathFinder.find_spec(NAME, [str(Path(aprjax.origin).parent.parent)])
        # Another start-up hook may ask before all of the path is there; `runpy` is only there afterwards.
        if "runpy" not in sys.modules:
            return None
        sys.stderr.write(
            "error: aprjax is installed, but its package cannot be found: was the folder of an editable "
            "installation moved or removed? Likely fix: install aprjax again\n"
        )
        raise SystemExit(4)


def open_front_door() -> None:
    """Puts the finder first, in this process only, if it is `python -m bisect`."""
    if runs_bisect(sys.orig_argv, sys.argv):
        # A hook that ran before this one (a debugger, coverage, a certificate patch) may have
        # imported the standard module; `-m` would then run that one without searching.
        sys.modules.pop(NAME, None)
        sys.meta_path.insert(0, FrontDoor())  # pyright: ignore[reportArgumentType] - has all that the protocol asks
