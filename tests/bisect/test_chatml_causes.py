"""Each cause planted in a made-up table is blamed, alone and together with others, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chatml_tables import DEGENERATE, PROMPTS, SAME, SIDES, SOUND, STOP, factorial, settle, supported
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_checkpoint

from aprjax.bisect.chatml import noise
from aprjax.bisect.chatml.causes import find_causes
from aprjax.bisect.chatml.cells import PairFacts, RunKey
from aprjax.bisect.chatml.partings import pairings
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.noise.logits import LogitNoise

WRAPPED = frozenset((name, wrap) for name in PROMPTS for wrap in ("once", "twice"))
ROWS = PairFacts(
    identical_weights=False, special_rows=("<|im_start|>",), special_row_ids=frozenset((3,)), only_special_rows=True
)
IDS = replace(SAME, special_ids=(("<|im_start|>", 7, 3),), ids_differ=WRAPPED)
WEIGHTS = PairFacts(identical_weights=False, files_sentence="1 of 3 tensors differ in value.")


def sound(key: RunKey) -> str:
    return SOUND


def test_a_clean_pair_is_alike_and_nothing_is_blamed() -> None:
    causes, claims = settle(factorial(sound))
    assert (causes.verdict, causes.blamed, causes.alternatives) == ("alike", (), ())
    assert causes.compared == 2 * 3 * 3 * 3
    # With a single file's weights there is nothing to accuse; the arithmetics agree on every token.
    assert supported(claims) == {"forward-parity"}
    assert {c.verdict for slug, c in claims.items() if slug != "forward-parity"} == {"refuted"}


def test_double_wrapping() -> None:
    table = factorial(lambda key: DEGENERATE if key.wrap == "twice" else SOUND)
    causes, claims = settle(table, wraps=("twice", "once"))
    assert causes.blamed == ("double wrapping",)
    assert "wrapped once as the reference's, not twice" in causes.reason
    assert supported(claims) == {"forward-parity", "double-wrapping"}
    # Said to have run alike, the sides are alike, and the claim stands all the same: on both files.
    causes, claims = settle(table)
    assert (causes.verdict, causes.blamed) == ("alike", ())
    assert supported(claims) == {"forward-parity", "double-wrapping"}


def test_a_stop_token_that_the_file_does_not_declare() -> None:
    causes, claims = settle(factorial(sound, declared_by_model=frozenset()))
    assert causes.blamed == ("stop tokens",)
    assert {p.kind for p in causes.partings} == {"end"}
    assert {p.comparison.model.stop for p in causes.partings} == {"declared"}
    assert "the model's file declares none" in causes.reason
    assert supported(claims) == {"forward-parity", "stop-tokens"}


def test_stop_tokens_that_a_side_ran_without() -> None:
    causes, _ = settle(factorial(sound), stops=("off", "on"))
    assert causes.blamed == ("stop tokens",)
    assert "(stop tokens on, not off)" in causes.reason


def test_a_corrupted_row_of_a_special_token() -> None:
    table = factorial(lambda key: DEGENERATE if key.side == "model" and key.wrap != "none" else SOUND, facts=ROWS)
    causes, claims = settle(table)
    assert causes.blamed == ("special-token rows",)
    assert "<|im_start|>" in causes.reason
    assert supported(claims) == {"forward-parity", "special-tokens"}
    assert claims["chatml-path"].verdict == "refuted"


def test_a_wrong_id_of_a_special_token() -> None:
    causes, claims = settle(factorial(lambda key: DEGENERATE if key.ids_of == "model" else SOUND, facts=IDS))
    assert causes.blamed == ("special-token ids",)
    assert "<|im_start|> is 7 for 3" in causes.reason
    assert {p.kind for p in causes.partings} <= {"divergence", "unknown", "other prompt"}
    assert supported(claims) == {"forward-parity", "special-tokens"}


def test_a_wrong_id_declared_to_end_an_answer_is_no_missing_one() -> None:
    causes, claims = settle(factorial(sound, declared_by_model=frozenset((99,))))
    assert causes.blamed == ("special-token ids",)
    assert f"declares the reference's stop token ({STOP}, not 99)" in causes.reason
    assert supported(claims) == {"forward-parity", "special-tokens"}


def test_a_wrong_id_of_the_token_that_ends_an_answer() -> None:
    """Where no id is declared, engines go by the names of tokens, and those lie elsewhere in the model's file."""
    table = factorial(sound, facts=replace(SAME, special_ids=(("$", 99, STOP),)))
    no_declared = {
        "model": replace(SIDES["model"], declared_stops=frozenset(), named_stops=frozenset((99,))),
        "ref": replace(SIDES["ref"], declared_stops=frozenset()),
    }
    causes, claims = settle(replace(table, sides=no_declared))
    assert causes.blamed == ("special-token ids",)
    assert "special-tokens" in supported(claims)


def test_drift_alone() -> None:
    flipped = SOUND.replace("answer", "answre")
    table = factorial(lambda key: flipped if key.arithmetic == "llama.cpp" else SOUND)
    causes, claims = settle(table, arithmetics=("llama.cpp", "float32"))
    assert causes.blamed == ("drift",)
    assert "(float32, not llama.cpp)" in causes.reason
    assert supported(claims) == {"drift"}
    assert claims["forward-parity"].verdict == "refuted"
    # Asked of the pair at equal arithmetic, the same table accuses nobody: no text goes bad.
    causes, claims = settle(table)
    assert (causes.verdict, causes.blamed) == ("alike", ())
    assert claims["drift"].verdict == "refuted"
    assert "6 of 12 continuations do take other tokens" in claims["drift"].reason


