"""A GGUF file for planting faults, read by gguf-py: tensors of equal size and float metadata can be replaced.

The same interface as `container.AprFile`, and like it none of aprjax's code.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from container import PlantError, Tensor, gguf_name

# APR's keys and the ends of GGUF's.
_KEYS = {"rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}


@dataclass
class GgufFile:
    """A parsed file. Change `tensors` by `put` and metadata by `set_key`, then `patches` or `write`.

    Attributes:
        path: the file, which stays as it is.
        tensors: by GGUF name; their bytes are views of the mapped file.
        offsets: where the bytes of each begin.
    """

    path: Path
    tensors: dict[str, Tensor]
    offsets: dict[str, int]
    config: dict[str, float | int]
    _places: dict[str, int] = field(default_factory=dict)
    _changed: dict[str, Tensor] = field(default_factory=dict)
    _written: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Parse a file."""
        reader = gguf.GGUFReader(path)
        tensors, offsets = {}, {}
        for found in reader.tensors:
            shape = tuple(int(n) for n in reversed(found.shape))
            view = found.data.reshape(-1).view("uint8").data
            tensors[found.name] = Tensor(found.name, int(found.tensor_type), shape, (view,), found.tensor_type.name)
            offsets[found.name] = int(found.data_offset)
        config, places = {}, {}
        for name, entry in reader.fields.items():
            if len(entry.data) == 1 and entry.types[0] in (gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.UINT32):
                config[name.partition(".")[2]] = entry.parts[entry.data[0]][0].item()
                # The value stands at the end of its entry.
                places[name.partition(".")[2]] = entry.offset + sum(part.nbytes for part in entry.parts[:-1])
        return cls(path, tensors, offsets, config, places)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name."""
        for spelling in (name, gguf_name(name)):
            if spelling in self._changed:
                return self._changed[spelling]
            if spelling in self.tensors:
                return self.tensors[spelling]
        raise PlantError(f"there is no tensor {name} in the file; layers begin at 0, see --layer")

    def put(self, tensor: Tensor) -> None:
        """Replace the tensor of that name by one of the same type and size."""
        old = self.tensors[tensor.name]
        if (old.type_name, old.shape, old.size) != (tensor.type_name, tensor.shape, tensor.size):
            raise PlantError(f"{tensor.name}: a tensor of another type or size needs another GGUF file")
        self._changed[tensor.name] = tensor

    def remove(self, name: str) -> None:
        """Not possible: what is changed in place keeps all its tensors."""
        raise PlantError(f"{self.tensor(name).name}: a file without it needs another GGUF file")

    def set_key(self, key: str, value: float) -> float:
        """Replace a float of the metadata; returns the old one."""
        if key not in _KEYS:
            raise PlantError(f"GGUF of Qwen2 has no key {key}")
        old = self.config[_KEYS[key]]
        self._written[self._places[_KEYS[key]]] = struct.pack("<f", value)
        return float(old)

    @property
    def patches(self) -> dict[int, bytes]:
        """By offset: the bytes that differ from the file's."""
        found = {self.offsets[name]: tensor.whole() for name, tensor in self._changed.items()}
        return {**found, **self._written}

    def discard(self) -> None:
        """Forget all changes."""
        self._changed.clear()
        self._written.clear()

    def write(self, path: Path) -> None:
        """A copy of the file with the changes."""
        data = bytearray(self.path.read_bytes())
        for offset, new in self.patches.items():
            data[offset : offset + len(new)] = new
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


AnyFile = Any  # AprFile or GgufFile: what they share is `tensor`, `put` and `set_key`.
