"""Contracts from files: every key known, every value of its type, every problem with its line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aprjax.contracts import schema
from aprjax.contracts.problems import Problem
from aprjax.contracts.types import Contract
from aprjax.contracts.yaml_reader import Document, Place, read_yaml

# Upstream reads each of these under two names (contracts.md 1.1); ours is the first.
_OTHER_NAMES = {
    "falsification_tests": {"expected": "prediction", "command": "test", "fails_if": "if_fails"},
}
_STRICT = {"extra": "forbid", "strict": True}
_DATACLASSES = (
    schema.Metadata,
    schema.Equation,
    schema.ProofObligation,
    schema.FalsificationTest,
    schema.Threshold,
    schema.EvidenceFile,
    schema.KaniHarness,
    schema.QaGate,
    schema.LayerStep,
)
# Sections of a contract and what they hold; the rest is kept as it is.
_SECTIONS: dict[str, Any] = {
    "metadata": schema.Metadata,
    "equations": dict[str, schema.Equation],
    "proof_obligations": tuple[schema.ProofObligation, ...],
    "falsification_tests": tuple[schema.FalsificationTest, ...],
    "kani_harnesses": tuple[schema.KaniHarness, ...],
    "qa_gate": schema.QaGate,
    "layer_steps": tuple[schema.LayerStep, ...],
}
_FREE = ("kernel_structure", "simd_dispatch", "enforcement", "verification_summary", "type_invariants", "coq_spec")
TOP_LEVEL = (*_SECTIONS, *_FREE)
_TYPE_NAMES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "nothing",
}


@dataclass(frozen=True)
class Loaded:
    """A contract file after reading.

    Attributes:
        path: of the file.
        contract: None where it has an error.
        problems: errors and warnings, in the order of their lines.
    """

    path: Path
    contract: Contract | None
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that make the contract invalid."""
        return tuple(problem for problem in self.problems if problem.severity == "error")


def load_contract(path: Path) -> Loaded:
    """Reads one contract, and judges it by the schema's rules.

    Raises:
        OSError: the file cannot be opened.
    """
    from aprjax.contracts.schema_rules import judge_contract

    document = read_yaml(path)
    if document.data is None:
        return Loaded(path, None, tuple(document.problems))
    problems = list(document.problems)
    problems += _unknown_keys(path, document)
    contract, found = _typed(path, document)
    problems += found
    if contract is not None:
        problems += judge_contract(contract)
    problems = sorted(dict.fromkeys(problems))
    broken = any(problem.severity == "error" for problem in problems)
    return Loaded(path, None if broken else contract, tuple(problems))


def load_contracts(paths: Iterable[Path]) -> list[Loaded]:
    """Reads several contracts, and judges what only shows among them: ids in two files, cycles of `depends_on`.

    Raises:
        OSError: a file cannot be opened.
    """
    from aprjax.contracts.schema_rules import judge_together

    loaded = [load_contract(path) for path in paths]
    together: dict[Path, list[Problem]] = {}
    for problem in judge_together([one.contract for one in loaded if one.contract is not None]):
        together.setdefault(problem.path, []).append(problem)
    return [
        one
        if one.path not in together
        else Loaded(
            one.path,
            None if any(p.severity == "error" for p in together[one.path]) else one.contract,
            tuple(sorted([*one.problems, *together[one.path]])),
        )
        for one in loaded
    ]


def shipped_folder() -> Path:
    """The folder of our own contracts: in the repository, or beside an installed package.

    Raises:
        FileNotFoundError: they are in neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "contracts", package.parent / "_aprjax_contracts"):
        if any(folder.glob("*.yaml")):
            return folder
    raise FileNotFoundError(f"aprjax's contracts are neither beside {package} nor installed")


def contract_files(paths: Sequence[Path] | None = None) -> list[Path]:
    """The contract files that are meant: of a folder all `*.yaml`, by default our own.

    Raises:
        FileNotFoundError: there is no such file, or no contract in the folder.
    """
    files: list[Path] = []
    for path in paths or [shipped_folder()]:
        found = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise FileNotFoundError(
                f"{path}: {'no contract (*.yaml) in the folder' if path.is_dir() else 'no such file'}"
            )
        files += [_shortest(file) for file in found]
    return list(dict.fromkeys(files))


def _shortest(path: Path) -> Path:
    """The path from here, where it lies below: that is what people read in messages."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _unknown_keys(path: Path, document: Document) -> list[Problem]:
    found = []
    for key in document.data:
        line = document.lines[(key,)]
        if key in TOP_LEVEL:
            continue
        if key == "kind":
            text = "a top-level `kind` decides nothing: the kind is `metadata.kind`"
            found.append(Problem(path, line, "SCHEMA-018", text))
            continue
        meant = _near_miss(key, TOP_LEVEL)
        if meant is not None:
            found.append(Problem(path, line, "SCHEMA-019", f"unknown key {key!r}: {meant!r} is meant, it seems"))
        else:
            found.append(Problem(path, line, "CONTRACT-KEY", f"unknown key {key!r}; known: {', '.join(TOP_LEVEL)}"))
    return found