def test_other_weights() -> None:
    causes, claims = settle(factorial(lambda key: DEGENERATE if key.side == "model" else SOUND, facts=WEIGHTS))
    assert causes.blamed == ("weights",)
    assert "1 of 3 tensors differ in value" in causes.reason
    assert supported(claims) == {"forward-parity"}


def test_weights_that_part_under_chatml_only_do_not_accuse_its_path() -> None:
    table = factorial(lambda key: DEGENERATE if key.side == "model" and key.wrap != "none" else SOUND, facts=WEIGHTS)
    _, claims = settle(table)
    assert claims["chatml-path"].verdict == "not decidable"
    assert "weights differ" in claims["chatml-path"].reason


def test_special_rows_beside_other_differences_are_not_told_apart_without_being_run() -> None:
    facts = replace(ROWS, only_special_rows=False)
    causes, _ = settle(factorial(lambda key: DEGENERATE if key.side == "model" else SOUND, facts=facts))
    assert causes.blamed == ("weights",)


def test_what_cannot_be_measured_is_not_blamed() -> None:
    """Own ids and other weights: the reference's weights were never fed the model's ids."""
    facts = replace(IDS, identical_weights=False)
    causes, _ = settle(factorial(lambda key: key.side + key.ids_of, facts=facts))
    assert causes.blamed == ("special-token ids", "weights")


def test_two_repairs_that_either_suffice_are_alternatives() -> None:
    table = factorial(lambda key: DEGENERATE if (key.wrap, key.arithmetic) == ("twice", "llama.cpp") else SOUND)
    causes, claims = settle(table, wraps=("twice", "once"), arithmetics=("llama.cpp", "float32"))
    assert causes.blamed == ()
    assert set(causes.alternatives) == {("double wrapping",), ("drift",)}
    assert "cannot tell" in causes.reason
    assert "special-tokens" not in supported(claims)


def test_nothing_measured_is_undecidable() -> None:
    table = factorial(sound)
    causes = find_causes(replace(table, runs={}), pairings(table))
    assert causes.verdict == "undecidable"
    assert causes.unmeasured == 54


@pytest.mark.parametrize(
    ("runner_up", "sigma", "kind"), [("X", 2.0, "near-tie"), ("X", 1.0, "divergence"), ("Y", 2.0, "divergence")]
)
def test_a_flip_is_a_near_tie_when_second_best_and_within_the_noise(runner_up: str, sigma: float, kind: str) -> None:
    """The margin is 5; the bound 3 * sqrt(2) sigma is 8.5 or 4.2."""
    table = factorial(lambda key: "The X" if key.arithmetic == "llama.cpp" else "The 4")
    runs = {key: replace(one, runners_up=(ord(runner_up),) * len(one.tokens)) for key, one in table.runs.items()}
    table = replace(table, runs=runs, noise={("llama.cpp", "float32"): sigma})
    causes, _ = settle(table, arithmetics=("llama.cpp", "float32"))
    assert {p.kind for p in causes.partings} == {kind}
    assert {p.step for p in causes.partings} == {4}
    assert {p.sigmas for p in causes.partings} == {5.0 / sigma}


def test_noise_is_measured_once_for_two_arithmetics_on_the_longest_common_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str, list[int], list[int]]] = []

    def measured(model: Runner, ref: Runner, tokens: list[int], positions: range, **options: object) -> LogitNoise:
        asked.append((model.arithmetic.name, ref.arithmetic.name, tokens, list(positions)))
        return LogitNoise(2.0, (), tuple(positions))

    monkeypatch.setattr(noise, "measure_logit_noise", measured)
    flips = {("sum", "once"): "The X", ("name", "twice"): "The 4 is X", ("sum", "none"): "The 4"}
    table = factorial(
        lambda key: flips.get((key.prompt, key.wrap), "") if key.arithmetic == "llama.cpp" else "The 4 is 5"
    )
    causes, _ = settle(table, arithmetics=("llama.cpp", "float32"))
    found = noise.measure_noise(table, causes.partings, tiny_checkpoint(), tiny_checkpoint())
    assert found == {("llama.cpp", "float32"): 2.0}
    # The prompt (1, 2) and nine common tokens, of which the first of all is left out.
    tokens = [1, 2, *map(ord, "The 4 is ")]
    assert asked == [("llama.cpp", "float32", tokens, list(range(1, len(tokens))))]


FACTORS = ("double wrapping", "stop tokens", "special-token ids", "special-token rows", "drift")


@settings(deadline=None, max_examples=40)
@given(planted=st.sets(st.sampled_from(FACTORS)))
def test_any_set_of_causes_is_blamed_exactly(planted: set[str]) -> None:
    """Every run's text depends on everything that it was run with, so that each planted factor shows."""
    facts = replace(
        SAME,
        special_ids=IDS.special_ids if "special-token ids" in planted else (),
        ids_differ=IDS.ids_differ if "special-token ids" in planted else frozenset(),
        **(
            {"identical_weights": False, "special_rows": ("<|im_start|>",), "only_special_rows": True}
            if "special-token rows" in planted
            else {}
        ),
    )

    def yields(key: RunKey) -> str:
        side = key.side if "special-token rows" in planted else "ref"
        return f"{side}{key.wrap}{key.arithmetic}{key.ids_of}$ and on"

    table = factorial(yields, facts=facts, declared_by_model=frozenset(() if "stop tokens" in planted else (STOP,)))
    as_run = {
        "wraps": ("twice", "once") if "double wrapping" in planted else ("once", "once"),
        "arithmetics": ("llama.cpp", "float32") if "drift" in planted else ("float32", "float32"),
    }
    causes = find_causes(table, pairings(table, **as_run))  # pyright: ignore[reportArgumentType]
    assert set(causes.blamed) == planted
    assert causes.verdict == ("part" if planted else "alike")
