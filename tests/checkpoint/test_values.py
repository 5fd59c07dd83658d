"""Scanning values: NaN, zeros, dead rows, bytes of another type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from apr_drafts import WIDE, Part, draft, f32, random_blocks

from aprjax.checkpoint import values
from aprjax.checkpoint.types import Finding
from aprjax.checkpoint.values import scan_values

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def scanned(path: Path, name: str, data: np.ndarray) -> tuple[Finding, ...]:
    changed = draft()
    changed.tensors[name].data = f32(data)
    return scan_values(changed.read(path))


def values_of(name: str) -> np.ndarray:
    part = draft().tensors[name]
    return np.frombuffer(part.data, "<f4").reshape(part.shape).copy()


def test_a_sound_model_has_nothing_to_report(tmp_path: Path) -> None:
    done: list[int] = []
    checkpoint = draft().read(tmp_path / "a.apr")
    assert scan_values(checkpoint, progress=done.append) == ()
    assert sum(done) == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite(tmp_path: Path, value: float) -> None:
    data = values_of(UP)
    data[7, 3] = value
    (finding,) = scanned(tmp_path / "a.apr", UP, data)
    assert (finding.id, finding.tensor) == ("values-not-finite", UP)
    assert "1 of 96" in finding.message
    assert "[7, 3]" in finding.message


def test_the_place_is_right_in_later_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_CHUNK_ELEMENTS", 24)
    data = values_of(UP)
    data[10, 5] = np.nan
    data[11, 0] = np.nan
    (finding,) = scanned(tmp_path / "a.apr", UP, data)
    assert "2 of 96" in finding.message
    assert "[10, 5]" in finding.message


def test_a_block_scale_that_is_nan(tmp_path: Path) -> None:
    changed = draft(WIDE)
    blocks = bytearray(random_blocks("Q4_K", 256))
    blocks[5 * 144 : 5 * 144 + 2] = np.float16(np.nan).tobytes()
    changed.tensors["model.layers.0.mlp.gate_proj.weight"] = Part(12, (256, 256), bytes(blocks))
    (finding,) = scan_values(changed.read(tmp_path / "a.apr"))
    assert "256 of 65536" in finding.message
    assert "[5, 0]" in finding.message


@pytest.mark.parametrize(
    ("name", "share", "expected"),
    [
        (UP, 0.75, set()),
        (UP, 0.85, {"values-mostly-zero"}),
        (UP, 1.0, {"values-all-zero"}),
        (EMBEDDING, 0.4, set()),
        (EMBEDDING, 0.6, {"values-mostly-zero"}),
    ],
)
def test_shares_of_zeros(tmp_path: Path, name: str, share: float, expected: set[str]) -> None:
    data = values_of(name)
    flat = data.T.reshape(-1).copy()
    flat[: round(share * flat.size)] = 0
    spread = flat.reshape(data.shape[::-1]).T
    assert {finding.id for finding in scanned(tmp_path / "a.apr", name, spread)} == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [((), set()), ((18, 19), {"values-padding-rows"}), ((3,), {"values-dead-rows"}), ((3, 19), {"values-dead-rows"})],
)
@pytest.mark.parametrize("chunk", [16, 1 << 22])
def test_dead_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...], expected: set[str], chunk: int
) -> None:
    monkeypatch.setattr(values, "_CHUNK_ELEMENTS", chunk)
    data = values_of(EMBEDDING)
    data[list(rows)] = 0
    assert {finding.id for finding in scanned(tmp_path / "a.apr", EMBEDDING, data)} == expected


def test_a_constant_matrix_but_not_a_constant_norm(tmp_path: Path) -> None:
    assert [f.id for f in scanned(tmp_path / "a.apr", UP, np.full((12, 8), 0.5))] == ["values-constant"]
    assert scanned(tmp_path / "b.apr", "model.norm.weight", np.ones(8)) == ()


@pytest.mark.parametrize("scale", [0.02, 1.0, 40.0])
def test_bf16_labelled_f16(tmp_path: Path, scale: float) -> None:
    changed = draft()
    weights = np.float32(scale) * values_of(UP)
    changed.tensors[UP] = Part(1, (12, 8), (weights.view("<u4") >> 16).astype("<u2").tobytes())
    (finding,) = scan_values(changed.read(tmp_path / "a.apr"))
    assert finding.id == "values-bf16-as-f16"
    changed.tensors[UP] = Part(1, (12, 8), weights.astype("<f2").tobytes())
    assert scan_values(changed.read(tmp_path / "b.apr")) == ()


def test_absurd_magnitudes(tmp_path: Path) -> None:
    (finding,) = scanned(tmp_path / "a.apr", UP, 1e6 * values_of(UP))
    assert finding.id == "values-absurd"


def test_only_the_named_tensors_are_scanned(tmp_path: Path) -> None:
    changed = draft()
    changed.tensors[UP].data = f32(np.full((12, 8), np.nan))
    checkpoint = changed.read(tmp_path / "a.apr")
    assert scan_values(checkpoint, ["model.norm.weight"]) == ()
    (finding,) = scan_values(checkpoint, [UP])
    assert finding.tensor == UP
