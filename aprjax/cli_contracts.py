"""The commands about contracts: `check` measures their tests on two sides, `lint` judges the contracts themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aprjax.cli_app import command
from aprjax.cli_options import (
    BothArithmetic,
    JsonOut,
    Model,
    ModelArithmetic,
    Ref,
    RefArithmetic,
    ReportDir,
    check_arithmetic,
)
from aprjax.console import show

_CONTRACTS = "A contract (.yaml), a folder of them, or the id of one of aprjax's own; by default all of aprjax's."


@command
def check(
    contracts: Annotated[list[str] | None, typer.Argument(metavar="[CONTRACT]...", help=_CONTRACTS)] = None,
    *,
    model: Model,
    ref: Ref,
    test: Annotated[
        list[str] | None, typer.Option("--test", metavar="ID", help="Measure this test only; may be repeated.")
    ] = None,
    allow_unmeasured: Annotated[
        list[str] | None,
        typer.Option("--allow-unmeasured", metavar="ID", help="This test may stay unmeasured; may be repeated."),
    ] = None,
    arithmetic: BothArithmetic = None,
    model_arithmetic: ModelArithmetic = None,
    ref_arithmetic: RefArithmetic = None,
    json_out: JsonOut = None,
    evidence: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write an evidence folder into DIR: raw outputs, digests, verdicts."),
    ] = None,
    report: ReportDir = None,
) -> int:
    """Measure every falsification test of the contracts on two sides: pass, fail, or unmeasured for a stated reason.

    Exits with 0 if every test passed, with 1 if one failed, with 3 if none failed but one is unmeasured that the
    contract requires (not those that it declares not applicable, nor those of --allow-unmeasured), and with 4 if
    a contract or a side cannot be read.
    """
    check_arithmetic(arithmetic, model_arithmetic, ref_arithmetic)
    if evidence is not None:
        from aprjax.contracts.evidence.write import check_root

        check_root(evidence)
    from aprjax.contracts.command import run_check
    from aprjax.contracts.render import render_check

    found = run_check(
        contracts or [],
        model=model,
        ref=ref,
        arithmetic=arithmetic,
        model_arithmetic=model_arithmetic,
        ref_arithmetic=ref_arithmetic,
        only=test or [],
        allowed=allow_unmeasured or [],
        json_out=json_out,
        report=report,
    )
    show(lambda console: render_check(found, console), found.to_json(), json_out)
    if report is not None:
        print(f"report: {report / 'index.html'}", file=sys.stderr)
    if evidence is not None:
        from aprjax.contracts.evidence.write import write_evidence

        print(f"evidence: {write_evidence(found, evidence)}", file=sys.stderr)
    return found.exit_code


@command
def lint(
    contracts: Annotated[list[str] | None, typer.Argument(metavar="[CONTRACT]...", help=_CONTRACTS)] = None,
    *,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the paths of tests and evidence begin; by default the repository's root."
        ),
    ] = None,
    collect: Annotated[
        bool, typer.Option(help="Ask pytest which tests it collects: one run, none is executed.")
    ] = True,
    json_out: JsonOut = None,
) -> int:
    """Judge contracts: the schema, and that each bound test exists, is collected, asserts and is not skipped.

    Evidence that a contract names must be there, with the SHA-256 that the contract has. Exits with 0 without an error
    (warnings are shown), with 1 with one, and with 4 if there is no such contract.
    """
    from aprjax.contracts.command import run_lint
    from aprjax.contracts.render import render_lint

    found = run_lint(contracts or [], root=root, with_pytest=collect)
    show(lambda console: render_lint(found, console), found.to_json(), json_out)
    return found.exit_code
