"""Hugging Face folders: read as safetensors and transformers read them, written so that transformers loads them."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_gguf import TEMPLATE, TINY, tiny_tensors, write_tiny_gguf

from aprjax.blocks import dequantize
from aprjax.checkpoint import CheckpointError, open_checkpoint
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.hf_tokenizer import QWEN2_WORDS
from aprjax.checkpoint.safetensors_reader import read_safetensors
from aprjax.checkpoint.safetensors_writer import write_safetensors
from aprjax.checkpoint.tensor_plan import PlannedTensor
from aprjax.checkpoint.types import canonical_tensor_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of float16 weights with its tokenizer, written by aprjax from gguf-py's file."""
    convert(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> Path:
    """Change or (with None) remove keys of a JSON file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_weights_read_as_the_official_library_reads_them(folder: Path) -> None:
    from safetensors.numpy import load_file

    reference = load_file(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.findings == ()
    assert checkpoint.config == TINY
    assert set(checkpoint.tensors) == set(reference) == set(canonical_tensor_shapes(TINY))
    for name, values in reference.items():
        tensor = checkpoint.tensors[name]
        assert tensor.shape == values.shape
        assert {"F16": np.float16, "F32": np.float32}[tensor.block_type] == values.dtype
        assert tensor.data.tobytes() == values.tobytes()
        with open(tensor.file, "rb") as stream:
            stream.seek(tensor.offset)
            assert stream.read(tensor.nbytes) == values.tobytes()


def test_files_of_the_official_library_are_read(folder: Path) -> None:
    from safetensors.numpy import save_file

    random = np.random.default_rng(1)
    values = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in canonical_tensor_shapes(TINY).items()
    }
    save_file(values, folder / "model.safetensors", metadata={"format": "pt", "author": "someone"})
    checkpoint = read_safetensors(folder / "model.safetensors")
    for name, expected in values.items():
        assert np.array_equal(checkpoint.tensors[name].decode(), expected)
    assert checkpoint.metadata["__metadata__"] == {"format": "pt", "author": "someone"}


def test_the_vocabulary_survives_the_folder(folder: Path, tmp_path: Path) -> None:
    before, after = open_checkpoint(tmp_path / "tiny.gguf"), open_checkpoint(folder)
    assert after.vocabulary == before.vocabulary
    assert after.chat_template == before.chat_template == TEMPLATE


def test_the_word_pattern_is_hugging_faces(folder: Path) -> None:
    # The pattern in transformers' own slow-to-fast converter for Qwen2.
    content = json.loads((folder / "tokenizer.json").read_text())
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN2_WORDS}
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False})
    checkpoint = open_checkpoint(folder)
    assert [finding.id for finding in checkpoint.findings] == ["pre-tokenizer-unknown"]
    assert checkpoint.vocabulary is not None
    assert checkpoint.vocabulary.pre_tokenizer is None


def test_merges_as_pairs_and_the_older_tokenizer_files_read_the_same(folder: Path) -> None:
    expected = open_checkpoint(folder).vocabulary
    assert expected is not None
    content = json.loads((folder / "tokenizer.json").read_text())
    merges, vocab = content["model"]["merges"], content["model"]["vocab"]
    content["model"]["merges"] = [merge.split(" ") for merge in merges]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert open_checkpoint(folder).vocabulary == expected
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    assert open_checkpoint(folder).vocabulary == expected
    (folder / "chat_template.jinja").write_text("other")
    assert open_checkpoint(folder).chat_template == "other"


def shard(folder: Path) -> list[str]:
    """Cut the folder's weights in three with the official library; returns the file names."""
    from safetensors.numpy import load_file, save_file

    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    weight_map = {name: names[number % 3] for number, name in enumerate(values)}
    for file in names:
        save_file({name: array for name, array in values.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_shards_read_as_the_whole(folder: Path) -> None:
    whole = {name: tensor.sha256() for name, tensor in open_checkpoint(folder).tensors.items()}
    names = shard(folder)
    for path in (folder, folder / names[1]):
        checkpoint = open_checkpoint(path)
        assert checkpoint.findings == ()
        assert {name: tensor.sha256() for name, tensor in checkpoint.tensors.items()} == whole
        assert [file.name for file in checkpoint.files] == names


def test_missing_and_strange_shards_are_refused(folder: Path) -> None:
    names = shard(folder)
    (folder / names[2]).rename(folder / "spare")
    with pytest.raises(CheckpointError, match=f"missing weight files: {names[2]}"):
        open_checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    for strange in ("../../etc/passwd", "/etc/passwd", 7, ""):
        index.write_text(json.dumps({"weight_map": {"a": strange}}))
        with pytest.raises(CheckpointError, match=r"is no name of a file|missing weight files"):
            open_checkpoint(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files but no model"):
        open_checkpoint(folder)


def test_an_index_that_misplaces_tensors_is_a_finding(folder: Path) -> None:
    names = shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = next(name for name, file in weight_map.items() if file == names[0])
    index.write_text(json.dumps({"weight_map": weight_map | {moved: names[1]}}))
    findings = open_checkpoint(folder).findings
    assert [(finding.id, finding.tensor) for finding in findings] == [("safetensors-index-mismatch", moved)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "expected model_type 'qwen2', found 'llama'"),
        ({"num_attention_heads": 0}, "num_attention_heads between 1 and 256, found 0"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers between"),
        ({"hidden_size": None}, "expected an integer hidden_size, found nothing"),
        ({"rope_theta": "1e6"}, "expected a number rope_theta, found '1e6'"),
        ({"rope_theta": float("nan")}, "rope_theta between 1 and 1e[+]08, found nan"),
        ({"rope_theta": 10**400}, "rope_theta between"),
        ({"rope_scaling": []}, "expected rope_parameters as an object"),
    ],
)
def test_impossible_configs_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"rope_theta": None}, "rope-theta-defaulted"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope-scaling-unsupported"),
        ({"use_sliding_window": True}, "sliding-window-unsupported"),
        ({"hidden_act": "gelu"}, "activation-unsupported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization-unsupported"),
        ({"tie_word_embeddings": True}, "tied-head-ignored"),
    ],
)
def test_odd_configs_are_findings(folder: Path, changes: dict[str, Any], finding: str) -> None:
    edit(folder / "config.json", **changes)
    assert [found.id for found in open_checkpoint(folder).findings] == [finding]


