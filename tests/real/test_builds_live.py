"""llama.cpp's default build on real models: its kernels to the bit, and `layers` agrees with the file it runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aprjax.bisect.layers.compare import layers
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.open_sides import arithmetics, open_two
from aprjax.bisect.replay.judge import replay
from aprjax.bisect.report import LayersReport, Verdict
from aprjax.bisect.tokens.fed import TokensReport
from aprjax.bisect.traced import Traced, arithmetic_of
from aprjax.checkpoint import open_checkpoint
from aprjax.qwen2 import PRESETS, Stage
from aprjax.text.prompt import encode_prompt
from aprjax.trace.llama_cpp import LlamaOptions, run_llama_cpp

pytestmark = [pytest.mark.real_model, pytest.mark.llama_cpp, pytest.mark.usefixtures("llama_library")]

# Four tokens as it stands, and more than a dozen in the chat's template: fewer and more than tiles take.
QUESTION = "def fib(n):"


def compared(path: Path, ref: Path, options: LlamaOptions, tokens: list[int]) -> LayersReport:
    """What `layers --model 'llama.cpp[…]:PATH' --ref REF` reports."""
    trace = run_llama_cpp(path, tokens, options)
    arithmetic = arithmetic_of(trace)
    assert arithmetic is not None
    sides = Traced(trace, open_checkpoint(path), arithmetic), Runner(open_checkpoint(ref), arithmetic)
    asked = TokensReport("test", None, "none", tuple(tokens))
    return layers(*sides, tokens=asked, positions=tuple(range(len(tokens))))


def local_differences(report: LayersReport) -> list[float]:
    return [s.local_rel_l2 for layer in report.layers for s in layer.stages.values() if s.local_rel_l2 is not None]


@pytest.mark.parametrize(("users", "times"), [(False, "none"), (True, "once")])
def test_the_default_build_and_its_file_agree(
    model_path: Callable[[str], Path], llama_build: Callable[[str], Path], times: str, *, users: bool
) -> None:
    """With a float32 cache, and as `llama-cli` runs it: float16 and flash attention."""
    path = model_path("qwen2.5-coder-0.5b")
    kv = "f16" if users else "f32"
    library = str(llama_build("default"))
    options = LlamaOptions(kv, kv, flash_attention=users, tiled=True, repack=True, library=library)
    tokens = encode_prompt(open_checkpoint(path), QUESTION, times)
    report = compared(path, path, options, tokens)
    assert report.verdict is Verdict.AGREE
    assert report.first_divergence is None
    # Its kernels are followed on this processor, whichever it is: nothing is left to a tolerance.
    assert set(local_differences(report)) <= {0.0}


def test_the_larger_model_and_its_file_agree(
    model_path: Callable[[str], Path], llama_build: Callable[[str], Path]
) -> None:
    """Whose matrices are repacked (Q4_K) or tiled (Q6_K), all of them."""
    path = model_path("qwen2.5-coder-1.5b")
    options = LlamaOptions(tiled=True, repack=True, library=str(llama_build("default")))
    tokens = encode_prompt(open_checkpoint(path), QUESTION, "once")
    report = compared(path, path, options, tokens)
    assert report.verdict is Verdict.AGREE
    assert set(local_differences(report)) <= {0.0}


def test_every_node_of_the_avx2_build_is_explained_to_the_bit(
    model_path: Callable[[str], Path], llama_build: Callable[[str], Path]
) -> None:
    """More queries than flash attention's tile of 64, and three more than fours."""
    path = model_path("qwen2.5-coder-0.5b")
    checkpoint = open_checkpoint(path)
    options = LlamaOptions(
        "f16", "f16", flash_attention=True, tiled=True, repack=True, library=str(llama_build("avx2"))
    )
    trace = run_llama_cpp(path, encode_prompt(checkpoint, "word " * 80, "none")[:67], options)
    arithmetic = PRESETS["llama.cpp-default-flash"]
    assert arithmetic_of(trace) == arithmetic
    report = replay(trace, checkpoint, arithmetic)
    assert report.verdict is Verdict.AGREE
    assert report.mismatches == 0


def test_a_file_that_differs_in_one_tensor_is_named_by_its_stage(
    model_path: Callable[[str], Path], llama_build: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another build, other kernels: the accusation is the tensor's, not the build's."""
    path = model_path("qwen2.5-coder-0.5b")
    checkpoint = open_checkpoint(path)
    name = next(n for n, t in checkpoint.tensors.items() if n.endswith("down_proj.weight") and t.block_type == "Q4_K")
    layer = int(name.split(".")[2])
    tensor = checkpoint.tensors[name]
    assert tensor.offset is not None
    changed = tmp_path / "changed.gguf"
    shutil.copy(path, changed)
    with changed.open("r+b") as stream:
        for block in range(0, 4000, 20):
            stream.seek(tensor.offset + block * 144 + 143)  # a byte of codes
            byte = stream.read(1)[0] ^ 0x99
            stream.seek(-1, 1)
            stream.write(bytes([byte]))
    other = open_checkpoint(changed)
    assert not np.array_equal(other.tensors[name].decode(), tensor.decode())
    options = LlamaOptions(tiled=True, repack=True, library=str(llama_build("default")))
    report = compared(changed, path, options, encode_prompt(checkpoint, QUESTION, "none"))
    assert report.verdict is Verdict.DIVERGENCE
    first = report.first_divergence
    assert first is not None
    assert (first.layer, first.stage) == (layer, Stage.FFN_OUT)
    assert name in first.cause


def test_both_sides_are_given_the_builds_arithmetic(
    model_path: Callable[[str], Path], llama_build: Callable[[str], Path]
) -> None:
    path = model_path("qwen2.5-coder-0.5b")
    sides = open_two(f"llama.cpp[library={llama_build('avx2')},repack,tiled]:{path}", str(path))
    chosen = arithmetics(sides, None, both=None, model=None, ref=None)
    assert chosen == (PRESETS["llama.cpp-default"],) * 2
