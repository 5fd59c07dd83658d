"""`layers` with traces as sides: a trace against a file, a file against a trace, and two traces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bisect_traces import LAYERS, TOKENS, faulty_trace, sound_trace, tiny_file
from tiny import with_tensor, write_tiny

from aprjax.bisect.layers.compare import layers
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.open_sides import file_of
from aprjax.bisect.report import VALUES_LACKING, LayersReport, Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Side, Traced, arithmetic_of
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.cli import main
from aprjax.qwen2 import LAYER_STAGES, OUTSIDE, PRESETS, Stage
from aprjax.trace import MemoryTrace, save
from aprjax.trace.lacking import NEVER_YIELDS

LLAMA = PRESETS["llama.cpp"]
EVERY = tuple(range(len(TOKENS)))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_file(tmp_path_factory.mktemp("traced"))


@pytest.fixture(scope="module")
def other_file(file: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    name = "model.layers.1.mlp.up_proj.weight"
    changed = with_tensor(file, name, file.tensors[name].decode() * np.float32(1.05))
    return write_tiny(tmp_path_factory.mktemp("other") / "other.apr", changed)


@pytest.fixture(scope="module")
def trace(file: Checkpoint) -> MemoryTrace:
    return sound_trace(file, LLAMA)


def compare(model: Side, ref: Side, positions: tuple[int, ...] = EVERY) -> LayersReport:
    return layers(model, ref, tokens=TokensReport("test", None, "none", TOKENS), positions=positions)


def place(report: LayersReport) -> tuple[int, Stage] | None:
    first = report.first_divergence
    return None if first is None else (first.layer, first.stage)


def test_a_trace_and_its_file_agree_whichever_is_judged(file: Checkpoint, trace: MemoryTrace) -> None:
    side, here = Traced(trace, file, LLAMA), Runner(file, LLAMA)
    for model, ref in ((side, here), (here, side), (side, side)):
        report = compare(model, ref)
        assert report.verdict is Verdict.AGREE
        assert place(report) is None
        assert [layer.layer for layer in report.layers] == [OUTSIDE, *range(LAYERS)]
        assert len(report.margins) == len(TOKENS)
        for layer in report.layers:
            for stage in layer.stages.values():
                assert stage.local_rel_l2 is not None
                assert stage.local_rel_l2 < 3e-7


def test_a_trace_of_a_file_with_one_other_tensor_is_charged_to_its_stage(
    file: Checkpoint, other_file: Checkpoint
) -> None:
    side, here = Traced(sound_trace(other_file, LLAMA), other_file, LLAMA), Runner(file, LLAMA)
    for model, ref in ((side, here), (here, side)):
        report = compare(model, ref)
        assert report.verdict is Verdict.DIVERGENCE
        assert place(report) == (1, Stage.FFN_UP)
        assert report.first_divergence is not None
        assert "model.layers.1.mlp.up_proj.weight" in report.first_divergence.cause


def test_without_the_traces_file_the_stage_is_named_and_the_cause_left_open(
    file: Checkpoint, other_file: Checkpoint
) -> None:
    report = compare(Traced(sound_trace(other_file, LLAMA), None, LLAMA), Runner(file, LLAMA))
    assert place(report) == (1, Stage.FFN_UP)
    assert report.first_divergence is not None
    assert "not at hand" in report.first_divergence.cause
    assert "cannot be compared" in report.findings[0].message


def test_a_kernel_fault_in_the_trace_is_charged_to_its_stage(file: Checkpoint) -> None:
    def fault(value: np.ndarray, here: object) -> np.ndarray:
        value[:, :64] *= 8
        return value

    trace = faulty_trace(file, LLAMA, {(0, Stage.ATTENTION): fault})
    report = compare(Traced(trace, file, LLAMA), Runner(file, LLAMA))
    assert place(report) == (0, Stage.ATTENTION)
    assert report.first_divergence is not None
    assert "the files agree here" in report.first_divergence.cause


def test_stages_that_a_trace_lacks_are_unmeasured_and_not_zero(file: Checkpoint, trace: MemoryTrace) -> None:
    lacking = (Stage.FFN_SILU, Stage.POST_FFN_RESIDUAL)
    values = {key: value for key, value in trace.values.items() if key[1] not in lacking}
    side, here = Traced(replace(trace, values=values), file, LLAMA), Runner(file, LLAMA)
    for model, ref, whose in ((side, here, "the model's"), (here, side, "the reference's")):
        report = compare(model, ref)
        assert report.verdict is Verdict.UNMEASURED
        assert report.reason.startswith(
            f"{whose} trace lacks 4 values, which were not measured: ffn_silu and post_ffn_residual of all "
            "layers; record it again"
        )
        assert "no stage differs by more than rounding explains" in report.reason
        for layer in report.layers[1:]:
            assert tuple(layer.stages) == LAYER_STAGES
            silu = layer.stages[Stage.FFN_SILU]
            assert (silu.local_rel_l2, silu.distance.rel_l2, silu.distance.share_1e3) == (None, None, None)
            assert "lacks this stage" in silu.unmeasured
            assert layer.stages[Stage.FFN_SWIGL].local_rel_l2 is not None
        assert any(f.id == "stages-unmeasured" and "ffn_silu" in f.message for f in report.findings)
        assert json.dumps(report.to_json(), allow_nan=False)
        assert "unmeasured" in report._repr_html_().lower()


def test_what_an_engine_never_yields_is_not_lacking(file: Checkpoint, trace: MemoryTrace) -> None:
    silent = (Stage.FFN_SILU, Stage.ATTN_SCORES)
    values = {key: value for key, value in trace.values.items() if key[1] not in silent}
    said = replace(trace.info, engine={**trace.info.engine, NEVER_YIELDS: "ffn_silu, attn_scores"})
    side, here = Traced(replace(trace, values=values, info=said), file, LLAMA), Runner(file, LLAMA)
    for model, ref in ((side, here), (here, side), (side, Traced(trace, file, LLAMA))):
        assert compare(model, ref).verdict is Verdict.AGREE
    # One value more is gone by accident.
    del values[1, Stage.FFN_UP]
    report = compare(side, here)
    assert report.verdict is Verdict.UNMEASURED
    assert "lacks 1 value, which was not measured: ffn_up of layer 1; record it" in report.reason
    assert [(f.id, f.side) for f in report.findings if f.id == VALUES_LACKING] == [(VALUES_LACKING, "model")]


def test_a_divergence_stays_one_where_values_are_lacking(file: Checkpoint, other_file: Checkpoint) -> None:
    trace = sound_trace(other_file, LLAMA)
    values = {key: value for key, value in trace.values.items() if key[0] != 0}
    report = compare(Traced(replace(trace, values=values), other_file, LLAMA), Runner(file, LLAMA))
    assert (report.verdict, place(report)) == (Verdict.DIVERGENCE, (1, Stage.FFN_UP))
    assert not any(finding.id == VALUES_LACKING for finding in report.findings)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([], "no value of any layer"),
        ([(OUTSIDE, Stage.EMBEDDING)], "no value of any layer"),
        ([(0, stage) for stage in LAYER_STAGES], "all but layer 0; record"),
        ([(1, stage) for stage in LAYER_STAGES], "all but layer 1; record"),
    ],
    ids=["nothing", "embedding", "first layer", "last layer"],
)
def test_a_trace_that_ends_early_is_judged_as_far_as_it_goes(
    file: Checkpoint, trace: MemoryTrace, kept: list[tuple[int, Stage]], words: str
) -> None:
    part = replace(trace, values={key: value for key, value in trace.values.items() if key in kept})
    side, here = Traced(part, file, LLAMA), Runner(file, LLAMA)
    for model, ref in ((side, here), (here, side), (side, Traced(trace, file, LLAMA))):
        report = compare(model, ref)
        assert report.verdict is Verdict.UNMEASURED
        assert words in report.reason
        assert "no position flips" not in report.reason
        measured = [(r.layer, s) for r in report.layers for s, found in r.stages.items() if not found.unmeasured]
        assert measured == kept
        assert json.dumps(report.to_json(), allow_nan=False)


def test_other_tokens_positions_and_unknown_files_are_refused(file: Checkpoint, trace: MemoryTrace) -> None:
    here = Runner(file, LLAMA)
    other = replace(trace, info=replace(trace.info, tokens=(9, *TOKENS[1:])))
    with pytest.raises(CheckpointError, match=r"11 tokens \(9, 17, 300, 5 …\)"):
        compare(Traced(other, file, LLAMA), here)
    last = {key: v[-1:] if key[1] in (Stage.FINAL_NORM, Stage.LM_HEAD) else v for key, v in trace.values.items()}
    partial = replace(trace, values=last, info=replace(trace.info, head_positions=(10,)))
    with pytest.raises(CheckpointError, match="no logits at 10 of the compared positions"):
        compare(Traced(partial, file, LLAMA), here)
    assert compare(Traced(partial, file, LLAMA), here, (10,)).verdict is Verdict.AGREE
    with pytest.raises(CheckpointError, match="two traces"):
        compare(Traced(trace, None, LLAMA), Traced(trace, None, LLAMA))


def test_a_traces_file_is_found_by_its_digest(file: Checkpoint, other_file: Checkpoint, trace: MemoryTrace) -> None:
    found = file_of(trace)
    assert found is not None
    assert found.sha256() == file.sha256()
    moved = replace(trace, info=replace(trace.info, path=str(other_file.path)))
    assert file_of(moved) is None
    assert file_of(moved, file) is file


PLAIN = {"type_k": "f32", "tiled": "False", "repack": "False", "flash_attention": "False"}
DEFAULT = {"type_k": "f32", "tiled": "True", "repack": "True", "flash_attention": "False"}
FLASH = {"type_k": "f16", "flash_attention": "True"}
FEATURES = "CPU : AVX2 = 1 | LLAMAFILE = 1 | REPACK = 1 | "


@pytest.mark.parametrize(
    ("name", "engine", "expected"),
    [
        ("float32", {}, "float32"),
        ("llama.cpp (live)", PLAIN, "llama.cpp-exact"),
        ("llama.cpp (live)", PLAIN | {"system_info": "CPU : AVX2 = 1 | "}, "llama.cpp-exact"),
        ("llama.cpp (live)", PLAIN | {"system_info": "CPU : NEON = 1 | "}, "llama.cpp"),
        ("llama.cpp (live)", PLAIN | FLASH, "llama.cpp-flash-exact"),
        ("llama.cpp (live)", PLAIN | {"tiled": "True"}, "llama.cpp-exact[tiled]"),
        ("llama.cpp (live)", DEFAULT | {"system_info": FEATURES}, "llama.cpp-default"),
        ("llama.cpp (live)", DEFAULT | {"system_info": FEATURES + "AVX512 = 1"}, "llama.cpp-default-avx512"),
        ("llama.cpp (live)", DEFAULT | FLASH | {"system_info": FEATURES}, "llama.cpp-default-flash"),
        # Weights are repacked only by a build that can, and only if asked to.
        ("llama.cpp (live)", DEFAULT | {"system_info": "CPU : AVX2 = 1 | "}, "llama.cpp-exact[tiled]"),
        # Position by position other kernels run than for all at once.
        ("llama.cpp (live)", DEFAULT | {"system_info": FEATURES, "step": "1"}, "llama.cpp"),
        ("llama.cpp (live)", {}, "llama.cpp-f16"),
        ("an abacus", {}, None),
    ],
)
def test_the_arithmetic_that_a_trace_stands_for(
    trace: MemoryTrace, name: str, engine: dict[str, str], expected: str | None
) -> None:
    found = arithmetic_of(replace(trace, info=replace(trace.info, arithmetic=name, engine=engine)))
    assert (None if found is None else found.name) == expected


def test_the_command_takes_saved_traces(
    file: Checkpoint, trace: MemoryTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APRJAX_COMPILATION_CACHE", "off")
    saved, out = tmp_path / "trace.safetensors", tmp_path / "out.json"
    save(trace, saved)
    command = ["layers", "--model", str(saved), "--ref", str(file.path)]
    assert main([*command, "--json", str(out), "--save-trace", str(tmp_path / "again")]) == 0
    document = json.loads(out.read_text())
    assert document["verdict"] == "agree"
    assert document["prompt"]["tokens"] == list(TOKENS)
    assert document["sides"]["model"] == {
        "path": str(file.path),
        "sha256": file.sha256(),
        "format": "trace of apr",
        "arithmetic": "llama.cpp",
    }
    assert main(["replay", str(tmp_path / "again.model.safetensors"), "--file", str(file.path)]) == 0
    assert main([*command, "--tokens", "1,2,3"]) == 3
