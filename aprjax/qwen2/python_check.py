"""SHIP-002 in one step: the Python of a run, whether it parses, and the files that upstream keeps of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprjax.checkpoint.atomic import atomic_file
from aprjax.checkpoint.types import CheckpointError
from aprjax.qwen2.generate import Stop
from aprjax.qwen2.render_run import run_lines
from aprjax.qwen2.run import RunReport
from aprjax.text.python_completion import Extracted, PythonCheck, check_python, entry_point, extract_python

# Longer names of functions do not go into a file's name.
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Checked:
    """The Python of one run.

    Attributes:
        extracted: the program, and how it was found in the answer.
        result: what the parser says of it.
        stop: why the run ended.
    """

    extracted: Extracted
    result: PythonCheck
    stop: Stop

    def to_json(self) -> dict[str, Any]:
        """Upstream's fields, and how the program was found."""
        return {**self.result.to_json(), "rule": self.extracted.rule.value, "code": self.extracted.code}

    def line(self) -> str:
        """The verdict in words."""
        result, rule = self.result, self.extracted.rule.value
        if result.parses:
            functions = ", ".join(result.function_names) or "none"
            return f"python: parses ({rule}); {result.ast_node_count} nodes; functions: {functions}"
        cut = "; the budget ended it: raise --max-new-tokens" if self.stop is Stop.BUDGET else ""
        return f"python: does not parse ({rule}): {result.error}{cut}"


def check_run(report: RunReport) -> Checked:
    """Extracts and parses the Python of a run; nothing is executed.

    Raises:
        CheckpointError: the run has no text, for want of a tokenizer.
    """
    prompt = report.fed.prompt if report.fed.prompt is not None else report.fed.text
    if prompt is None or report.text is None:
        raise CheckpointError(
            "the file embeds no tokenizer, so the run has no text to parse (upstream's PMAT-172)",
            file=report.file,
            fix="import the model again with a tool that embeds the tokenizer",
        )
    extracted = extract_python(prompt, report.text, wrapped=report.fed.wrap != "none")
    return Checked(extracted, check_python(extracted.code), report.stop)


def completion_name(prompt: str) -> str:
    """`fib-completion.py` for a prompt that asks for `fib`, otherwise `completion.py`."""
    name = entry_point(prompt)
    plain = name is not None and name.isascii() and len(name) <= _LONGEST_NAME
    return f"{name}-completion.py" if plain else "completion.py"


def write_check(folder: Path, report: RunReport, checked: Checked) -> list[Path]:
    """Writes the run's output, the program and the parser's result under upstream's names.

    Raises:
        CheckpointError: they cannot be written.
    """
    make_folder(folder)
    output = ["=== aprjax run ===", "", f"Source: {report.file}", f"SHA-256: {report.sha256}", *run_lines(report), ""]
    output += ["Output:", report.text or ""]
    output += ["", f"Completed in {report.prefill_seconds + report.generation_seconds:.2f}s", ""]
    files = {
        "apr-run-output.txt": "\n".join(output),
        completion_name(report.fed.prompt or report.fed.text or ""): checked.extracted.code,
        "ast-parse-result.json": json.dumps(checked.result.to_json(), indent=2) + "\n",
    }
    for name, text in files.items():
        with atomic_file(folder / name) as stream:
            stream.write(text.encode("utf-8", "replace"))
    return [folder / name for name in files]


def make_folder(folder: Path) -> None:
    """The folder, made where there is none.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be made: {error.strerror}", file=folder, fix="choose another name"
        ) from None
