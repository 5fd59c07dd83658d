"""Models over several devices equal models on one: `mesh_child.py` and `hosts_child.py` compute in their own processes.

A relative difference of 1e-6 is what the project promises of float sums; a model's stages, and products, are held to
the bit.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny import CONFIG

from aprjax.checkpoint.types import canonical_tensor_shapes
from aprjax.cli import main
from aprjax.qwen2.device_memory import device_memory
from aprjax.qwen2.sharding import MeshError, current_mesh, device_mesh, use_mesh

HERE = Path(__file__).parent
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")
SMALL = 1e-6


def output_of(process: subprocess.Popen[str]) -> dict:
    """The JSON in a process's last line: gloo writes its own before it."""
    out, errors = process.communicate(timeout=800)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def in_child(*cases: str) -> dict:
    return output_of(start("mesh_child.py", *cases))


def assert_products(found: dict, names: tuple[str, ...]) -> None:
    assert set(found) == set(names)
    for name, product in found.items():
        assert max(product["relative"], product["gradient"]) <= SMALL, name
        if name in QUANTIZED:
            assert product["equal"], name
        # Every array of the weight lies on all eight devices, an eighth on each.
        assert product["devices"] == [8], name
        assert product["shares"] == [True], name


def test_products_and_attention_over_eight_devices_are_those_of_one():
    found = in_child("products:Q8_0", "attention:6:2:8")
    assert_products(found["products:Q8_0"], ("Q8_0",))
    assert max(found["attention:6:2:8"].values()) <= SMALL


@pytest.mark.thorough
def test_every_block_type_over_eight_devices_is_that_of_one():
    case = ":".join(("products", *QUANTIZED, *FLOATS))
    assert_products(in_child(case)[case], (*QUANTIZED, *FLOATS))


@pytest.mark.thorough
def test_attention_with_any_number_of_heads():
    cases = [
        f"attention:{heads}:{kv}:{n}" for heads, kv, n in ((4, 4, 2), (6, 2, 3), (14, 2, 8), (28, 4, 8), (5, 1, 2))
    ]
    for case, found in in_child(*cases).items():
        assert max(found.values()) <= SMALL, case


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["llama.cpp:8", "llama.cpp-default:3"])
def test_an_engines_arithmetic_is_that_of_one_device_to_the_bit(case):
    """`llama.cpp-default` takes its kernel by the number of rows, of the matrix and not of a device's part."""
    (found,) = in_child(f"model:{case}").values()
    assert len(found["free"]) == 20
    assert set(found["free"].values()) == {0.0}


@pytest.mark.thorough
def test_float32_over_eight_devices():
    (found,) = in_child("model:float32:8").values()
    # From one device's inputs there are eleven positions, where one device had sixteen, five of them padding.
    assert max(found["local"].values()) <= SMALL
    assert set(found["free"].values()) == {0.0}


@pytest.mark.thorough
def test_float32_with_large_scores_over_devices_is_that_of_one_to_the_bit():
    (found,) = in_child("large_scores:float32:2:3:8").values()
    assert found.pop("largest") > 1000
    assert found == {"2": 0.0, "3": 0.0, "8": 0.0}


# Each way to multiply, to attend and to quantize.
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("realizar", 8),
        ("realizar-integer", 2),
        ("llama.cpp-exact", 2),
        ("llama.cpp-flash", 8),
        ("float64", 2),
        ("q8_1", 8),
    ],
)
def test_every_stage_of_an_arithmetic_over_devices(name, devices):
    (found,) = in_child(f"every_stage:{name}:{devices}").values()
    assert found == {str(devices): 0.0}


@pytest.mark.thorough
def test_decoding_over_devices_gives_the_same_tokens():
    found = in_child("decoding")["decoding"]
    assert found["many"] == found["batch"] == found["one"]


@pytest.mark.thorough
def test_each_device_holds_its_part_and_no_more():
    found = in_child("memory")["memory"]
    assert found["held"] == [found["said"]] * 8
    assert found["said"] < found["whole"] / 7.9


@pytest.mark.thorough
def test_the_command_line_over_devices():
    found = in_child("command_line")["command_line"]
    assert (found["code"], found["verdict"]) == (0, "agree")
    assert found["split"] == [2] * 8


@pytest.mark.thorough
def test_two_hosts_compute_what_one_does():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one = output_of(start("hosts_child.py", port, 1, 0))
    hosts = [start("hosts_child.py", port, 2, index) for index in range(2)]
    for found in map(output_of, hosts):
        assert found["devices"] == 4
        assert found["logits"] == one["logits"]
        assert sum(found["mine"]) * 2 == found["bytes"] == one["bytes"]


def test_a_mesh_that_there_is_not_is_refused(capsys):
    most = len(jax.devices())
    for count, said in ((most + 1, f"found {most}"), (0, "at least one")):
        with pytest.raises(MeshError, match=said):
            device_mesh(count)
    assert main(["run", "model.gguf", "--tokens", "1,2", "--mesh", str(most + 1)]) == 2
    assert "devices was asked for" in re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert main(["layers", "--model", "a", "--ref", "b", "--mesh", "0"]) == 2


def test_a_mesh_is_used_inside_and_not_beyond():
    assert current_mesh() is None
    with use_mesh(1) as mesh:
        assert current_mesh() is mesh
        with use_mesh(None):
            assert current_mesh() is None
        assert current_mesh() is mesh
    with pytest.raises(MeshError), use_mesh(len(jax.devices()) + 1):
        pass
    assert current_mesh() is None


SIZES = {
    "7B": {"hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "intermediate_size": 18944},
    "72B": {"hidden_size": 8192, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8, "intermediate_size": 29568},
}


def test_the_documented_memory_is_what_the_shapes_say():
    page = (HERE.parents[1] / "docs" / "devices.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+B) \| (\w+) \| ([\d. |]+) \|$", page, re.M)
    assert len(rows) == 6
    for size, block_type, cells in rows:
        config = replace(CONFIG, **SIZES[size], head_dim=128, vocab_size=152064)
        shapes = canonical_tensor_shapes(config)

        def typed(name: str, block_type: str = block_type, shapes: dict = shapes) -> str:
            return "Q5_0" if block_type == "Q4_K" and shapes[name][1] % 256 else block_type

        for devices, cell in zip((1, 2, 4, 8), cells.split(" | "), strict=True):
            total = device_memory(config, typed, devices=devices, positions=4096).total
            assert f"{total / 2**30:.2f}" == cell, (size, block_type, devices)
