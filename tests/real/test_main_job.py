"""The main job on the real 1.5B pair, as a user runs it: agreement, every planted fault, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real_model

DIRECT = "What is 2+2?"
CHATML = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Run:
    """What one command came to."""

    code: int
    document: dict[str, Any]
    words: str
    peak_bytes: int


# A process of its own between this one and the measured one: Linux counts the memory of the process that
# forks as the child's, and this one has held whole models.
MEASURE = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("\\n\\0" + json.dumps([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


@pytest.fixture(scope="module")
def gguf(model_path: Callable[[str], Path]) -> Path:
    return model_path("qwen2.5-coder-1.5b")


@pytest.fixture(scope="module")
def apr(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pair") / "a.apr"
    subprocess.run([sys.executable, "-m", "aprjax", "convert", str(gguf), str(target)], check=True)
    return target


@pytest.fixture
def layers(gguf: Path, tmp_path: Path) -> Callable[..., Run]:
    """Runs `python -m bisect layers` in a process of its own, and reports its peak memory."""

    def run(model: Path, *options: str) -> Run:
        out = tmp_path / "layers.json"
        out.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "bisect",
            "layers",
            "--model",
            str(model),
            "--ref",
            str(gguf),
            "--json",
            str(out),
        ]
        outcome = subprocess.run(
            [sys.executable, "-S", "-c", MEASURE, *command, *options], capture_output=True, text=True, check=False
        )
        words, _, measured = outcome.stdout.rpartition("\n\0")
        code, peak = json.loads(measured)
        assert "Traceback" not in outcome.stderr, outcome.stderr
        document = json.loads(out.read_text()) if out.exists() else {}
        return Run(code, document, words + outcome.stderr, peak * 1024)

    return run


def plant(apr: Path, fault: str, *options: str) -> tuple[Path, dict[str, Any]]:
    """A copy of the file with one fault, and what the planter expects of it."""
    target = apr.with_name("faulty.apr")
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "faults" / "plant.py"
    command = [sys.executable, str(script), str(apr), str(target), "--fault", fault, *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return target, json.loads(printed)["expected"]


def test_a_converted_file_agrees_on_the_direct_prompt_within_memory(
    gguf: Path, apr: Path, layers: Callable[..., Run]
) -> None:
    run = layers(apr, "--prompt", DIRECT)
    assert run.code == 0
    assert run.document["verdict"] == "agree"
    assert run.document["prompt"]["tokens"] == [3838, 374, 220, 17, 10, 17, 30]
    assert run.document["prompt"]["wrap"] == "none"
    assert run.document["sides"]["model"]["format"] == "apr"
    assert run.document["sides"]["ref"]["arithmetic"] == "llama.cpp"
    assert "byte-identical blocks in all 339 tensors" in run.words
    assert len(run.document["layers"]) == 29
    assert {len(layer["stages"]) for layer in run.document["layers"][1:]} == {17}
    # The bound: both files and 1.5 GiB.
    assert run.peak_bytes <= gguf.stat().st_size + apr.stat().st_size + (3 << 29)


def test_all_probes_agree_within_memory(gguf: Path, apr: Path, layers: Callable[..., Run]) -> None:
    """Direct, ChatML and about 500 tokens: what `layers` runs when it is given no prompt."""
    run = layers(apr)
    assert run.code == 0
    probes = {probe["prompt"]["name"]: probe for probe in run.document["probes"]}
    assert probes["direct"]["prompt"]["tokens"] == [3838, 374, 220, 17, 10, 17, 30]
    assert probes["chatml"]["prompt"]["tokens"][0] == 151644
    assert 480 <= len(probes["long"]["prompt"]["tokens"]) <= 520
    for probe in probes.values():
        assert probe["verdict"] == "agree"
        assert not any(margin["flip"] for margin in probe["margins"])
        assert len(probe["margins"]) == len(probe["prompt"]["tokens"])
    assert run.peak_bytes <= gguf.stat().st_size + apr.stat().st_size + (3 << 29)


# Fault, layer, stage and a piece of the sentence that must name the cause; sites are those of the issue.
FAULTS = {
    "rope-theta": (0, "q_post_rope", "rope_theta is 10000.0 in the model and 1000000.0 in the reference"),
    "rope-type": (0, "q_post_rope", "rope_pairing is 'norm' in the model and 'neox' in the reference"),
    "rms-eps": (0, "attn_norm", "rms_norm_eps is 1e-05 in the model and 1e-06 in the reference"),
    "k-bias-zero": (17, "qkv_bias", "model.layers.17.self_attn.k_proj.bias differs: the model's values are all zero"),
    "gate-up-swapped": (9, "ffn_gate", "holds the reference's model.layers.9.mlp.up_proj.weight under this name"),
    "o-proj-transposed": (5, "attn_out", "model.layers.5.self_attn.o_proj.weight differs: the model's values are the "),
    "nibbles-interleaved": (3, "ffn_gate", "nibble order"),
    "scale-bits-dropped": (-1, "embedding", "only the sub-block scales of the Q4_K blocks differ"),
    "head-rows-shifted": (-1, "lm_head", "shifted down by one row"),
    "nan-weight": (11, "ffn_norm", "the model's value is nan at position 0, channel 768"),
    "norm-scaled": (13, "attn_norm", "times 1.5"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_at_its_site_and_named(apr: Path, layers: Callable[..., Run], fault: str) -> None:
    layer, stage, words = FAULTS[fault]
    model, expected = plant(apr, fault)
    assert expected == {"layer": layer, "stage": stage}
    run = layers(model, "--prompt", DIRECT)
    assert run.code == 1
    first = run.document["first_divergence"]
    assert (first["layer"], first["stage"]) == (layer, stage)
    assert words in first["cause"]
    place = f"at {stage}" if layer < 0 else f"at layer {layer}, {stage}"
    assert f"DIVERGENCE {place}" in run.words
    # The files differ too, and that is a finding of its own.
    assert {"tensor-differs", "config-differs"} & {finding["id"] for finding in run.document["findings"]}


def test_scale_bits_of_the_matrices_alone_show_at_the_first_of_them(apr: Path, layers: Callable[..., Run]) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    model, _ = plant(apr, "scale-bits-dropped", "--tensor", name)
    run = layers(model, "--prompt", DIRECT)
    assert run.code == 1
    assert run.document["first_divergence"]["layer"] == 4
    assert run.document["first_divergence"]["stage"] == "ffn_up"
    assert "sub-block scales" in run.document["first_divergence"]["cause"]


def test_an_overwritten_chatml_token_shows_only_where_it_is_used(apr: Path, layers: Callable[..., Run]) -> None:
    model, expected = plant(apr, "token-row-overwritten")
    direct = layers(model, "--prompt", DIRECT)
    assert direct.code == 0
    assert direct.document["verdict"] == "agree"
    finding = next(f for f in direct.document["findings"] if f["id"] == "tensor-differs")
    assert finding["tensor"] == "model.embed_tokens.weight"
    assert "row 151644 alone" in finding["message"]
    chatml = layers(model, "--prompt", CHATML)
    assert chatml.code == 1
    first = chatml.document["first_divergence"]
    assert (first["layer"], first["stage"]) == (-1, "embedding") == (expected["layer"], expected["stage"])
    at = chatml.document["layers"][0]["stages"]["embedding"]["max_abs_at"][0]
    assert chatml.document["prompt"]["tokens"][at] == 151644
    wrapped = layers(model, "--prompt", DIRECT, "--wrap", "once")
    assert wrapped.document["prompt"]["tokens"] == chatml.document["prompt"]["tokens"]
    assert wrapped.code == 1


def test_a_missing_tensor_is_unreadable_and_a_bad_checksum_a_finding(apr: Path, layers: Callable[..., Run]) -> None:
    missing, _ = plant(apr, "tensor-missing")
    run = layers(missing, "--prompt", DIRECT)
    assert run.code == 4
    assert "model.layers.20.mlp.up_proj.weight" in run.words
    assert run.document == {}
    checksum, expected = plant(apr, "header-crc")
    run = layers(checksum, "--prompt", DIRECT)
    assert run.code == 0
    assert expected["finding"] in {finding["id"] for finding in run.document["findings"]}
