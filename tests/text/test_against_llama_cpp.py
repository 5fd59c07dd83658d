"""Token ids, pieces and stop tokens equal llama.cpp's."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from aprjax.text import PROBES, Tokenizer

from .corpus import corpus
from .llama_tokenizer import LlamaTokenizer
from .synthetic import SPECIALS, disagreements

pytestmark = pytest.mark.llama_cpp

parsing = pytest.mark.parametrize("parse_special", [True, False])
# Any code point but surrogates, with special tokens and the pre-tokenizer's favourites mixed in.
texts = st.lists(
    st.one_of(st.text(max_size=6), st.sampled_from((*SPECIALS, " ", "\n", "'S", "'re", "\r\n", "7", "</s>", "ſ")))
).map("".join)


def compare(texts, ours: Tokenizer, theirs: LlamaTokenizer, *, parse_special: bool) -> list[str]:
    return disagreements(
        texts,
        lambda text: ours.encode(text, parse_special=parse_special),
        lambda text: theirs.encode(text, parse_special=parse_special),
    )


def test_the_corpus_is_as_large_and_varied_as_promised():
    strings = corpus()
    assert len(strings) >= 2000
    assert len({kind for kind, _ in strings}) >= 20
    assert strings == corpus()


@parsing
def test_small_vocabulary_encodes_alike(small, small_peer, parse_special):
    overlapping = [
        ("overlap", f"a{first}{second[cut:]}") for first in SPECIALS for second in SPECIALS for cut in range(4)
    ]
    found = compare([*corpus(), *overlapping], small, small_peer, parse_special=parse_special)
    assert not found, found[:5]


@parsing
@given(text=texts)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_encodes_alike(small, small_peer, parse_special, text):
    ours = small.encode(text, parse_special=parse_special)
    assert ours == small_peer.encode(text, parse_special=parse_special)


def test_small_vocabulary_decodes_and_stops_alike(small, small_peer):
    assert len(small) == len(small_peer)
    for index in range(len(small)):
        if small.vocabulary.tokens[index] == "":
            continue  # llama.cpp gives empty entries a text of its own, "[EMPTY_…]"
        for special in (True, False):
            assert small.decode_bytes([index], skip_special=not special) == small_peer.piece(index, special=special)
    assert small.stop_ids == {index for index in range(len(small)) if small_peer.ends_generation(index)}


@pytest.mark.real_model
@parsing
def test_qwen_vocabulary_encodes_alike(real, real_peer, parse_special):
    found = compare(corpus(), real, real_peer, parse_special=parse_special)
    assert not found, found[:5]


@pytest.mark.real_model
@parsing
@given(text=texts)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_encodes_alike_with_qwen_vocabulary(real, real_peer, parse_special, text):
    assert real.encode(text, parse_special=parse_special) == real_peer.encode(text, parse_special=parse_special)


@pytest.mark.real_model
def test_every_qwen_token_decodes_alike_and_stops_alike(real, real_peer):
    assert len(real) == len(real_peer) == 151_936
    for special in (True, False):
        differing = [
            index
            for index in range(len(real))
            if real.decode_bytes([index], skip_special=not special) != real_peer.piece(index, special=special)
        ]
        assert not differing, differing[:5]
    assert real.stop_ids == {index for index in range(len(real)) if real_peer.ends_generation(index)}


@pytest.mark.real_model
def test_the_probes_are_the_tokens_of_the_story(real, real_peer):
    tokens = {probe.name: real.encode(probe.prompt()) for probe in PROBES}
    assert tokens["direct"] == [3838, 374, 220, 17, 10, 17, 30]
    assert tokens["chatml"] == [151644, 872, 198, *tokens["direct"], 151645, 198, 151644, 77091, 198]
    assert 480 <= len(tokens["long"]) <= 520
    for probe in PROBES:
        assert tokens[probe.name] == real_peer.encode(probe.prompt(), parse_special=True)
