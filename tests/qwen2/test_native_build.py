"""How the kernel of integer products is compiled, checked and refused: real compilers, real processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from aprjax.blocks.native.product import SOURCE
from aprjax.qwen2 import native

ASK = """
from aprjax.qwen2.native import native_products
found = native_products()
print(found.target or "none", found.reason, sep="\\n")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APRJAX_CACHE", str(tmp_path))
    monkeypatch.delenv("APRJAX_NATIVE", raising=False)
    return tmp_path


def found_anew() -> native.NativeProducts:
    """What a fresh process would find."""
    return native._wanted.__wrapped__()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that says it has the instructions: what is tested ends before any of them is used."""
    monkeypatch.setattr(native, "processor_flags", lambda: set(native.INSTRUCTIONS.values()))


def test_off_and_required(cache, monkeypatch):
    monkeypatch.setenv("APRJAX_NATIVE", "off")
    assert found_anew() == native.NativeProducts(None, "APRJAX_NATIVE=off")
    monkeypatch.setattr(native, "processor_flags", lambda: {"avx512f"})
    monkeypatch.setenv("APRJAX_NATIVE", "required")
    with pytest.raises(native.NativeError, match="the processor lacks avx512_vnni, avx512bw"):
        found_anew()
    monkeypatch.delenv("APRJAX_NATIVE")
    assert found_anew().target is None
    monkeypatch.setenv("APRJAX_NATIVE", "yes")
    with pytest.raises(native.NativeError, match="off or required, or not set: found 'yes'"):
        found_anew()
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("able")
def test_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in found_anew().reason
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("able")
def test_a_compiler_that_fails_is_asked_once(cache, monkeypatch):
    calls = cache / "calls"
    monkeypatch.setenv("CXX", script(cache / "cxx", f"echo asked >> {calls}; echo no such header >&2; exit 3"))
    first, second = found_anew(), found_anew()
    assert first.target is None
    assert "cxx ended with 3" in first.reason
    assert second == first
    assert "to try again, remove its folder" in first.reason
    assert calls.read_text().splitlines() == ["asked"]
    assert [path.name for path in native.kernel_folder().iterdir()] == ["refused.txt"]
    assert "no such header" in (native.kernel_folder() / "refused.txt").read_text()


@pytest.mark.usefixtures("able")
def test_a_kernel_that_the_processor_kills_is_refused(cache, monkeypatch):
    """The check's process dies, the user's does not."""
    # What it "compiles" is no library: the checking process ends with an error, as one that is killed does.
    monkeypatch.setenv("CXX", script(cache / "cxx", 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"'))
    found = found_anew()
    assert found.target is None
    assert "ended with" in found.reason
    assert [path.name for path in native.kernel_folder().iterdir()] == ["refused.txt"]


@pytest.mark.usefixtures("able")
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("APRJAX_CACHE", str(blocked))
    monkeypatch.delenv("APRJAX_NATIVE", raising=False)
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", "exit 0"))
    assert "cannot be written" in found_anew().reason


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # A mask of the halves, the offset of a format, the order of rows within a tile.
        ("_mm512_set1_epi32((1 << 13) - 1)", "_mm512_set1_epi32((1 << 12) - 1)"),
        ("Format<32, 32, 5, 16, false, false>", "Format<32, 32, 5, 15, false, false>"),
        ("(row % 16) / 4 * 16 + row / 16 * 4", "(row % 16) / 4 * 16 + (3 - row / 16) * 4"),
        # One float operation in another order: a last bit here and there.
        (
            "_mm512_mul_ps(_mm512_mul_ps(outer, scale), _mm512_cvtepi32_ps(totals[t][v]))",
            "_mm512_mul_ps(outer, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(totals[t][v])))",
        ),
    ],
)
@pytest.mark.usefixtures("cache", "native_target")
def test_a_kernel_with_other_bits_is_refused(right, wrong, tmp_path, monkeypatch):
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "changed.cc").write_text(source.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(native, "SOURCE", tmp_path / "changed.cc")
    native._key.cache_clear()
    try:
        found = found_anew()
        refusal = (native.kernel_folder() / "refused.txt").read_text(encoding="utf-8")
    finally:
        native._key.cache_clear()
    assert found.target is None
    assert "other bits than XLA's program" in refusal


@pytest.mark.thorough
@pytest.mark.usefixtures("native_target")
def test_two_that_build_at_once(cache):
    environment = {**os.environ, "APRJAX_NATIVE": "required"}
    running = [
        subprocess.Popen([sys.executable, "-c", ASK], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240)[0].splitlines() for process in running]
    assert said[0] == said[1]
    assert said[0][0].startswith("aprjax_integer_matmul_")
    assert [path.name for path in (cache / "native").rglob("*")] == [native.kernel_folder().name, "kernel.so"]
