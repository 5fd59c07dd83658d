"""Outputs are whole or absent: when the block fails, when its process is killed, when the disk is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aprjax.checkpoint import atomic
from aprjax.checkpoint.atomic import atomic_file, atomic_folder
from aprjax.checkpoint.types import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
# Writes half of the output, says so, and waits to be killed.
FILE = """
import sys, time
from pathlib import Path
from aprjax.checkpoint import atomic
if sys.argv[2] == "named":
    atomic._nameless = lambda folder: None
with atomic.atomic_file(sys.argv[1]) as stream:
    stream.write(bytes(100_000))
    stream.flush()
    print("half", flush=True)
    time.sleep(600)
"""
FOLDER = """
import sys, time
from aprjax.checkpoint.atomic import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "first").write_bytes(bytes(100_000))
    print("half", flush=True)
    time.sleep(600)
"""
LONG_AGO = time.time() - 3600


def half_written(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def end(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.wait(60)
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="only Linux has files without a name")
def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"what stood here")
    if not atomic._can_be_nameless(tmp_path, tmp_path.stat().st_dev):
        pytest.skip("this file system has no files without a name")
    process = half_written(FILE, str(target), "nameless")
    assert os.listdir(tmp_path) == ["out.gguf"]
    end(process, signal.SIGKILL)
    assert os.listdir(tmp_path) == ["out.gguf"]
    assert target.read_bytes() == b"what stood here"


@pytest.mark.parametrize("script", [FILE, FOLDER], ids=["file", "folder"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, script: str) -> None:
    target, others = tmp_path / "out", tmp_path / ".outer.0123abcd.partial"
    others.write_bytes(b"of another output")
    process = half_written(script, str(target), "named")
    (partial,) = tmp_path.glob(".out.*.partial")
    os.utime(partial, (LONG_AGO, LONG_AGO))
    write = atomic_file if script is FILE else atomic_folder
    # It is still being written: nobody touches it, however old.
    with write(target):
        pass
    assert partial.exists()
    end(process, signal.SIGKILL)
    assert partial.exists()
    (target.rmdir if target.is_dir() else target.unlink)()
    os.utime(partial, (LONG_AGO, LONG_AGO))
    with write(target):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", others.name}


@pytest.mark.parametrize("named", [False, True])
def test_the_file_is_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, named: bool) -> None:
    if named:
        monkeypatch.setattr(atomic, "_nameless", lambda folder: None)
    target, plain = tmp_path / "made", tmp_path / "plain"
    plain.touch()
    for content in (b"first", b"second"):
        with atomic_file(target) as stream:
            stream.write(b"xxx")
            stream.seek(0)
            stream.write(content)
        assert target.read_bytes() == content
    assert target.stat().st_mode == plain.stat().st_mode
    assert target.stat().st_nlink == 1
    assert {path.name for path in tmp_path.iterdir()} == {"made", "plain"}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_block_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], *, named: bool
) -> None:
    if named:
        monkeypatch.setattr(atomic, "_nameless", lambda folder: None)
    target = tmp_path / "out"
    target.write_bytes(b"what stood here")

    def fail() -> None:
        with atomic_file(target) as stream:
            stream.write(b"half")
            raise kind

    with pytest.raises(CheckpointError if kind is OSError else kind):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert target.read_bytes() == b"what stood here"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the same place."""
    script = (
        "import resource, sys; from aprjax.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); sys.exit(main(sys.argv[1:]))"
    )
    from tiny import tiny_checkpoint, write_tiny

    write_tiny(tmp_path / "model.apr", tiny_checkpoint())
    (tmp_path / "out").mkdir()
    for target in ("model.gguf", "folder"):
        command = [sys.executable, "-c", script, "convert", str(tmp_path / "model.apr"), str(tmp_path / "out" / target)]
        outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert outcome.returncode == 4, outcome.stderr
        assert "cannot be written: File too large" in " ".join(outcome.stderr.split())
        assert "Traceback" not in outcome.stderr
        assert os.listdir(tmp_path / "out") == []
