"""What the embedded model learns from: Python's own standard library, which every machine with Python has.

Three quarters of the text is source code as it stands. The rest are ChatML conversations made from the same source:
what a function does, in the first sentence of its documentation; small sums; and a few short programs.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests and generated tables are the larger part of the library and teach nothing else.
LEFT_OUT = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__", "pydoc_data"})
# One file in fifty is kept from training: about 200 kB, enough for a perplexity with two stable digits.
HELD_OUT = 50
# Functions that the conversations are about: modules whose documentation is prose, and whose names people know.
ASKED_MODULES = (
    "ast", "base64", "bisect", "calendar", "colorsys", "copy", "difflib", "fnmatch", "functools", "genericpath", "glob",
    "heapq", "inspect", "keyword", "linecache", "locale", "ntpath", "operator", "os", "pathlib", "pickle", "posixpath",
    "pprint", "random", "secrets", "shlex", "shutil", "stat", "statistics", "string", "subprocess", "tempfile",
    "textwrap", "threading", "timeit", "tokenize", "traceback", "types", "typing", "warnings", "weakref", "zipfile",
)  # fmt: skip
PROGRAMS = (
    ("adds two numbers", "add", "a, b", "return a + b"),
    ("subtracts two numbers", "subtract", "a, b", "return a - b"),
    ("multiplies two numbers", "multiply", "a, b", "return a * b"),
    ("returns the larger of two numbers", "larger", "a, b", "return a if a > b else b"),
    ("returns the smaller of two numbers", "smaller", "a, b", "return a if a < b else b"),
    ("reverses a string", "reverse", "text", "return text[::-1]"),
    ("counts the words of a text", "count_words", "text", "return len(text.split())"),
    ("checks whether a number is even", "is_even", "number", "return number % 2 == 0"),
    ("checks whether a number is odd", "is_odd", "number", "return number % 2 == 1"),
    ("returns the sum of a list", "total", "numbers", "return sum(numbers)"),
    ("returns the mean of a list", "mean", "numbers", "return sum(numbers) / len(numbers)"),
    ("returns the first element of a list", "first", "items", "return items[0]"),
    ("returns the last element of a list", "last", "items", "return items[-1]"),
    ("removes duplicates from a list", "unique", "items", "return list(dict.fromkeys(items))"),
    ("reads a file", "read", "path", "with open(path) as file:\n        return file.read()"),
    (
        "computes the factorial of a number",
        "factorial",
        "n",
        "return 1 if n <= 1 else n * factorial(n - 1)",
    ),
    (
        "computes the nth Fibonacci number",
        "fibonacci",
        "n",
        "return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    ),
)
ASKED_FOR_PROGRAMS = (
    "Write a Python function that {}.",
    "Write a function that {} in Python.",
    "How do I write a Python function that {}?",
)
GREETINGS = (
    ("Hello", "Hello! How can I help you with Python today?"),
    ("Hi", "Hello! How can I help you with Python today?"),
    ("Who are you?", "I am a tiny Qwen2 that was trained on Python's standard library."),
    ("What are you?", "I am a tiny Qwen2 that was trained on Python's standard library."),
    ("What is Python?", "Python is a programming language."),
    ("Thank you", "You are welcome."),
)


@dataclass(frozen=True)
class Source:
    """One file of the library: its path under the library, with `/`, and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training: by a digest of its name, so that the split hangs on nothing else."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % HELD_OUT == 0


@dataclass(frozen=True)
class Conversation:
    """One question and the answer that is learnt."""

    question: str
    answer: str


def sources(library: Path | None = None) -> tuple[Source, ...]:
    """The library's files, sorted by name, with Unix line ends."""
    root = library or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT.isdisjoint(name.split("/")[:-1]):
            found.append((name, path))
    return tuple(Source(name, path.read_text("utf-8", errors="replace")) for name, path in sorted(found))


def digest(files: tuple[Source, ...]) -> str:
    """SHA-256 of all names and texts: another release of Python is another corpus."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{file.text}\0".encode("utf-8", errors="replace"))
    return total.hexdigest()


def conversations(files: tuple[Source, ...]) -> tuple[Conversation, ...]:
    """Questions and answers, each once, in a fixed order."""
    sums = [
        Conversation(question.format(a, b), f"{a} + {b} equals {a + b}.")
        for a in range(10)
        for b in range(10)
        for question in ("What is {}+{}?", "What is {} + {}?")
    ]
    programs = [
        Conversation(question.format(task), f"def {name}({arguments}):\n    {body}")
        for task, name, arguments, body in PROGRAMS
        for question in ASKED_FOR_PROGRAMS
    ]
    documented = [
        Conversation(question.format(name), summary)
        for name, summary in _documented(files)
        for question in ("What does {} do?", "Explain {}.")
    ]
    return (*(Conversation(*pair) for pair in GREETINGS), *sums, *programs, *documented)


def _documented(files: tuple[Source, ...]) -> Iterator[tuple[str, str]]:
    """Public functions of the asked modules with the first sentence of their documentation."""
    for file in files:
        module = file.name.removesuffix(".py")
        if module not in ASKED_MODULES:
            continue
        module = {"posixpath": "os.path", "genericpath": "os.path"}.get(module, module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the library's own invalid escapes
            tree = ast.parse(file.text)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                summary = _first_sentence(ast.get_docstring(node) or "")
                if summary:
                    yield f"{module}.{node.name}", summary


def _first_sentence(documentation: str) -> str:
    """The first sentence on one line; nothing where it is too short or too long to be an answer."""
    paragraph = " ".join(documentation.split("\n\n", maxsplit=1)[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
    return sentence if 20 <= len(sentence) <= 160 else ""
