"""llama.cpp's other builds are found where `make peers` puts them, and only when complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprjax.checkpoint.fetch import cache_folder
from aprjax.trace.llama_builds import builds_folder, installed_builds


def test_only_complete_builds_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default", "avx2", "avx2.partial", "source"):
        (tmp_path / name).mkdir()
    (tmp_path / "default" / ".built").touch()
    monkeypatch.setenv("APRJAX_LLAMA_BUILDS", str(tmp_path))
    assert installed_builds() == {"default": tmp_path / "default"}
    monkeypatch.setenv("APRJAX_LLAMA_BUILDS", str(tmp_path / "nothing"))
    assert installed_builds() == {}


def test_without_a_choice_they_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APRJAX_LLAMA_BUILDS", raising=False)
    monkeypatch.setenv("APRJAX_CACHE", str(tmp_path))
    assert builds_folder().parent == cache_folder() == tmp_path
