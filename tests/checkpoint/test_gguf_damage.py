"""GGUF files that are damaged, foreign or no files at all: refused with the file, the reason and a fix."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from gguf_bytes import patch, replace, string, truncate
from tiny_gguf import write_tiny_gguf

from aprjax.checkpoint import CheckpointError, open_checkpoint
from aprjax.checkpoint.gguf_reader import UnsupportedArchitecture, read_gguf

TYPES = gguf.GGUFValueType
Damage = Callable[[Path], Path]
GATE_ENTRY = string("blk.0.ffn_gate.weight") + struct.pack("<I2Q", 2, 256, 512)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: patch(path, 0, b"GGUX"),
            "expected a GGUF, APR or safetensors file, found the first bytes b'GGUX",
        ),
        (lambda path: patch(path, 4, struct.pack(">I", 3)), "big-endian GGUF file"),
        (lambda path: patch(path, 4, struct.pack("<I", 1)), "GGUF version 1 .32-bit lengths"),
        (lambda path: patch(path, 4, struct.pack("<I", 4)), "GGUF version 4; versions 2 and 3 are read"),
        (lambda path: patch(path, 8, struct.pack("<Q", 2**63)), "claims 9223372036854775808 tensors"),
        (lambda path: patch(path, 16, struct.pack("<Q", 2**60)), "claims 1152921504606846976 metadata entries"),
        (lambda path: patch(path, 24, struct.pack("<Q", 2**62)), "a metadata key claims 4611686018427387904 bytes"),
        (lambda path: replace(path, string("blk.1.ffn_up.weight"), string("blk.0.ffn_up.weight")), "stands twice"),
        (
            lambda path: replace(
                path, string("blk.1.ffn_up.weight"), struct.pack("<Q", 19) + b"blk.1.ffn_\xffp.weight"
            ),
            "a tensor name is not UTF-8",
        ),
        (
            lambda path: replace(
                path, string("tokenizer.ggml.pre"), string("tokenizer.ggml.pr\x7f").replace(b"\x7f", b"\xff")
            ),
            "a metadata key is not UTF-8",
        ),
        (
            lambda path: replace(path, string("tokenizer.ggml.bos_token_id"), string("tokenizer.ggml.eos_token_id")),
            "metadata key 'tokenizer.ggml.eos_token_id' stands twice",
        ),
        (
            lambda path: replace(path, GATE_ENTRY, GATE_ENTRY[:-16] + struct.pack("<2Q", 2**40, 2**40)),
            "do not fit a file",
        ),
        (lambda path: replace(path, GATE_ENTRY, GATE_ENTRY[:-16] + struct.pack("<2Q", 0, 512)), "do not fit a file"),
        (
            lambda path: replace(path, GATE_ENTRY, GATE_ENTRY[:-20] + struct.pack("<I2Q", 5, 256, 512)),
            "1 to 4 dimensions",
        ),
        (
            lambda path: replace(path, GATE_ENTRY + struct.pack("<I", 1), GATE_ENTRY + struct.pack("<I", 199)),
            "ggml type 199 is not known",
        ),
        (
            lambda path: replace(
                path, GATE_ENTRY + struct.pack("<I", 1), GATE_ENTRY[:-16] + struct.pack("<2QI", 128, 512, 12)
            ),
            "rows of 128 elements are no whole Q4_K blocks of 256",
        ),
        (lambda path: truncate(path, 1), "the file ends at"),
        (lambda path: truncate(path, path.stat().st_size - 2000), "the file ends after|are left"),
        (lambda path: truncate(path, path.stat().st_size - 3), "found the first bytes b'GGU'"),
    ],
)
def test_damage_is_refused_with_file_and_reason(tmp_path: Path, damage: Damage, message: str) -> None:
    path = damage(write_tiny_gguf(tmp_path / "damaged.gguf"))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)
    assert caught.value.offset is not None
    assert caught.value.fix


def test_arrays_of_arrays_and_unknown_types_are_refused(tmp_path: Path) -> None:
    value = {"test.value": ([7, 8, 9], TYPES.ARRAY)}
    entry = string("test.value") + struct.pack("<I", 9)
    for number, message in ((9, "array of arrays"), (13, "value type 13"), (2**31, "value type 2147483648")):
        path = write_tiny_gguf(tmp_path / f"{number}.gguf", extra=value)
        replace(path, entry + struct.pack("<I", 5), entry + struct.pack("<I", number))
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)
    path = write_tiny_gguf(tmp_path / "long.gguf", extra=value)
    replace(path, entry + struct.pack("<IQ", 5, 3), entry + struct.pack("<IQ", 5, 2**61))
    with pytest.raises(CheckpointError, match="claims 2305843009213693952 elements"):
        read_gguf(path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "other.gguf", extra={"general.architecture": ("llama", TYPES.STRING)})
    with pytest.raises(UnsupportedArchitecture, match="one of qwen2, found 'llama'"):
        open_checkpoint(path)


def test_what_is_no_model_file_is_refused_by_name(tmp_path: Path) -> None:
    import pickle
    import zipfile

    cases = {
        "empty": (b"", "the file is empty"),
        "pickle.pt": (pickle.dumps({"weights": [1, 2, 3]}), "a Python pickle; it could run code"),
        "page.gguf": (b"<!DOCTYPE html><html></html>", "a web page"),
        "pointer.gguf": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        "noise": (bytes(range(64)), "found the first bytes"),
        "tiny": (b"G", "found the first bytes"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "torch.bin", "w") as archive:
        archive.writestr("data.pkl", b"")
    with pytest.raises(CheckpointError, match="a zip archive"):
        open_checkpoint(tmp_path / "torch.bin")
    (tmp_path / "folder").mkdir()
    for path, message in ((tmp_path / "folder", "expected a config.json"), (tmp_path / "absent", "cannot be opened")):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be opened: embedded null byte"):
        open_checkpoint("a\0b")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        open_checkpoint(tmp_path / "pipe")
