"""Executes notebooks in a fresh kernel each, and writes their outputs in place: `make notebooks`.

    python notebooks/execute.py [NAME.ipynb …]

Without names all of them, the one on the 1.5B file included. What differs from run to run and tells a reader nothing
(times, ids, the kernel's version) is taken out, so that a difference in a committed notebook is one of its results.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
# The slowest cell, on the 1.5B file, takes well under a minute on an idle machine: this ends one that hangs.
_SECONDS_PER_CELL = 600
# What GitHub and Jupyter need to know of the kernel, and nothing of the machine.
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    """All of them, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]-*.ipynb"))


def read(path: Path) -> NotebookNode:
    """A notebook, checked against the format."""
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    return found


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook with the outputs of a fresh kernel that was started in `folder`; the file is left as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = read(path)
    # This checkout's aprjax, installed or not, from whatever folder the kernel starts in. No hub is asked for anything.
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(
        notebook, timeout=_SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with warnings.catch_warnings():
        # The client's own affair: how it talks to its kernel.
        warnings.simplefilter("ignore")
        client.execute(env=environment)
    return stripped(notebook)


def stripped(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what hangs on the run: metadata of kernel and cells, ids. Changed in place."""
    notebook.metadata = _METADATA
    for index, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = {}, f"cell-{index:02}"
        outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        if cell.cell_type == "code":
            cell.outputs = outputs
        for output in outputs:
            if "metadata" in output:
                output.metadata = {}
    return notebook


def main(names: list[str]) -> int:
    """Executes and writes; names may be paths."""
    chosen = [FOLDER / Path(name).name for name in names] or notebooks()
    for path in chosen:
        print(path.name, file=sys.stderr)
        nbformat.write(executed(path, FOLDER), path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
