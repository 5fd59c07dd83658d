"""Models with faults, one after the other: the clean file is read once, and only what differs is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import Case
from container import AprFile, PlantError, gguf_name
from gguf_container import GgufFile
from plant import GLOBAL_STAGES, site_of
from tensor_faults import TENSOR_FAULTS, Site

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.types import Checkpoint
from aprjax.qwen2.arithmetic import Arithmetic

# Where a config key acts first.
CONFIG_SITES = {
    "rope-theta": (0, "q_post_rope"),
    "rope-type": (0, "q_post_rope"),
    "rms-norm-eps": (0, "attn_norm"),
}
# Up to this size a faulty file is written whole; a larger one is a copy that is changed in place and mended again.
_SMALL = 1 << 26


@dataclass(frozen=True)
class PlantedCase:
    """What a case changed.

    Attributes:
        tensors: Hugging Face names.
        keys: of the config.
        layer: at which the two must part first.
        stage: likewise.
    """

    tensors: tuple[str, ...]
    keys: tuple[str, ...]
    layer: int
    stage: str


@dataclass
class Workshop:
    """One model and its faulty copies.

    Attributes:
        name: of the model.
        clean: the file that faults are planted in.
        ref: the reference, opened once.
        folder: for copies.
        tokens: what both sides are fed.
        arithmetic: of both sides; None: what `layers` takes unasked.
    """

    name: str
    clean: Path
    ref: Checkpoint
    folder: Path
    tokens: tuple[int, ...]
    arithmetic: Arithmetic | None = None
    _file: Any = field(default=None, repr=False)
    _copied: bool = field(default=False, repr=False)

    @property
    def layers(self) -> int:
        """How many there are."""
        return self.ref.config.num_layers

    @contextmanager
    def model(self, cases: tuple[Case, ...]) -> Iterator[tuple[Checkpoint, tuple[PlantedCase, ...]]]:
        """A model with these faults, planted in this order, and what each of them changed."""
        file = self._opened()
        planted = tuple(self._plant(file, case) for case in cases)
        if isinstance(file, AprFile) and (self.clean.stat().st_size <= _SMALL or not file.same_layout(self.clean)):
            target = self.folder / f"{self.name}-faulty{self.clean.suffix}"
            file.write(target)
            yield _opened(target), planted
            target.unlink()
            return
        target = self.folder / f"{self.name}-copy{self.clean.suffix}"
        if not self._copied:
            # A copy that is there may still hold a fault: of a run that was interrupted.
            shutil.copyfile(self.clean, target)
            self._copied = True
        patches = file.patches
        try:
            _patch(target, patches)
            yield _opened(target), planted
        finally:
            with self.clean.open("rb") as source:
                _patch(target, {offset: _read(source, offset, len(new)) for offset, new in patches.items()})

    def _opened(self) -> Any:
        if self.clean.suffix == ".apr":
            return AprFile.read(self.clean)
        if self._file is None:
            self._file = GgufFile.read(self.clean)
        self._file.discard()
        return self._file

    def _plant(self, file: Any, case: Case) -> PlantedCase:
        if case.tensor is None:
            key = case.fault.replace("-", "_")
            value: Any = int(case.strength or 0) if key == "rope_type" else case.strength
            file.set_key(key, value)
            layer, stage = CONFIG_SITES[case.fault]
            return PlantedCase((), ("rope_pairing" if key == "rope_type" else key,), layer, stage)
        fault = TENSOR_FAULTS[case.fault]
        names = fault.plant(file, self.site(case))
        if isinstance(file, AprFile):
            _require_changed(file, self.clean, names)
        elif not file.patches:
            raise PlantError(f"the fault leaves {names[0]} as it is")
        order = {leaf: index for index, leaf in enumerate(GLOBAL_STAGES)}
        first = min(names, key=lambda name: order.get(name, site_of(name)[0]))
        return PlantedCase(tuple(names), (), *site_of(first))

    def site(self, case: Case) -> Site:
        """Where a case's fault is planted; the row of an embedding is one that the tokens use."""
        assert case.tensor is not None
        row = self.tokens[1] if case.tensor == "model.embed_tokens.weight" else 5
        return Site(case.tensor, case.other, case.strength, self.ref.config.head_dim, row)


def _require_changed(file: AprFile, clean: Path, names: list[str]) -> None:
    before = AprFile.read(clean)
    for name in names:
        if not any(spelling in file.tensors for spelling in (name, gguf_name(name))):
            continue  # left out
        if file.tensor(name).shape != before.tensor(name).shape:
            continue
        if before.tensor(name).whole() == file.tensor(name).whole():
            raise PlantError(f"the fault leaves {name} as it is")


def _opened(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    # Reports show the digest, and taking it of every faulty copy would cost more than the comparison.
    checkpoint.__dict__["_sha256"] = "not taken"
    return checkpoint


def _patch(target: Path, patches: dict[int, bytes]) -> None:
    with target.open("r+b") as stream:
        for offset, data in patches.items():
            stream.seek(offset)
            stream.write(data)


def _read(source: Any, offset: int, size: int) -> bytes:
    source.seek(offset)
    return source.read(size)
