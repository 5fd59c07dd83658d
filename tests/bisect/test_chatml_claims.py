"""The claims: what supports, refutes and leaves each one open, on made-up tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chatml_tables import DEGENERATE, PROMPTS, SAME, SIDES, SOUND, cells_of, factorial, settle, supported

from aprjax.bisect.chatml.cells import RunKey
from aprjax.bisect.chatml.partings import pairings
from aprjax.bisect.chatml.prompts import UPSTREAM_PROMPTS, own_prompt
from aprjax.checkpoint.types import CheckpointError
from aprjax.text import wrap


def sound(key: RunKey) -> str:
    return SOUND


def test_forward_parity_is_refuted_by_one_pair_that_goes_on_otherwise() -> None:
    table = factorial(lambda key: SOUND + "!" if (key.arithmetic, key.prompt) == ("realizar", "name") else SOUND)
    _, claims = settle(table)
    claim = claims["forward-parity"]
    assert claim.verdict == "refuted"
    assert claim.reason.startswith("3 of 12 pairs")
    assert f"from token {len(SOUND)} at the earliest" in claim.reason
    assert "name · wrap once: ref realizar and ref float32" in claim.evidence


@pytest.mark.parametrize(("cosine", "verdict"), [(0.98, "not decidable"), (0.99, "supported")])
def test_forward_parity_needs_parity(cosine: float, verdict: str) -> None:
    _, claims = settle(factorial(sound, cosine=cosine))
    assert claims["forward-parity"].verdict == verdict


def test_runs_that_are_the_same_by_proof_say_nothing_of_forward_parity() -> None:
    table = factorial(sound, arithmetics=("float32",))
    keys = [key for key in table.runs if key.side == "model"]
    runs = {k: replace(r, shared_with="the ref's run: same bytes") if k in keys else r for k, r in table.runs.items()}
    pair = replace(factorial(sound).first_logits[0], left=keys[0], right=replace(keys[0], side="ref"))
    _, claims = settle(replace(table, runs=runs, first_logits=(pair,)))
    assert claims["forward-parity"].verdict == "not decidable"
    _, claims = settle(replace(table, first_logits=(pair,)))
    assert claims["forward-parity"].verdict == "supported"


def test_the_chatml_path_is_at_fault_where_sound_prompts_go_bad_by_wrapping() -> None:
    causes, claims = settle(factorial(lambda key: SOUND if key.wrap == "none" else DEGENERATE))
    assert (causes.verdict, causes.blamed) == ("alike", ())
    assert claims["chatml-path"].verdict == "supported"
    assert "6 of 6 answers" in claims["chatml-path"].reason
    # Two files that share their special tokens cannot accuse or acquit them.
    assert claims["special-tokens"].verdict == "not decidable"
    # There is no sound wrapped answer that a second wrap could spoil.
    assert claims["double-wrapping"].verdict == "not decidable"


def test_missing_stop_tokens_are_at_fault_where_answers_go_bad_beyond_their_end() -> None:
    causes, claims = settle(factorial(lambda key: f"It is 4.${DEGENERATE}"))
    assert causes.verdict == "alike"
    assert supported(claims) == {"forward-parity", "stop-tokens"}
    assert claims["stop-tokens"].reason.startswith("18 of 18 answers")


def test_stop_tokens_cannot_be_judged_when_no_answer_ends_within_the_budget() -> None:
    _, claims = settle(factorial(lambda key: SOUND.replace("$", ";")))
    assert claims["stop-tokens"].verdict == "not decidable"
    assert "--max-new-tokens" in claims["stop-tokens"].reason


def test_drift_is_at_fault_where_one_arithmetic_spoils_an_answer() -> None:
    causes, claims = settle(factorial(lambda key: DEGENERATE if key.arithmetic == "llama.cpp" else SOUND))
    assert causes.verdict == "alike"
    assert supported(claims) == {"drift"}
    assert claims["drift"].evidence
    assert all("llama.cpp" in cell for cell in claims["drift"].evidence)


def test_an_answer_without_what_was_expected_counts_as_bad_when_wrapped_and_not_raw() -> None:
    _, claims = settle(factorial(lambda key: "It is five, I think.$" if key.wrap == "twice" else SOUND))
    assert supported(claims) == {"forward-parity", "double-wrapping"}
    assert claims["double-wrapping"].reason.startswith("3 of 6 answers")
    _, claims = settle(factorial(lambda key: "It is five, I think.$" if key.wrap == "none" else SOUND))
    assert supported(claims) == {"forward-parity"}


@pytest.mark.parametrize(
    ("wraps", "arithmetics", "open_claims"),
    [
        (("once",), ("float32", "realizar"), {"chatml-path", "double-wrapping"}),
        (("none",), ("float32", "realizar"), {"chatml-path", "double-wrapping", "special-tokens"}),
        (("none", "once", "twice"), ("float32",), {"drift", "forward-parity"}),
    ],
)
def test_a_factor_with_one_level_decides_nothing(
    wraps: tuple[str, ...], arithmetics: tuple[str, ...], open_claims: set[str]
) -> None:
    _, claims = settle(factorial(sound, wraps=wraps, arithmetics=arithmetics))
    assert {slug for slug, claim in claims.items() if claim.verdict == "not decidable"} == open_claims


def test_special_tokens_cannot_be_judged_without_a_tokenizer() -> None:
    table = factorial(sound)
    table = replace(table, sides={**SIDES, "model": replace(SIDES["model"], has_tokenizer=False)})
    assert settle(table)[1]["special-tokens"].verdict == "not decidable"


def test_cells_say_how_they_ended_and_what_the_gate_says() -> None:
    table = factorial(lambda key: f"It is 4.${DEGENERATE}")
    cells = cells_of(table)
    assert len(cells) == 2 * 2 * 3 * 3 * 3
    on, off = (cells["ref", "sum", "once", "float32", stop] for stop in ("on", "off"))
    assert (on.text, on.stop_reason, on.stop_token, on.state) == ("It is 4.", "stop token", ord("$"), "clean")
    assert (off.stop_reason, off.stop_token, off.state) == ("budget", None, "degenerate")
    assert on.expected_found
    assert cells["ref", "sum", "none", "float32", "on"].expected_found is None
    assert cells["ref", "name", "once", "float32", "on"].expected_found is None
    assert (on.first_margin, on.least_margin, len(on.margins)) == (5.0, 5.0, len("It is 4.$"))


def test_indentation_is_flagged_and_not_called_degenerate() -> None:
    cells = cells_of(factorial(lambda key: "def f():\n            return 4$"))
    assert {cell.state for cell in cells.values() if cell.stop == "on"} == {"flagged"}
    assert not any(cell.bad for cell in cells.values())


def test_a_loop_that_the_gate_cannot_see_is_bad_all_the_same() -> None:
    """Copies of 10 characters in 19 bytes: the gate's fragments have 16 at most."""
    cells = cells_of(factorial(lambda key: "ab👋cd🌊ef🎈g" * 4))
    cell = cells["ref", "name", "once", "float32", "off"]
    assert cell.verdict.passed
    assert (cell.state, cell.bad, cell.repetition.onset) == ("loops", True, 10)


