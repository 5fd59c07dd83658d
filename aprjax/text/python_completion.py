"""The Python in a model's answer, and whether it parses: upstream's SHIP-002, with SHIP-005's extraction.

Upstream's rules, from aprender's HumanEval harness (`eval/inference.rs`; PR #1628, #1630, #1635):

- An answer in Markdown: its fenced blocks tagged `python`, `py` or nothing, blank ones left out; of several the first
  that defines the function asked for (R1 and R2), otherwise the first. What stands in the prompt before that
  function's `def` goes before it: imports that the answer takes for granted.
- Otherwise a continuation: cut before the next `def` at the margin, or without one the next `class`;
  lines that begin deeper than the prompt's last line are moved back; the prompt goes before it. (Upstream moves them
  back where that line ends with a colon, too, which takes the body of `def fib(n):` out of the function.)
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# A context of 32,768 tokens is about 130,000 characters of Python; beyond this it is no completion, and parsing
# takes memory in proportion (some hundred bytes a character).
MOST_CHARACTERS = 1 << 20

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\r?\n")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_CLOSING = "\n```"
_DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]+([^\W\d]\w*)[ \t]*\(", re.MULTILINE)


class Rule(StrEnum):
    """How the Python was found."""

    NAMED_BLOCK = "fenced block that defines the function"
    FIRST_BLOCK = "first fenced block"
    WHOLE_ANSWER = "the whole answer"
    CONTINUATION = "the prompt and its continuation"


@dataclass(frozen=True)
class Extracted:
    """Python found in an answer.

    Attributes:
        code: the program.
        rule: how it was found.
    """

    code: str
    rule: Rule


def entry_point(prompt: str) -> str | None:
    """The function that a prompt asks for: the last that it begins to define, if any."""
    names = _DEFINITION.findall(prompt)
    return names[-1] if names else None


def fenced_blocks(text: str) -> list[str]:
    """The closed blocks of Python or of no language that are not blank."""
    blocks, start = [], 0
    while fence := _FENCE.search(text, start):
        # The line end of the opening fence may be that of an empty block's closing one.
        end = text.find(_CLOSING, fence.end() - 1)
        if end < 0:
            break
        code = text[fence.end() : max(end, fence.end())]
        if code.strip():
            blocks.append(code)
        start = end + len(_CLOSING)
    return blocks


def extract_python(prompt: str, answer: str, *, wrapped: bool = False) -> Extracted:
    """The program that an answer makes, by the rules of this module.

    Args:
        prompt: the user's text, without a wrap.
        answer: what the model gave.
        wrapped: whether the prompt was a turn of a conversation: an answer without a fence then stands for itself if
            it defines the function that was asked for.
    """
    name = entry_point(prompt)
    blocks = fenced_blocks(answer)
    if blocks:
        named = next((block for block in blocks if name is not None and f"def {name}(" in block), None)
        chosen = blocks[0] if named is None else named
        before = prompt[: prompt.index(f"def {name}(")].rstrip() if name and f"def {name}(" in prompt else ""
        rule = Rule.FIRST_BLOCK if named is None else Rule.NAMED_BLOCK
        return Extracted(f"{before}\n{chosen}\n" if before else f"{chosen}\n", rule)
    if wrapped and (name is None or f"def {name}(" in answer):
        return Extracted(answer, Rule.WHOLE_ANSWER)
    return Extracted(prompt + _aligned(prompt, _first_part(answer)), Rule.CONTINUATION)


def _first_part(completion: str) -> str:
    for start in ("\ndef ", "\nclass "):
        at = completion.find(start)
        if at >= 0:
            return completion[:at]
    return completion


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _aligned(prompt: str, completion: str) -> str:
    """The completion moved back to the indentation of the prompt's last line, if it begins deeper and on a new line."""
    written = [line for line in prompt.splitlines() if line.strip()]
    expected = _indent(written[-1]) if written else 0
    lines = completion.splitlines(keepends=True)
    first = next((line for line in lines if line.strip()), "")
    excess = _indent(first) - expected
    opens_block = bool(written) and written[-1].rstrip().endswith(":")
    whole_lines = prompt.endswith("\n") or completion.startswith("\n")
    if excess <= 0 or opens_block or not whole_lines:
        return completion
    moved, inside = [], True
    for line in lines:
        inside = inside and not (line.strip() and _indent(line) == 0)
        moved.append(line[excess:] if inside and line.startswith(" " * excess) else line)
    return "".join(moved)


@dataclass(frozen=True)
class PythonCheck:
    """What `ast.parse` says of a program.

    Attributes:
        error: why it does not parse; None if it does.
        ast_node_count: nodes of the tree, as `ast.walk` counts them.
        node_kinds: names of their classes, each once, in order.
        function_names: of every `def`, in the order of `ast.walk`.
        top_level_returns: `return` statements outside every function: the compiler refuses them, the parser
            does not.
    """

    error: str | None
    ast_node_count: int = 0
    node_kinds: tuple[str, ...] = ()
    function_names: tuple[str, ...] = ()
    top_level_returns: int = 0

    @property
    def parses(self) -> bool:
        """Whether there is a program, and it parses."""
        return self.error is None

    def to_json(self) -> dict[str, Any]:
        """The fields of upstream's `ast-parse-result.json`, and the error where there is one."""
        return {
            "ast_parse": "OK" if self.parses else "FAILED",
            # The parser stops at the first.
            "syntax_errors": int(not self.parses),
            "ast_node_count": self.ast_node_count,
            "node_kinds": list(self.node_kinds),
            "function_count": len(self.function_names),
            "function_names": list(self.function_names),
            "top_level_returns": self.top_level_returns,
        } | ({} if self.error is None else {"error": self.error})


def check_python(code: str) -> PythonCheck:
    """Parses a program, and never runs it. A program without a statement does not count as one that parses."""
    if len(code) > MOST_CHARACTERS:
        return PythonCheck(f"{len(code)} characters, at most {MOST_CHARACTERS} are parsed")
    try:
        with warnings.catch_warnings():
            # Of invalid escapes in strings; they are not what is asked.
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except SyntaxError as error:
        where = "" if error.lineno is None else f"line {error.lineno}: "
        return PythonCheck(f"{where}{error.msg}")
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        # NUL characters (before Python 3.12), and nesting deeper than the parser goes.
        return PythonCheck(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    nodes, stray_returns = _walk(tree)
    return PythonCheck(
        error=None if tree.body else "there is no statement in it",
        ast_node_count=len(nodes),
        node_kinds=tuple(sorted({type(node).__name__ for node in nodes})),
        function_names=tuple(node.name for node in nodes if isinstance(node, _FUNCTIONS)),
        top_level_returns=stray_returns,
    )


def _walk(tree: ast.Module) -> tuple[list[ast.AST], int]:
    """Every node in the order of `ast.walk`, and how many `return` stand outside every function."""
    nodes: list[ast.AST] = []
    stray_returns = 0
    waiting: deque[tuple[ast.AST, bool]] = deque([(tree, False)])
    while waiting:
        node, inside = waiting.popleft()
        nodes.append(node)
        stray_returns += isinstance(node, ast.Return) and not inside
        inside = inside or isinstance(node, _FUNCTIONS)
        waiting.extend((child, inside) for child in ast.iter_child_nodes(node))
    return nodes, stray_returns
