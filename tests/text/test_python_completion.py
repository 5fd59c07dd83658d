"""Extraction by upstream's rules, the fields of its `ast-parse-result.json`, and hostile programs."""

from __future__ import annotations

import ast
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprjax.text.python_completion import Rule, check_python, entry_point, extract_python, fenced_blocks

# The shape of the program whose tree upstream's SHIP-002 evidence describes, with other words.
SHIP_002 = """def fib(n):
    if n <= 0:
        return "too small"
    elif n == 1:
        return 0
    elif n == 2:
        return 1
    else:
        x, y = 0, 1
        for step in range(2, n):
            x, y = y, x + y
        return y
"""
# What upstream's evidence says of it (evidence/ship-002-discharge-2026-05-10/ast-parse-result.json).
UPSTREAM = {
    "ast_parse": "OK",
    "syntax_errors": 0,
    "ast_node_count": 68,
    "node_kinds": [
        *("Add", "Assign", "BinOp", "Call", "Compare", "Constant", "Eq", "For", "FunctionDef", "If", "Load"),
        *("LtE", "Module", "Name", "Return", "Store", "Tuple", "arg", "arguments"),
    ],
    "function_count": 1,
    "function_names": ["fib"],
    "top_level_returns": 0,
}


def test_the_result_is_that_of_upstreams_evidence() -> None:
    result = check_python(SHIP_002).to_json()
    assert result == UPSTREAM
    assert list(json.loads(json.dumps(result))) == list(UPSTREAM)


@pytest.mark.parametrize(
    ("prompt", "answer", "code", "rule"),
    [
        ("Write f.", "Sure:\n```python\ndef f(x):\n    return x + 1\n```\nAsk on.", "def f(x):\n    return x + 1\n", 1),
        ("Write f.", "```py\ndef f():\n    pass\n```", "def f():\n    pass\n", 1),
        ("Write f.", "```\nimport os\n```", "import os\n", 1),
        ("Write f.", "```python\nfirst = 1\n```\nthen\n```python\nsecond = 2\n```", "first = 1\n", 1),
        ("Write f.", "```python\n\n```\n```python\nreal = 1\n```", "real = 1\n", 1),
        ("Write f.", "```python\n```\n```python\nreal = 1\n```", "real = 1\n", 1),
        # R1 and R2: the block that defines what was asked for, behind one that does not.
        ("def g(x):\n", "```\nx = 1\n```\n```python\ndef g(x):\n    return x\n```", "def g(x):\n    return x\n", 0),
        ("def g(x):\n", "```\nimport os\n```\n```python\ndef h():\n    pass\n```", "import os\n", 1),
        # What stands before the function in the prompt goes before the block.
        (
            "from typing import List\n\ndef g(x: List[int]):\n",
            "```python\ndef g(x: List[int]):\n    return x\n```",
            "from typing import List\ndef g(x: List[int]):\n    return x\n",
            0,
        ),
        # A continuation, cut at the next definition.
        ("def g(n):", "\n    return n\n\ndef h(", "def g(n):\n    return n\n", 3),
        ("def g(n):", "\n    return n\n\nclass A:", "def g(n):\n    return n\n", 3),
        ("def g(n):", "\n    return n\nclass A: pass\ndef h(", "def g(n):\n    return n\nclass A: pass", 3),
        # A fence that never closes is none.
        ("def g(n):", "\n    return '```'\n```python\n", "def g(n):\n    return '```'\n```python\n", 3),
        # One space too many after a docstring; the line at the margin stays.
        (
            'def g(n):\n    """Doc."""\n',
            "     return n\n\nprint(g(1))\n",
            'def g(n):\n    """Doc."""\n    return n\n\nprint(g(1))\n',
            3,
        ),
        ("def g(n):\n    return n +", " 1\n", "def g(n):\n    return n + 1\n", 3),
    ],
)
def test_extraction(prompt: str, answer: str, code: str, rule: int) -> None:
    found = extract_python(prompt, answer)
    assert found.code == code
    assert found.rule == list(Rule)[rule]


def test_a_whole_answer_stands_for_itself_only_in_a_conversation() -> None:
    answer = "def g(n):\n    return n\n"
    assert extract_python("def g(n):", answer, wrapped=True).rule is Rule.WHOLE_ANSWER
    assert extract_python("def g(n):", answer, wrapped=True).code == answer
    assert extract_python("def g(n):", answer).code.count("def g") == 2
    assert extract_python("def g(n):", "\n    return n", wrapped=True).rule is Rule.CONTINUATION


def test_the_function_that_is_asked_for() -> None:
    assert entry_point("import os\n\ndef helper(a):\n    return a\n\nasync def target (b):\n") == "target"
    assert entry_point("Define a function, undef f(x).") is None


@given(st.lists(st.sampled_from(["```", "```python\n", "```py\n", "\n", "x = 1", "def f(a):\n", " "]), max_size=12))
def test_blocks_are_parts_of_the_text_in_order(parts: list[str]) -> None:
    text, at = "".join(parts), 0
    for block in fenced_blocks(text):
        assert block.strip()
        assert "\n```" not in block
        at = text.index(block, at) + len(block)
    extract_python("def f(a):\n", text)


@pytest.mark.parametrize(
    "code",
    [
        "",
        "# nothing but a comment\n",
        "def f(:\n    pass\n",
        "return_ = (",
        "x = 1\0",
        "(" * 100_000,
        "-" * 100_000 + "1",
        "a" + ".b" * 100_000,
        "x = " + "9" * 100_000,
        "\ud800",
        " " * (1 << 21),
    ],
    ids=lambda code: repr(code[:12]),
)
def test_what_does_not_parse_is_an_error_in_words(code: str) -> None:
    before = sys.getrecursionlimit()
    result = check_python(code)
    assert not result.parses
    assert result.error
    assert result.to_json()["syntax_errors"] == 1
    assert result.to_json()["ast_parse"] == "FAILED"
    assert sys.getrecursionlimit() == before


def test_a_return_outside_every_function_is_counted_and_parses() -> None:
    result = check_python("def f():\n    def g():\n        return 1\n    return 2\n\nif True:\n    return 3\n")
    assert result.parses
    assert result.top_level_returns == 1
    assert result.function_names == ("f", "g")


def test_counts_are_those_of_ast_walk_and_strange_escapes_do_not_warn() -> None:
    code = 'class A:\n    async def f(self):\n        return [x for x in "\\d" if x]\n'
    result = check_python(code)
    nodes = list(ast.walk(ast.parse(code.replace("\\d", "d"))))
    assert result.ast_node_count == len(nodes)
    assert list(result.node_kinds) == sorted({type(node).__name__ for node in nodes})
