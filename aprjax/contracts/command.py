"""What `python -m aprjax check` and `lint` do before they show and exit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aprjax.checkpoint.types import CheckpointError
from aprjax.contracts.load import Loaded, contract_files, load_contracts, shipped_folder
from aprjax.contracts.types import CheckReport, Contract

if TYPE_CHECKING:
    from aprjax.contracts.lint.lint import LintReport


def named_files(names: Sequence[str]) -> list[Path]:
    """The contract files that are named: by path, by folder, or one of ours by its id; by default all of ours.

    Raises:
        CheckpointError: there is no such contract.
    """
    try:
        if not names:
            return contract_files()
        ours = {path.stem: path for path in contract_files()}
        return contract_files([ours.get(name, Path(name)) if not Path(name).exists() else Path(name) for name in names])
    except FileNotFoundError as error:
        known = _ours()
        hint = (
            f"give a file, a folder, or one of aprjax's own: {', '.join(known)}" if known else "give a file or folder"
        )
        raise CheckpointError(str(error), fix=hint) from None


def _ours() -> list[str]:
    try:
        return [path.stem for path in sorted(shipped_folder().glob("*.yaml"))]
    except FileNotFoundError:
        return []


def valid_contracts(names: Sequence[str]) -> list[Contract]:
    """The named contracts, all of them valid.

    Raises:
        CheckpointError: one is not, or cannot be read; the message has every problem with its line.
    """
    loaded = load_named(names)
    errors = [problem for one in loaded for problem in one.errors]
    if errors:
        shown = "\n".join(map(str, errors))
        raise CheckpointError(f"a contract that is not valid cannot be checked\n{shown}")
    return [one.contract for one in loaded if one.contract is not None]


def load_named(names: Sequence[str]) -> list[Loaded]:
    """The named contracts, read.

    Raises:
        CheckpointError: there is no such contract, or it cannot be opened.
    """
    try:
        return load_contracts(named_files(names))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=error.filename) from None


def check_tests_exist(contracts: Sequence[Contract], ids: Sequence[str], option: str) -> None:
    """Refuses ids that no contract has.

    Raises:
        CheckpointError: there is one.
    """
    known = {test.id for contract in contracts for test in contract.falsification_tests}
    unknown = [one for one in ids if one not in known]
    if unknown:
        raise CheckpointError(
            f"{option} names {unknown[0]}, and no contract that is checked has such a test",
            fix="`python -m aprjax lint` lists contracts; the ids are in their falsification_tests",
        )


def run_lint(names: Sequence[str], *, root: Path | None = None, with_pytest: bool = True) -> LintReport:
    """Runs `lint` as the command line asks.

    Raises:
        CheckpointError: there is no such contract, or it cannot be opened.
    """
    from aprjax.contracts.lint.lint import lint

    try:
        return lint(named_files(names), root=root, with_pytest=with_pytest)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=error.filename) from None


def run_check(
    names: Sequence[str],
    *,
    model: str,
    ref: str,
    arithmetic: str | None = None,
    model_arithmetic: str | None = None,
    ref_arithmetic: str | None = None,
    only: Sequence[str] = (),
    allowed: Sequence[str] = (),
    json_out: str | None = None,
    report: Path | None = None,
) -> CheckReport:
    """Runs `check` as the command line asks; see `aprjax.cli_contracts.check` for the options.

    Raises:
        CheckpointError: a contract is not valid, a side cannot be read, or a result could not be written.
    """
    contracts = valid_contracts(names)
    check_tests_exist(contracts, only, "--test")
    check_tests_exist(contracts, allowed, "--allow-unmeasured")
    from aprjax.bisect.asked import check_destinations
    from aprjax.bisect.counted import counted_progress
    from aprjax.contracts.check.bench import Bench
    from aprjax.contracts.check.run import check

    check_destinations(json_out, report)
    steps = tuple(step for contract in contracts for step in contract.layer_steps)
    with counted_progress() as progress:
        bench = Bench(
            model,
            ref,
            both=arithmetic,
            model_arithmetic=model_arithmetic,
            ref_arithmetic=ref_arithmetic,
            steps=steps,
            progress=progress,
        )
        try:
            options = [word for one in only for word in ("--test", one)]
            command = " ".join(["python -m aprjax check", shlex.join([*names, *options]), bench.side_options])
            found = check(
                contracts, bench, only=only, allowed=allowed, command=" ".join(command.split()), progress=progress
            )
        finally:
            bench.close()
    if report is not None:
        from aprjax.contracts.html import write_report

        write_report(found, report)
    return found