def test_newer_rope_parameters_are_read(folder: Path) -> None:
    edit(folder / "config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.rope_theta == 5e5
    assert checkpoint.findings == ()


def test_a_tied_head_of_the_file_is_not_used(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.tied_head()
    assert checkpoint.findings[0].severity == "warning"


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    convert(write_tiny_gguf(tmp_path / "t.gguf", tiny_tensors(tied=True)), tmp_path / "m")
    assert open_checkpoint(tmp_path / "m").findings == ()
    edit(tmp_path / "m" / "config.json", tie_word_embeddings=False)
    assert [(f.id, f.tensor) for f in open_checkpoint(tmp_path / "m").findings] == [
        ("missing-tensor", "lm_head.weight")
    ]


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(dtype="F8_E4M3")}, "dtype 'F8_E4M3' holds no weights"),
        ({"a": entry(shape=(3,))}, r"F32 \[3\] takes 12 bytes, data_offsets say 8"),
        ({"a": entry(offsets=(8, 0))}, "takes 8 bytes, data_offsets say -8"),
        ({"a": entry(offsets=(4, 12))}, "takes bytes .* the file ends at"),
        ({"a": entry(offsets=(0, 2**63))}, "expected two data_offsets"),
        ({"a": entry(shape=(2**40, 2**40))}, "expected a shape"),
        ({"a": entry(shape=(-1,))}, "expected a shape"),
        ({"a": entry(shape=(1.5,))}, "expected a shape"),
        ({"a": entry(shape=(True,))}, "expected a shape"),
        ({"a": []}, "expected an object in the header, found list"),
        ({"__metadata__": {"format": 1}}, "expected __metadata__ to map strings to strings"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
        (b'{"a": ' + b"[" * 100_000, "the JSON cannot be read|expected JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the JSON cannot be read"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b"{", "expected JSON"),
    ],
)
def test_damaged_weight_files_are_refused(folder: Path, header: Any, message: str) -> None:
    write_header(folder / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / "model.safetensors")
    assert caught.value.offset is not None


def test_a_header_length_beyond_the_file_is_refused(folder: Path) -> None:
    for length in (2**64 - 1, 2**32, 100):
        write_header(folder / "model.safetensors", {}, length=length)
        with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
            open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="the file ends after 3"):
        open_checkpoint(folder)


