"""The command line: `main` runs it. `cli_app` has the exit codes, `cli_options` what the commands share.

Results go to stdout; errors and progress go to stderr. jax, flax and matplotlib are imported by the
commands that need them.
"""

from __future__ import annotations

# Each module registers its commands as it is imported; `--help` lists them in this order.
# isort: off
from aprjax import cli_static
from aprjax import cli_layers
from aprjax import cli_locate
from aprjax import cli_attribute
from aprjax import cli_explain
from aprjax import cli_judging
from aprjax import cli_files
from aprjax import cli_tokens
from aprjax import cli_chatml
from aprjax import cli_run
from aprjax import cli_generate
from aprjax import cli_margins
from aprjax import cli_report
from aprjax import cli_contracts
from aprjax import cli_evidence
from aprjax import cli_upstream
from aprjax import cli_demo

# isort: on
from aprjax.cli_app import INTERNAL_ERROR, INTERRUPTED, READER_GONE, UNREADABLE, app, main

COMMANDS = (
    cli_static,
    cli_layers,
    cli_locate,
    cli_attribute,
    cli_explain,
    cli_judging,
    cli_files,
    cli_tokens,
    cli_chatml,
    cli_run,
    cli_generate,
    cli_margins,
    cli_report,
    cli_contracts,
    cli_evidence,
    cli_upstream,
    cli_demo,
)

__all__ = ["COMMANDS", "INTERNAL_ERROR", "INTERRUPTED", "READER_GONE", "UNREADABLE", "app", "main"]
