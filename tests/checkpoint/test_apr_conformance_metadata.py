"""Conformance cases 11 to 18 of apr-format.md 10: the metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from apr_drafts import TINY, compact, draft, finding_ids

from aprjax.checkpoint.apr_metadata import ALIASES
from aprjax.checkpoint.apr_reader import read_apr
from aprjax.checkpoint.apr_writer import STRUCT_ORDER, RawEntry, write_apr, write_container
from aprjax.checkpoint.types import CheckpointError


def with_keys(path: Path, drop: tuple[str, ...] = (), **keys: Any) -> Any:
    changed = draft()
    changed.metadata = {key: value for key, value in changed.metadata.items() if key not in drop} | keys
    return changed.read(path)


def with_text(path: Path, text: bytes) -> Path:
    sound = draft()
    entries = [RawEntry(n, p.dtype, p.shape, len(p.data), lambda p=p: (p.data,)) for n, p in sound.tensors.items()]
    with path.open("wb") as stream:
        write_container(stream, metadata=text, entries=entries)
    return path


def test_case_11_nulls_and_omissions_give_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "a.apr"
    omitted = draft().read(path)
    nulls = {key: None for key in STRUCT_ORDER if key not in draft().metadata}
    filled = with_keys(path, **nulls)
    assert finding_ids(omitted) == set()
    assert finding_ids(filled) == {"apr-metadata-nulls"}
    assert filled.config == omitted.config == TINY
    assert filled.vocabulary == omitted.vocabulary


@pytest.mark.parametrize(("canonical", "alias"), [(c, a) for c, aliases in ALIASES.items() for a in aliases])
def test_case_12_aliases(tmp_path: Path, canonical: str, alias: str) -> None:
    path = tmp_path / "a.apr"
    value = draft().metadata[canonical]
    alone = with_keys(path, (canonical,), **{alias: value})
    assert finding_ids(alone) == set()
    assert alone.config == TINY
    both = with_keys(path, **{alias: value})
    assert finding_ids(both) == {"apr-metadata-poison"}
    assert both.config == TINY
    with_null = with_keys(path, **{alias: None})
    assert finding_ids(with_null) == {"apr-metadata-poison", "apr-metadata-null-shadows", "apr-metadata-nulls"}
    assert with_null.config == TINY


def test_case_12_two_aliases_poison_as_well(tmp_path: Path) -> None:
    checkpoint = with_keys(tmp_path / "a.apr", ("num_layers",), n_layers=2, n_layer=2)
    assert finding_ids(checkpoint) == {"apr-metadata-poison"}


def test_case_13_null_shadows(tmp_path: Path) -> None:
    checkpoint = with_keys(tmp_path / "a.apr", num_hidden_layers=None)
    assert "apr-metadata-null-shadows" in finding_ids(checkpoint)
    assert checkpoint.config.num_layers == 2
    hidden = with_keys(tmp_path / "b.apr", architecture=None)
    assert {"apr-metadata-null-shadows", "apr-architecture-absent"} <= finding_ids(hidden)
    assert hidden.config.architecture == "qwen2"


def test_case_14_quantization_as_text_and_duplicate_keys(tmp_path: Path) -> None:
    checkpoint = with_keys(tmp_path / "a.apr", quantization="Q4_K_M")
    assert finding_ids(checkpoint) == {"apr-quantization-not-object"}
    text = compact(draft().metadata)
    twice = text.replace(b'"rope_type":2', b'"rope_type":0,"rope_type":2')
    checkpoint = read_apr(with_text(tmp_path / "b.apr", twice))
    assert finding_ids(checkpoint) == {"apr-metadata-duplicate-key"}
    assert checkpoint.config.rope_pairing == "neox", "the last one counts"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num_layers", 2.0, 2),
        ("num_layers", "2", 2),
        ("hidden_size", 8.0, 8),
        ("rope_theta", "1000000", 1e6),
        ("rms_norm_eps", "1e-6", 1e-6),
    ],
)
def test_case_14_wrong_types_are_read_and_reported(tmp_path: Path, key: str, value: Any, wanted: Any) -> None:
    checkpoint = with_keys(tmp_path / "a.apr", **{key: value})
    assert finding_ids(checkpoint) == {"apr-metadata-type"}
    assert getattr(checkpoint.config, key) == wanted


@pytest.mark.parametrize("key", ["name", "total_size", "special_tokens"])
def test_case_14_wrong_types_of_keys_that_only_realizar_parses(tmp_path: Path, key: str) -> None:
    assert finding_ids(with_keys(tmp_path / "a.apr", **{key: [1]})) == {"apr-metadata-type"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"architecture":"qwen2",}',
        b'{"architecture":"\xff"}',
        b"[" * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"architecture":"qwen2","name":"\\ud800"}',
    ],
)
def test_case_15_invalid_json(tmp_path: Path, text: bytes) -> None:
    path = with_text(tmp_path / "a.apr", text)
    with pytest.raises(CheckpointError) as caught:
        read_apr(path)
    assert caught.value.file == str(path)
    assert caught.value.offset is not None


def test_case_15_the_place_of_the_error_is_named(tmp_path: Path) -> None:
    text = '{"ö":1,"b":x}'.encode()
    with pytest.raises(CheckpointError) as caught:
        read_apr(with_text(tmp_path / "a.apr", text))
    assert caught.value.offset == 64 + text.index(b"x")


def test_case_15_padding_counted_as_metadata(tmp_path: Path) -> None:
    path = with_text(tmp_path / "a.apr", compact(draft().metadata) + bytes(9))
    assert finding_ids(read_apr(path)) == {"apr-metadata-padding"}


@pytest.mark.parametrize(
    "case",
    [
        ("rope_type", {}, {"apr-rope-type-absent"}, "rope_pairing", "neox"),
        ("", {"rope_type": 0}, {"apr-rope-type-wrong"}, "rope_pairing", "norm"),
        ("", {"rope_type": 2}, set(), "rope_pairing", "neox"),
        ("", {"rope_type": 7}, {"apr-rope-type-unknown"}, "rope_pairing", "neox"),
        ("rope_theta", {}, {"apr-rope-theta-absent"}, "rope_theta", 1e6),
        ("", {"rope_theta": 10000}, {"apr-rope-theta-unusual"}, "rope_theta", 1e4),
        ("rms_norm_eps", {}, {"apr-eps-absent"}, "rms_norm_eps", 1e-6),
        ("", {"rms_norm_eps": 1e-5}, {"apr-eps-unusual"}, "rms_norm_eps", 1e-5),
        ("", {"rms_norm_eps": 9.999999974752427e-07}, set(), "rms_norm_eps", 1e-6),
        ("num_kv_heads", {}, {"apr-kv-heads-absent"}, "num_kv_heads", 1),
        ("", {"num_kv_heads": 2}, {"apr-kv-heads-contradicted"}, "num_kv_heads", 1),
        ("head_dim", {}, set(), "head_dim", 4),
        ("", {"head_dim": 2}, {"apr-head-dim-contradicted"}, "head_dim", 4),
        ("num_heads", {}, {"apr-dimension-absent"}, "num_heads", 2),
        ("hidden_size", {}, {"apr-dimension-absent"}, "hidden_size", 8),
        ("", {"hidden_size": 16}, {"apr-dimension-contradicted"}, "hidden_size", 8),
        ("intermediate_size", {}, {"apr-dimension-absent"}, "intermediate_size", 12),
        ("vocab_size", {}, {"apr-dimension-absent"}, "vocab_size", 20),
        ("", {"vocab_size": 30}, {"apr-dimension-contradicted"}, "vocab_size", 20),
        ("num_layers", {}, {"apr-dimension-absent"}, "num_layers", 2),
        ("", {"num_layers": 1}, {"apr-dimension-contradicted", "unexpected-tensor"}, "num_layers", 1),
        ("max_position_embeddings", {}, {"apr-context-absent"}, "max_position_embeddings", 32768),
        ("", {"model.rope_theta": 10000.0}, {"apr-metadata-mirror"}, "rope_theta", 1e6),
        ("", {"architecture": "Qwen2"}, {"apr-architecture-spelling"}, "architecture", "qwen2"),
        ("", {"architecture": "llama"}, {"apr-architecture-other", "apr-rope-type-wrong"}, "architecture", "llama"),
    ],
)
def test_case_16_constants_and_dimensions(tmp_path: Path, case: tuple[str, dict[str, Any], set[str], str, Any]) -> None:
    drop, keys, expected, field, value = case
    checkpoint = with_keys(tmp_path / "a.apr", (drop,), **keys)
    assert finding_ids(checkpoint) == expected
    assert getattr(checkpoint.config, field) == value


@pytest.mark.parametrize(
    "keys",
    [
        {"num_layers": 10**9},
        {"num_layers": 0},
        {"num_layers": -3},
        {"num_heads": 300},
        {"num_heads": 0},
        {"max_position_embeddings": 10**12},
        {"rope_theta": 1e300},
        {"rope_theta": -5.0},
        {"rms_norm_eps": 0.5},
        {"rms_norm_eps": 0},
    ],
)
def test_case_16_beyond_all_bounds_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(keys))):
        with_keys(tmp_path / "a.apr", **keys)


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize(("key", "default"), [("rope_theta", 1e6), ("rms_norm_eps", 1e-6)])
def test_case_16_constants_that_are_not_finite(tmp_path: Path, constant: bytes, key: str, default: float) -> None:
    text = compact({name: value for name, value in draft().metadata.items() if name != key})
    text = text[:-1] + b',"%s":%s}' % (key.encode(), constant)
    checkpoint = read_apr(with_text(tmp_path / "a.apr", text))
    assert "apr-metadata-not-finite" in finding_ids(checkpoint)
    assert getattr(checkpoint.config, key) == default


def test_case_17_vocabulary_and_merges_absent(tmp_path: Path) -> None:
    checkpoint = with_keys(tmp_path / "a.apr", ("tokenizer.vocabulary",))
    assert finding_ids(checkpoint) == {"apr-vocabulary-absent"}
    assert checkpoint.vocabulary is None
    checkpoint = with_keys(tmp_path / "b.apr", ("tokenizer.merges",))
    assert finding_ids(checkpoint) == {"apr-merges-absent", "merges-missing"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tokenizer.merges": ["a b", "nospace"]}, {"apr-merge-without-space"}),
        ({"tokenizer.merges": [["a", "b"], ["ab", "c"]]}, {"apr-merges-as-pairs"}),
        ({"tokenizer.merges": ["a b", "ab c d"]}, set()),
        ({"tokenizer.vocabulary": "abc"}, {"apr-tokenizer-type", "apr-vocabulary-absent"}),
        ({"tokenizer.vocabulary": ["a", 5]}, {"apr-tokenizer-type", "apr-vocabulary-absent"}),
        ({"tokenizer.eos_token_id": "19"}, {"apr-tokenizer-type"}),
        ({"tokenizer.eos_token_id": 1000}, {"token-id-out-of-range"}),
        ({"tokenizer.token_type": [1, "x"]}, {"apr-tokenizer-type"}),
        ({"tokenizer.token_type": [1] * 3}, {"token-types-length"}),
        ({"tokenizer.pre_type": None}, {"apr-pre-tokenizer-absent", "apr-metadata-nulls"}),
        ({"tokenizer.vocabulary": [f"t{i}" for i in range(20)]}, {"apr-chatml-tokens-absent"}),
        ({"tokenizer.vocabulary": ["<|im_start|>"] * 5, "tokenizer.eos_token_id": 1, "tokenizer.bos_token_id": 1},
         {"vocabulary-padded"}),
    ],
)  # fmt: skip
def test_case_17_tokenizer_keys(tmp_path: Path, keys: dict[str, Any], expected: set[str]) -> None:
    assert finding_ids(with_keys(tmp_path / "a.apr", **keys)) == expected


def test_case_17_merge_with_a_space_in_its_right_half(tmp_path: Path) -> None:
    checkpoint = with_keys(tmp_path / "a.apr", **{"tokenizer.merges": ["a b", "ab c d"]})
    assert checkpoint.vocabulary is not None
    assert checkpoint.vocabulary.merges == ("a b", "ab c d")


@pytest.mark.parametrize(
    ("top", "tokenizers", "wanted", "expected"),
    [
        ("T", None, "T", set()),
        (None, "T", "T", set()),
        ("T", "T", "T", set()),
        ("T", "U", "T", {"apr-chat-templates-differ"}),
        (None, None, None, {"apr-chat-template-absent"}),
    ],
)
def test_case_17_chat_template_places(
    tmp_path: Path, top: str | None, tokenizers: str | None, wanted: str | None, expected: set[str]
) -> None:
    keys = {"chat_template": top, "tokenizer.chat_template": tokenizers}
    present = {key: value for key, value in keys.items() if value is not None}
    checkpoint = with_keys(tmp_path / "a.apr", ("chat_template",), **present)
    assert finding_ids(checkpoint) == expected
    assert checkpoint.chat_template == wanted


def test_case_18_custom_keys_survive_a_round_trip(tmp_path: Path) -> None:
    source = draft().read(tmp_path / "a.apr")
    extra = {"num_experts": 8, "moe_intermediate_size": 64, "custom.key": {"a": [1, "ö"]}, "license": "Apache-2.0"}
    write_apr(
        tmp_path / "b.apr",
        config=source.config,
        tensors=source.tensors.values(),
        vocabulary=source.vocabulary,
        chat_template=source.chat_template,
        extra_metadata=extra,
    )
    again = read_apr(tmp_path / "b.apr", verify=True)
    assert finding_ids(again) == set()
    assert extra.items() <= again.metadata.items()
    assert again.metadata["head_dim"] == 4
    assert again.config == source.config