def test_gaps_overlaps_and_trailing_bytes_are_findings(folder: Path) -> None:
    def ids(header: dict[str, Any], data: bytes) -> Counter[str]:
        write_header(folder / "model.safetensors", header, data)
        return Counter(
            f.id for f in open_checkpoint(folder).findings if f.id not in ("missing-tensor", "unexpected-tensor")
        )

    assert ids({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16)) == {}
    assert ids({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)) == {"safetensors-gap": 1}
    assert ids({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)) == {"safetensors-gap": 1, "tensor-overlap": 1}
    assert ids({"a": entry()}, bytes(9)) == {"safetensors-trailing-bytes": 1}


def test_pickles_are_named_and_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, a pickle, which could run code"):
        open_checkpoint(folder)


def test_large_models_are_cut_into_shards(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    write_safetensors(
        tmp_path / "shards",
        config=checkpoint.config,
        tensors=[PlannedTensor(name, tensor, tensor.block_type) for name, tensor in checkpoint.tensors.items()],
        vocabulary=None,
        chat_template=None,
        metadata={},
        max_shard_bytes=1_000_000,
    )
    files = sorted(path for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 1_100_000 for path in files)
    again = open_checkpoint(tmp_path / "shards")
    assert {name: tensor.sha256() for name, tensor in again.tensors.items()} == {
        name: tensor.sha256() for name, tensor in checkpoint.tensors.items()
    }
    assert [finding.id for finding in again.findings] == ["vocabulary-missing"]


@pytest.mark.thorough
@pytest.mark.transformers_peer
@pytest.mark.parametrize(("tied", "dtype"), [(False, "auto"), (True, "auto"), (False, "F32"), (True, "BF16")])
def test_transformers_loads_the_folder(transformers: ModuleType, tmp_path: Path, tied: bool, dtype: Any) -> None:
    import torch

    types = {"model.layers.0.mlp.gate_proj.weight": "Q4_K", "model.layers.1.mlp.down_proj.weight": "Q6_K"}
    source = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_tensors(types=types, tied=tied))
    convert(source, tmp_path / "model", dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.tie_word_embeddings is tied
    rope = getattr(model.config, "rope_parameters", None) or {"rope_theta": model.config.rope_theta}
    assert rope["rope_theta"] == TINY.rope_theta
    if dtype == "F32":
        weights = model.state_dict()
        for name, tensor in open_checkpoint(source).tensors.items():
            values = dequantize(tensor.block_type, tensor.data, tensor.shape)
            assert np.array_equal(weights[name].numpy(), values), name
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "<|im_start|>user\nHello, wörld 123!<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert tokenizer.encode("<|im_start|>") == [298]
    assert tokenizer.eos_token_id == 299
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.transformers_peer
def test_folders_that_transformers_saved_are_read(transformers: ModuleType, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=99, max_position_embeddings=77, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert [finding.id for finding in checkpoint.findings] == ["vocabulary-missing"]
    assert (checkpoint.config.hidden_size, checkpoint.config.rms_norm_eps) == (64, 1e-5)
    assert checkpoint.config.max_position_embeddings == 77
    assert "lm_head.weight" not in checkpoint.tensors
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":
            assert checkpoint.tensors[name].block_type == "BF16"
            assert np.array_equal(checkpoint.tensors[name].decode(), values.float().numpy())


@pytest.mark.real_model
@pytest.mark.transformers_peer
def test_the_real_tokenizer_written_for_transformers_gives_the_gguf_files_ids(
    transformers: ModuleType, model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    from aprjax.checkpoint.hf_tokenizer import tokenizer_files

    checkpoint = open_checkpoint(model_path("qwen2.5-coder-1.5b"))
    assert checkpoint.vocabulary is not None
    for name, content in tokenizer_files(checkpoint.vocabulary, checkpoint.chat_template).items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # The ids that llama.cpp gives (design, "the main job").
    assert tokenizer.encode("What is 2+2?") == [3838, 374, 220, 17, 10, 17, 30]
    assert tokenizer.encode("<|im_start|>user\n")[:2] == [151644, 872]
    assert tokenizer.decode(tokenizer.encode("naïve 東京 🚀\t\n  x")) == "naïve 東京 🚀\t\n  x"