def _near_miss(key: str, known: Iterable[str]) -> str | None:
    """The known key that this is another spelling of: case, separators, singular or plural."""

    def forms(name: str) -> set[str]:
        plain = "".join(character for character in name.lower() if character.isalnum())
        return {plain} | {plain.removesuffix(ending) for ending in ("s", "es") if plain.endswith(ending)}

    return next((name for name in known if forms(name) & forms(key)), None)


def _typed(path: Path, document: Document) -> tuple[Contract | None, list[Problem]]:
    """The contract as dataclasses, or what keeps it from being one."""
    sections: dict[str, Any] = {}
    problems: list[Problem] = []
    if "metadata" not in document.data:
        problems.append(Problem(path, 1, "CONTRACT-KEY", "the key `metadata` is missing"))
    for name, value in document.data.items():
        if name in _FREE:
            sections[name] = value
        elif name in _SECTIONS:
            content, twice = _canonical(path, document, name, value)
            sections[name], wrong = _validated(path, document, name, content)
            problems += [*twice, *wrong]
    # What could not be read at all is reported where it was met, and once.
    refused = {problem.line for problem in document.problems}
    if problems or refused:
        return None, [problem for problem in problems if problem.line not in refused]
    return Contract(id=path.stem, path=path, lines=document.lines, **sections), []


def _canonical(path: Path, document: Document, section: str, value: Any) -> tuple[Any, list[Problem]]:
    """The section with other names of keys replaced by ours."""
    names = _OTHER_NAMES.get(section)
    if names is None or not isinstance(value, tuple):
        return value, []
    items, problems = [], []
    for index, item in enumerate(value):
        renamed: dict[str, Any] = {}
        for key, content in item.items() if isinstance(item, dict) else ():
            ours = str(names.get(key, key))
            if ours in renamed:
                line = document.lines[(section, index, key)]
                problems.append(Problem(path, line, "SCHEMA-020", f"{key!r} and another name of it are both there"))
            renamed[ours] = content
        if renamed and "rule" not in renamed and "description" in renamed:
            renamed["rule"] = renamed.pop("description")
        items.append(renamed if isinstance(item, dict) else item)
    return tuple(items), problems


@lru_cache
def _adapter(section: str) -> Any:
    from pydantic import TypeAdapter

    for known in _DATACLASSES:
        # Where pydantic looks for a dataclass's configuration.
        known.__pydantic_config__ = _STRICT  # type: ignore[attr-defined] - how pydantic takes options for a dataclass
    return TypeAdapter(_SECTIONS[section])


def _validated(path: Path, document: Document, section: str, value: Any) -> tuple[Any, list[Problem]]:
    from pydantic import ValidationError

    try:
        # As JSON: there pydantic is strict about values and still makes dataclasses of mappings.
        return _adapter(section).validate_json(json.dumps(value)), []
    except ValidationError as error:
        # A union reports each of its arms; the first at a place says enough.
        found: dict[Place, Problem] = {}
        for details in error.errors(include_url=False):
            place = _place(document, (section, *details["loc"]))
            found.setdefault(place, _problem(path, document, place, details))
        return None, list(found.values())


def _place(document: Document, location: Sequence[str | int]) -> Place:
    """The part of pydantic's location that is a place in the file, and the missing or unknown key behind it."""
    place: Place = ()
    for part in location:
        if (*place, part) not in document.lines:
            return (*place, part) if part in _field_names() else place
        place = (*place, part)
    return place


@lru_cache
def _field_names() -> frozenset[str]:
    return frozenset(field.name for known in _DATACLASSES for field in dataclasses.fields(known))


def _problem(path: Path, document: Document, place: Place, details: Mapping[str, Any]) -> Problem:
    line = next((document.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in document.lines), 1)
    name = ".".join(map(str, place))
    kind, value = details["type"], details.get("input")
    if kind == "missing":
        return Problem(path, line, "CONTRACT-KEY", f"the key {name} is missing")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        key = details["loc"][-1]
        meant = _near_miss(str(key), sorted(_field_names()))
        hint = f": {meant!r} is meant, it seems" if meant is not None and meant != key else ""
        return Problem(path, line, "CONTRACT-KEY", f"unknown key {name}{hint}")
    if kind == "literal_error":
        rule = "CONTRACT-STATUS" if "status" in str(place[-1]) else "CONTRACT-VALUE"
        return Problem(path, line, rule, f"{name}: unknown value {value!r}, expected {details['ctx']['expected']}")
    found = _TYPE_NAMES.get(type(value).__name__, type(value).__name__)
    wanted = details["msg"].removeprefix("Input should be ")
    shown = "" if isinstance(value, dict | list) or value is None else f" {str(value)[:60]!r}"
    return Problem(path, line, "CONTRACT-TYPE", f"{name}: expected {wanted}, found {found}{shown}")
