"""`Behind`: order, the bound on what waits, and what becomes of errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprjax.checkpoint.types import CheckpointError
from aprjax.trace.behind import Behind


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(0, 60))
def test_everything_is_done_in_order_and_no_more_waits_than_allowed(sizes: list[int], most: int) -> None:
    done: list[int] = []
    given_out, released = 0, threading.Lock()

    def run(index: int, size: int) -> None:
        nonlocal given_out
        done.append(index)
        with released:
            given_out -= size

    with Behind(most) as behind:
        for index, size in enumerate(sizes):
            with released:
                given_out += size
            behind(lambda index=index, size=size: run(index, size), size)
            with released:
                # What waits fits, or is one call alone.
                assert given_out <= max(most, size)
    assert done == list(range(len(sizes)))
    assert given_out == 0


def test_it_runs_beside_the_caller_and_waits_where_there_is_no_room() -> None:
    go, seen = threading.Event(), []
    with Behind(10) as behind:
        behind(lambda: seen.append(go.wait(10)), 6)
        behind(lambda: seen.append(True), 4)
        assert seen == []  # neither is done: both fit
        threading.Timer(0.05, go.set).start()
        behind(lambda: seen.append(True), 1)  # no room before the first is done
        assert seen[0] is True
    assert seen == [True, True, True]


def test_an_error_reaches_the_caller_and_what_has_not_begun_is_dropped() -> None:
    go, later = threading.Event(), []

    def fail() -> None:
        raise ValueError("disk full")

    def failing() -> None:
        with Behind(100) as behind:
            behind(fail)

    def interrupted() -> None:
        with Behind(100) as behind:
            behind(lambda: go.wait(10))
            behind(lambda: later.append(1))
            threading.Timer(0.05, go.set).start()
            raise KeyError("the caller's")

    with pytest.raises(ValueError, match="disk full"):
        failing()
    with pytest.raises(KeyError, match="the caller's"):
        interrupted()
    assert later == []


def test_a_run_into_a_folder_that_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import aprjax
    from aprjax.qwen2 import PRESETS
    from aprjax.trace.streamed import StreamedRun

    run = StreamedRun(aprjax.open(aprjax.embedded_model()), [1, 2, 3], PRESETS["float32"])
    # Nothing has to be computed for it.
    monkeypatch.setattr(StreamedRun, "pieces", lambda self: iter(()))
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.save(tmp_path / "absent" / "trace.safetensors")


def test_a_run_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import aprjax
    from aprjax.qwen2 import PRESETS
    from aprjax.trace.streamed import StreamedRun

    run = StreamedRun(aprjax.open(aprjax.embedded_model()), [1, 2, 3], PRESETS["float32"])

    def pieces(self: StreamedRun):
        del self
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(StreamedRun, "pieces", pieces)
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path / "trace.safetensors")
    assert list(tmp_path.iterdir()) == []