def test_comparisons_cover_every_cell_unless_a_side_is_said_to_have_run_otherwise() -> None:
    table = factorial(sound)
    assert len(pairings(table)) == 2 * 3 * 3 * 3
    asked = pairings(table, wraps=("twice", "once"), stops=("off", "on"))
    assert len(asked) == 2 * 3
    assert {(c.model.wrap, c.ref.wrap, c.model.stop, c.ref.stop) for c in asked} == {("twice", "once", "off", "on")}


@pytest.mark.parametrize(("times", "depth"), [("none", 0), ("once", 1), ("twice", 2)])
def test_a_given_prompt_is_taken_out_of_its_chatml(times: str, depth: int) -> None:
    prompt = own_prompt(wrap("What is 2+2?", times))
    assert (prompt.text, prompt.given) == ("What is 2+2?", depth)
    assert prompt.fed(times) == wrap("What is 2+2?", times)


@pytest.mark.parametrize("text", ["", wrap("", "once"), wrap("", "twice")])
def test_an_empty_prompt_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="no tokens"):
        own_prompt(text)


def test_a_prompt_that_is_no_utf_8_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"not UTF-8: U\+DCFF at character 1"):
        own_prompt("a\udcff")


def test_upstreams_prompts_are_each_there_once() -> None:
    assert len({p.name for p in UPSTREAM_PROMPTS}) == len({p.text for p in UPSTREAM_PROMPTS}) == len(UPSTREAM_PROMPTS)
    roles = [role for prompt in UPSTREAM_PROMPTS for role in prompt.roles]
    assert sum(role.startswith("golden_output old") for role in roles) == 2
    assert sum(role.startswith("golden_output new") for role in roles) == 3
    assert sum(role.startswith("prompt sensitivity") for role in roles) == 3
    assert {"PRED-61-A", "PRED-61-B", "SHIP-002"} <= set(roles)
    assert PROMPTS.keys().isdisjoint(p.name for p in UPSTREAM_PROMPTS)
    assert SAME.identical_weights
