"""Files: equal values and configs, sound and complete containers, and a round trip that loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from contract_sides import MadeUpBench, outcome, statuses, with_config, write_pair
from tiny import with_tensor

from aprjax.bisect.files import compare_files
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import Checkpoint
from aprjax.contracts.types import Status

FORMAT = tuple(f"APRJAX-FORMAT-00{number}" for number in range(1, 6))
ROUND_TRIP = tuple(f"FALSIFY-FP-00{number}" for number in range(1, 5))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def bench_of(pair: tuple[Path, Path], tmp_path: Path) -> Callable[..., MadeUpBench]:
    def make(model: Checkpoint | None = None) -> MadeUpBench:
        ours, ref = model or open_checkpoint(pair[0]), open_checkpoint(pair[1])

        def exported() -> Path:
            convert(ours.path, tmp_path / "exported.gguf", keep_blocks=True)
            return tmp_path / "exported.gguf"

        made = MadeUpBench(files_by_side={"model": ours, "ref": ref}, files=compare_files(ours, ref))
        made.exported = lambda: made.once("exported", exported)
        return made

    return make


def test_same_files_and_planted_ones(bench_of: Callable[..., MadeUpBench], pair: tuple[Path, Path]) -> None:
    assert set(statuses(bench_of(), *FORMAT, "FALSIFY-QW2E-SHIP-003").values()) == {"pass"}
    model = open_checkpoint(pair[0])
    name = "model.layers.2.self_attn.k_proj.bias"
    other = with_tensor(model, name, model.tensors[name].decode() + np.float32(1e-6))
    found = outcome(bench_of(other), "APRJAX-FORMAT-001")
    assert found.status is Status.FAIL
    assert name in found.reason
    theta = outcome(bench_of(with_config(model, rope_theta=1e4)), "APRJAX-FORMAT-002")
    assert theta.status is Status.FAIL
    assert "rope_theta" in theta.reason
    gone = Checkpoint(**{**vars(model), "tensors": {key: value for key, value in model.tensors.items() if key != name}})
    assert statuses(bench_of(gone), "APRJAX-FORMAT-004", "FALSIFY-QW2E-SHIP-003") == {
        "APRJAX-FORMAT-004": "fail",
        "FALSIFY-QW2E-SHIP-003": "fail",
    }


def test_a_wrong_checksum_is_no_sound_file(
    bench_of: Callable[..., MadeUpBench], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    raw = bytearray(pair[0].read_bytes())
    raw[40] ^= 0xFF
    broken = tmp_path / "broken.apr"
    broken.write_bytes(raw)
    found = outcome(bench_of(open_checkpoint(broken)), "APRJAX-FORMAT-003")
    assert found.status is Status.FAIL


def test_round_trip_through_gguf(bench_of: Callable[..., MadeUpBench], pair: tuple[Path, Path]) -> None:
    assert set(statuses(bench_of(), *ROUND_TRIP, "APRJAX-FORMAT-005").values()) == {"pass"}
    model = open_checkpoint(pair[0])
    # What is in memory is not what was exported from disk: the comparison must say so.
    name = "model.layers.0.mlp.up_proj.weight"
    other = with_tensor(model, name, model.tensors[name].decode()[::-1])
    found = outcome(bench_of(other), "FALSIFY-FP-004")
    assert found.status is Status.FAIL
    assert name in found.reason
    assert outcome(bench_of(with_config(model, rms_norm_eps=1e-5)), "FALSIFY-FP-004").status is Status.FAIL


def test_other_shapes_are_counted(bench_of: Callable[..., MadeUpBench], pair: tuple[Path, Path]) -> None:
    model = open_checkpoint(pair[0])
    name = "model.layers.0.self_attn.k_proj.weight"
    turned = with_tensor(model, name, np.ascontiguousarray(model.tensors[name].decode().T), "F32")
    longer = with_tensor(turned, "model.norm.weight", np.ones(300))
    made = MadeUpBench(files_by_side={"model": longer, "ref": open_checkpoint(pair[1])})
    assert statuses(made, *ROUND_TRIP[:3]) == dict.fromkeys(ROUND_TRIP[:3], "fail")


def test_checking_is_read_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.apr"
    copy.write_bytes(pair[0].read_bytes())
    model = open_checkpoint(copy)
    made = MadeUpBench(files_by_side={"model": model, "ref": open_checkpoint(pair[1])})
    model.sha256()
    assert outcome(made, "FALSIFY-QA-001").status is Status.PASS
    with copy.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    assert outcome(made, "FALSIFY-QA-001").status is Status.FAIL
