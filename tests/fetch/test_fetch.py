"""Fetching a model: from a Hub that breaks, from parts, twice at once; and never a wrong file in its place."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fetching import CONTENT, MODEL, PARTS, Hub, Index, assert_fetched, visible

from aprjax.checkpoint import CheckpointError, fetch_sources
from aprjax.checkpoint.fetch import cache_folder, fetch, known_models, model_location


def test_the_hub_comes_first(hub: Hub, index: Index, folder: Path) -> None:
    index.offer()
    reports: list[tuple[str, int, int]] = []
    path = fetch("tiny", folder, lambda *report: reports.append(report))
    assert path == folder / "tiny.gguf"
    assert_fetched(folder)
    assert (hub.requests, index.asked) == ([None], [])
    transferred = [(done, total) for what, done, total in reports if what == "fetching from the Hub"]
    assert transferred[-1] == (MODEL.bytes, MODEL.bytes)
    assert transferred == sorted(transferred)
    assert len(transferred) == 3


def test_what_is_there_is_not_fetched_again(hub: Hub, index: Index, folder: Path) -> None:
    fetch("tiny", folder)
    assert fetch("tiny", folder) == folder / "tiny.gguf"
    assert len(hub.requests) == 1


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, index: Index, folder: Path) -> None:
    hub.breaks_after = fetch_sources.CHUNK
    fetch("tiny", folder)
    assert_fetched(folder)
    assert hub.requests == [None, f"bytes={fetch_sources.CHUNK}-", f"bytes={2 * fetch_sources.CHUNK}-"]


def test_a_later_fetch_goes_on_from_an_earlier_one(hub: Hub, index: Index, folder: Path) -> None:
    hub.breaks_after = 1000
    with pytest.raises(CheckpointError, match="No matching distribution"):
        fetch("tiny", folder)
    assert visible(folder) == set()
    hub.breaks_after = None
    before = len(hub.requests)
    fetch("tiny", folder)
    assert_fetched(folder)
    assert hub.requests[before:] == [f"bytes={before * 1000}-"]


def test_an_interruption_keeps_what_came(hub: Hub, index: Index, folder: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done > fetch_sources.CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", folder, interrupt)
    assert visible(folder) == set()
    fetch("tiny", folder)
    assert_fetched(folder)
    assert hub.requests == [None, f"bytes={2 * fetch_sources.CHUNK}-"]


def test_a_hub_without_ranges_starts_over(hub: Hub, index: Index, folder: Path) -> None:
    folder.mkdir()
    (folder / ".tiny.gguf.partial").write_bytes(CONTENT[:1000])
    hub.knows_ranges = False
    fetch("tiny", folder)
    assert_fetched(folder)


@pytest.mark.parametrize("left", [100, MODEL.bytes, MODEL.bytes + 5])
def test_a_partial_file_of_another_version_is_given_up(hub: Hub, index: Index, folder: Path, left: int) -> None:
    folder.mkdir()
    (folder / ".tiny.gguf.partial").write_bytes(bytes(left))
    fetch("tiny", folder)
    assert_fetched(folder)
    assert hub.requests[-1] is None


BAD_HUBS: dict[str, dict[str, Any]] = {
    "other content": {"content": bytes(len(CONTENT))},
    "too short": {"content": CONTENT[:-1]},
    "too short, unannounced": {"content": CONTENT[:-1], "says_length": False},
    "too long": {"content": CONTENT + b"x"},
    "too long, unannounced": {"content": bytes(len(CONTENT) + 10), "says_length": False},
    "not there": {"status": 404},
    "overloaded": {"status": 503},
    "breaks at once": {"breaks_after": 0},
}


@pytest.mark.parametrize("behaviour", BAD_HUBS)
def test_when_the_hub_fails_the_parts_come(hub: Hub, index: Index, folder: Path, behaviour: str) -> None:
    for name, value in BAD_HUBS[behaviour].items():
        setattr(hub, name, value)
    index.offer()
    fetch("tiny", folder)
    assert_fetched(folder)
    assert index.asked == [f"tiny-model-part{part}==1.0" for part in range(1, PARTS + 1)]


def test_a_file_of_another_size_is_not_even_fetched(hub: Hub, index: Index, folder: Path) -> None:
    hub.content = bytes(10 * len(CONTENT))
    reports: list[str] = []
    with pytest.raises(CheckpointError, match=f"has {10 * len(CONTENT)} bytes, expected {len(CONTENT)}"):
        fetch("tiny", folder, lambda what, done, total: reports.append(what))
    assert "fetching from the Hub" not in reports


def test_without_a_network_the_error_names_both_sources(index: Index, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    with pytest.raises(CheckpointError) as caught:
        fetch("tiny", folder)
    message = str(caught.value)
    assert "127.0.0.1:1/someone/tiny-GGUF/resolve/main/tiny.gguf" in message
    assert "Connection refused" in message
    assert "No matching distribution found for tiny-model-part1==1.0" in message
    assert "noise" not in message
    assert "Likely fix" in message
    assert visible(folder) == set()


def test_offline_means_offline(hub: Hub, index: Index, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    index.offer()
    fetch("tiny", folder)
    assert_fetched(folder)
    assert hub.requests == []


def test_an_address_that_is_none_is_a_failure_of_the_hub(index: Index, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "mirror")
    with pytest.raises(CheckpointError, match="is HF_ENDPOINT right"):
        fetch("tiny", folder)


def test_another_file_in_its_place_is_left_alone(hub: Hub, index: Index, folder: Path) -> None:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"somebody's own")
    with pytest.raises(CheckpointError, match="another file is in the place of tiny: expected sha256"):
        fetch("tiny", folder)
    assert (folder / "tiny.gguf").read_bytes() == b"somebody's own"
    assert hub.requests == []


def test_the_right_file_brought_by_other_means_is_taken(hub: Hub, index: Index, folder: Path) -> None:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(CONTENT)
    fetch("tiny", folder)
    assert_fetched(folder)
    assert hub.requests == []


def test_a_file_that_changed_since_it_was_checked_is_noticed(hub: Hub, index: Index, folder: Path) -> None:
    path = fetch("tiny", folder)
    changed = bytearray(CONTENT)
    changed[5] ^= 1
    path.write_bytes(changed)
    later = path.stat().st_mtime + 10
    os.utime(path, (later, later))
    with pytest.raises(CheckpointError, match="another file"):
        fetch("tiny", folder)


def test_two_at_once_fetch_once(hub: Hub, index: Index, folder: Path) -> None:
    first_is_busy, go_on = threading.Event(), threading.Event()
    waits: list[str] = []

    def hold(what: str, done: int, total: int) -> None:
        first_is_busy.set()
        assert go_on.wait(20)

    def note(what: str, done: int, total: int) -> None:
        waits.append(what)
        go_on.set()

    first = threading.Thread(target=fetch, args=("tiny", folder, hold))
    first.start()
    assert first_is_busy.wait(20)
    # Goes on only after this one has met the lock.
    fetch("tiny", folder, note)
    first.join()
    assert waits == ["waiting for another fetch"]
    assert_fetched(folder)
    assert hub.requests == [None]


def test_an_unknown_model_is_named_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="'huge' is unknown; known: tiny"):
        fetch("huge", folder)


def test_the_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("APRJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("H"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path("H/.cache/aprjax")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path("H/Library/Caches/aprjax")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "X")
    assert cache_folder() == Path("X/aprjax")
    monkeypatch.setenv("APRJAX_CACHE", "A")
    assert cache_folder() == Path("A")
    file = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
    assert model_location("qwen2.5-coder-1.5b") == Path("A/models") / file
    assert model_location("qwen2.5-coder-1.5b", Path("F")) == Path("F") / file


def test_the_known_models_are_those_of_the_design() -> None:
    models = known_models()
    assert {name: (model.bytes, model.sha256[:8], model.parts) for name, model in models.items()} == {
        "qwen2.5-coder-0.5b": (491400064, "1d961463", 6),
        "qwen2.5-coder-1.5b": (1117320768, "cc324af0", 22),
    }
    for model in models.values():
        assert len(bytes.fromhex(model.sha256)) == 32
        assert model.package.format(part=1) != model.package
        assert replace(model, name="x").file.endswith("-instruct-q4_k_m.gguf")
