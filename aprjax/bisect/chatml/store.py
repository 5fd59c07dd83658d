"""Finished runs on disk, so that an interrupted factorial goes on where it was.

A run is filed under the SHA-256 of everything that it depends on: the file's digest, the arithmetic, the fed
ids, the budget, the platform with its versions, and the code that computes. What has changed is thus never
found again, and two commands that need the same run share it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from aprjax.bisect.chatml.cells import Continuation
from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.types import CheckpointError

# Goes up when the meaning of a stored run changes.
VERSION = 1


@dataclass(frozen=True)
class Stored:
    """A run and its first token's logits `float32[vocab]`."""

    run: Continuation
    first_logits: Float[np.ndarray, " vocab"]


@dataclass(frozen=True)
class Store:
    """A folder of finished runs; without a folder nothing is kept."""

    folder: Path | None

    @classmethod
    def at(cls, folder: Path | None) -> Store:
        """Opens the folder, and makes it where it is missing.

        Raises:
            CheckpointError: it cannot be made.
        """
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"no folder for finished runs: {error.strerror or error}", file=folder, fix="choose another --state"
                ) from error
        return cls(folder)

    def get(self, key: dict[str, Any]) -> Stored | None:
        """The run filed under a key; None where there is none, or none that can be read."""
        if self.folder is None:
            return None
        try:
            with self._path(key).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                if json.loads(str(arrays["key"])) != _plain(key):
                    return None
                run = Continuation(
                    prompt_tokens=tuple(key["tokens"]),
                    tokens=tuple(arrays["tokens"].tolist()),
                    margins=tuple(arrays["margins"].tolist()),
                    runners_up=tuple(arrays["runners_up"].tolist()),
                    backend=key["backend"],
                )
                return Stored(run, arrays["first_logits"].astype(np.float32))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            # Absent, or damaged: it is computed anew and written over.
            return None

    def put(self, key: dict[str, Any], stored: Stored) -> None:
        """Files a run.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        if self.folder is None:
            return
        run, stream = stored.run, io.BytesIO()
        np.savez(
            stream,
            key=np.asarray(json.dumps(_plain(key))),
            tokens=np.asarray(run.tokens, np.int64),
            margins=np.asarray(run.margins, np.float64),
            runners_up=np.asarray(run.runners_up, np.int64),
            first_logits=stored.first_logits,
        )
        with atomic_file(self._path(key)) as target:
            target.write(stream.getvalue())

    def _path(self, key: dict[str, Any]) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest}.npz"


def code_digest() -> str:
    """SHA-256 of the sources that compute a run: a version number stays while they change."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    files = [file for name in ("blocks", "qwen2") for file in sorted((package / name).glob("*.py"))]
    assert files, "the sources of the package are not where they were written"
    for file in (*files, Path(__file__).with_name("decode.py")):
        digest.update(f"{file.parent.name}/{file.name}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({**key, "version": VERSION}))
