"""The notebooks: their outputs are committed, and are what comes out when a fresh kernel runs them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from notebook_outputs import differences, differing, shown

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]-*.ipynb"))
# On the real file, which is fetched; the others have the embedded model.
REAL = "05-the-real-1.5b.ipynb"


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.stem


def test_there_are_five_in_order() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_committed_notebook_is_whole(path: Path) -> None:
    """Every cell was run, once and in order, in a fresh kernel; nothing failed, and no machine shows."""
    notebook = load(path)
    text = path.read_text(encoding="utf-8")
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any(cell["outputs"] for cell in code)
    assert all(cell["source"] for cell in notebook["cells"])
    folders = "|".join(("home", "root", "work", "tmp", "Users"))
    assert not re.search(rf"/(?:{folders})/", text)
    # Results show themselves: tables and figures, not the text of objects.
    assert any("text/html" in o.get("data", {}) for cell in code for o in cell["outputs"])
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell["outputs"])
    # It is read on a web page: a megabyte is much.
    assert len(text) < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for cell in load(path)["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", "".join(cell["source"])):
                assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize(
    ("committed", "again", "same"),
    [
        ("a margin of 0.892 logits", "a margin of 0.893 logits", True),
        ("a margin of 0.892 logits", "a margin of 1.2 logits", False),
        ("relative L2 4.77e−7", "relative L2 1e-6", True),
        ("relative L2 4.77e−7", "relative L2 0", True),
        ("relative L2 0.01", "relative L2 0", False),
        ("at layer 25, ffn_gate", "at layer 26, ffn_gate", False),
        ("at layer 2, ffn_gate", "at layer 2, ffn_up", False),
        ("3,062,668 sigma", "3 sigma", True),
        ("5 flips", "", False),
        ("Q4_K", "Q6_K", False),
    ],
)
def test_what_counts_as_the_same_output(committed: str, again: str, same: bool) -> None:
    assert (differing(committed, again) == []) is same


def test_a_table_s_column_in_units_of_the_noise_is_held_to_being_there() -> None:
    def cell(gap: str, sigmas: str) -> Any:
        rows = f"<tr><th>gap</th><th>in σ</th></tr><tr><td>{gap}</td><td>{sigmas}</td></tr>"
        data = {"text/html": f"<style>td {{top: 7px}}</style><table>{rows}</table>", "text/plain": "<Report>"}
        outputs = [{"output_type": "execute_result", "data": data}]
        return shown({"cells": [{"cell_type": "code", "source": ["report"], "outputs": outputs}]})

    assert differences(cell("6.28", "1530"), cell("6.281", "47")) == []
    assert len(differences(cell("6.28", "1530"), cell("7.5", "1530"))) == 1
    assert len(differences(cell("6.28", "1530"), cell("6.28", ""))) == 1


def executor() -> Any:
    """`notebooks/execute.py`, which lies beside the notebooks and in no package."""
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(path: Path, folder: Path) -> list[str]:
    """Executes a notebook in a kernel started in `folder`, and says what is not as committed."""
    for needed in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(needed) is None:
            pytest.fail(f"{needed} is not installed: the extra `notebooks`, or `make setup`")
    return differences(shown(load(path)), shown(executor().executed(path, folder)))


@pytest.mark.thorough
@pytest.mark.parametrize("folder", [FOLDER, ROOT], ids=["from notebooks", "from the root"])
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name != REAL], ids=name_of)
def test_a_fresh_kernel_gives_what_is_committed(path: Path, folder: Path) -> None:
    assert run(path, folder) == []


@pytest.mark.real_model
def test_a_fresh_kernel_gives_what_is_committed_on_the_real_files(model_path: Callable[[str], Path]) -> None:
    """Once, from the root: the quick ones show that the folder makes no difference."""
    model_path("qwen2.5-coder-1.5b")
    assert run(FOLDER / REAL, ROOT) == []
