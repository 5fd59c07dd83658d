"""Sides for tests of contracts: tiny files of one model in two containers, and a bench that holds made-up work."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny import CONFIG, VOCABULARY, tiny_checkpoint, write_tiny

from aprjax.checkpoint.apr_writer import write_apr
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import Checkpoint
from aprjax.contracts.check.measurement import RULES, Asked, Measurement, judged
from aprjax.contracts.check.run import load_rules
from aprjax.contracts.load import load_contract, shipped_folder
from aprjax.contracts.types import Contract, TestOutcome

# Qwen2.5's shape of a template, without its tools: a default system turn, turns, the assistant's header.
TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a test.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
K_QUANTS = {"": "Q4_K", "down_proj": "Q6_K", "embed_tokens": "Q6_K", "lm_head": "Q6_K"}


def write_pair(folder: Path, *, template: str | None = TEMPLATE) -> tuple[Path, Path]:
    """One tiny model of K-quants as `.apr` and as `.gguf`."""
    model = tiny_checkpoint(CONFIG, types=K_QUANTS)
    apr, gguf = folder / "model.apr", folder / "reference.gguf"
    write_apr(
        apr,
        config=model.config,
        tensors=model.tensors.values(),
        vocabulary=VOCABULARY,
        chat_template=template,
        allow_any_type=True,
    )
    convert(apr, gguf, keep_blocks=True)
    return apr, gguf


@lru_cache
def contract_of(test_id: str) -> Contract:
    """Our contract that has this test."""
    for path in sorted(shipped_folder().glob("*.yaml")):
        contract = load_contract(path).contract
        assert contract is not None, path
        if any(test.id == test_id for test in contract.falsification_tests):
            return contract
    raise AssertionError(f"no contract has {test_id}")


def outcome(bench: Any, test_id: str) -> TestOutcome:
    """One test, measured on a bench and judged by its contract."""
    load_rules()
    contract = contract_of(test_id)
    test = next(test for test in contract.falsification_tests if test.id == test_id)
    asked = Asked(bench, contract, test)
    return judged(asked, RULES[test_id](asked))


def outcome_of(test_id: str, found: Measurement) -> TestOutcome:
    """The outcome of a measurement that a test makes up."""
    contract = contract_of(test_id)
    test = next(test for test in contract.falsification_tests if test.id == test_id)
    return judged(Asked(SimpleNamespace(), contract, test), found)  # type: ignore[arg-type]


def statuses(bench: Any, *test_ids: str) -> dict[str, str]:
    """Statuses by id."""
    return {test_id: str(outcome(bench, test_id).status) for test_id in test_ids}


class MadeUpBench(SimpleNamespace):
    """A bench whose work is given: checkpoints, answers, passes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(artifacts={}, **given)
        self._done: dict[Any, Any] = {}

    def once(self, key: Any, make: Any) -> Any:
        """As `Bench.once`, without errors."""
        if key not in self._done:
            self._done[key] = make()
        return self._done[key]

    def keep(self, name: str, document: Any) -> str:
        """As `Bench.keep`."""
        self.artifacts[name] = document
        return name

    def side(self, name: str) -> Any:
        """An opened side."""
        file = self.checkpoint(name)
        return SimpleNamespace(checkpoint=file, runs_here=True, tokens=None, side=SimpleNamespace(kind="checkpoint"))

    def checkpoint(self, name: str) -> Checkpoint:
        """A side's file."""
        return self.files_by_side[name]


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """A checkpoint of another config."""
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **changes))


__all__ = [
    "CONFIG",
    "MadeUpBench",
    "contract_of",
    "outcome",
    "outcome_of",
    "statuses",
    "with_config",
    "write_pair",
    "write_tiny",
]
