"""The documentation is true: its examples run and show what comes out, and it speaks of commands that there are."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from console_examples import ANY_LINES, ROOT, Examples, assert_shows, blocks, line_agrees, renewed, untested
from docs_examples import make_demo_files, new_folder

from aprjax import cli

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMANDS = {
    name: command
    for name, command in typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
}
# Other programs whose options the pages speak of, as the first word of what is quoted.
FOREIGN = ("apr ", "make ", "pip ", "python -P", "python -c", "git ", "generate_qwen25", "llama-", "pytest")
FRONT_DOOR = re.compile(r"^(?:python -m (?:bisect|aprjax)|aprjax|bisect) ")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages_with(kind: str) -> list[Path]:
    return [page for page in PAGES if blocks(page.read_text(encoding="utf-8"), kind)]


# The examples


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    make_demo_files(folder)
    return folder


@pytest.fixture(scope="session")
def quick_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs-quick")
    make_demo_files(folder, judged=False)
    return folder


def run_page(page: Path, kind: str, made: Path, folder: Path) -> None:
    examples = Examples(new_folder(made, folder))
    for block in blocks(page.read_text(encoding="utf-8"), kind):
        examples.check(block)


@pytest.mark.parametrize("page", pages_with("quick"), ids=name_of)
def test_the_quick_examples(page: Path, quick_files: Path, tmp_path: Path) -> None:
    run_page(page, "quick", quick_files, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("page", pages_with("thorough"), ids=name_of)
def test_the_examples_that_compile(page: Path, demo_files: Path, tmp_path: Path) -> None:
    run_page(page, "thorough", demo_files, tmp_path)


@pytest.mark.real_model
@pytest.mark.parametrize("page", pages_with("real"), ids=name_of)
def test_the_examples_on_real_models(page: Path, quick_files: Path, tmp_path: Path, model_path: object) -> None:
    del model_path  # skips, or fails, where there is no model
    run_page(page, "real", quick_files, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_console_or_of_python_is_an_example(page: Path) -> None:
    assert untested(page.read_text(encoding="utf-8")) == 0


# How outputs are compared


@pytest.mark.parametrize(
    ("printed", "shown", "agree"),
    [
        ("layer 3, ffn_gate  1.95", "layer 3,   ffn_gate 1.95", True),
        ("layer 3", "layer 4", False),
        ("AGREE", "DIVERGENCE", False),
        ("cosine 0.999866", "cosine 0.99987", True),
        ("cosine 0.92", "cosine 0.95", False),
        ("left 6.3e-07", "left 2.1e-06", True),
        ("left 6.3e-07", "left 9.1e-06", False),
        ("left 6.3e-07", "left 0", False),
        ("left 6.3e-07", "left 0.0e+00", True),
        ("by 2.98e+07 sigma", "by 1.1e+07 sigma", True),
        ("by 2.98e+07 sigma", "by 1.1e+06 sigma", False),
        ("left 1.2e+00", "left 1.3e+00", True),
        ("left 1.2e+00", "left 1.5e+00", False),
        ("margin 0.0024", "margin 0.0026", False),
        ("aprjax 0.1.0", "aprjax 0.1.1", False),
        ("took 3.5 s, 81 passes", "took 12.0 s, 81 passes", True),
        ("took 3.5 s, 81 passes", "took 3.5 s, 82 passes", False),
    ],
)
def test_lines_agree_but_for_rounding_and_time(printed: str, shown: str, agree: bool) -> None:
    assert line_agrees(printed, shown) is agree


def test_only_what_is_marked_is_left_out() -> None:
    output = "one\ntwo\nthree\nfour\n"
    for shown in (
        ["one", "two", "three", "four"],
        [ANY_LINES],
        ["one", ANY_LINES, "four"],
        [ANY_LINES, "two", ANY_LINES],
    ):
        assert_shows(output, shown)
    for shown in (["one"], [], ["two", ANY_LINES], ["one", ANY_LINES, "three"], ["four", ANY_LINES, "one"]):
        with pytest.raises(AssertionError):
            assert_shows(output, shown)


def test_outputs_are_written_anew_with_the_same_lines_left_out() -> None:
    output = "model a\nlayer 1  0.5\nlayer 2  0.7\nnoise\nDIVERGENCE at layer 2\n"
    shown = [ANY_LINES, "layer 2  0.9", ANY_LINES, "DIVERGENCE at layer 3"]
    assert renewed(shown, output) == [ANY_LINES, "layer 2  0.7", ANY_LINES, "DIVERGENCE at layer 2"]


# The commands and their options


def test_each_command_has_its_page_and_each_page_its_command() -> None:
    pages = {page.stem for page in (DOCS / "commands").glob("*.md")} - {"index"}
    assert pages == set(COMMANDS)
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = (DOCS / "commands" / "index.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        page = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {name}\n"), name
        assert f"<!-- options: {name} -->" in page, name
        assert f"commands/{name}.md" in navigation, name
        assert f"]({name}.md)" in listed, name


def options_of(name: str) -> set[str]:
    return {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}


def quoted(markdown: str) -> list[str]:
    """What is written as code: spans, and the lines of blocks that are commands."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", markdown, re.S | re.M)
    lines = [re.sub(r"\\\n\s*", "", block).removeprefix("$ ") for block in fenced]
    commands = [line.removeprefix("$ ").strip() for block in lines for line in block.splitlines()]
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", markdown, flags=re.S | re.M))
    return [*(line for line in commands if FRONT_DOOR.match(line)), *spans]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_speaks_of_an_option_that_there_is_not(page: Path) -> None:
    everywhere = {"--help", "--version", "--debug"}.union(*map(options_of, COMMANDS))
    own = options_of(page.stem) | {"--help"} if page.parent.name == "commands" and page.stem in COMMANDS else everywhere
    for text in quoted(page.read_text(encoding="utf-8")):
        if text.startswith(FOREIGN):
            continue
        words = FRONT_DOOR.sub("", text).split()
        known = options_of(words[0]) | {"--help"} if words and words[0] in COMMANDS else own
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            assert option in known, f"{page.name}: {option} in `{text}`"


def test_the_table_of_options_has_every_option() -> None:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for name, command in COMMANDS.items():
        table = hooks.on_page_markdown(f"<!-- options: {name} -->")
        assert table.count("\n") == len(command.params) + 1
        for option in options_of(name):
            assert f"`{option}`" in table or not option.startswith("-"), (name, option)


# Links, and the pages as they are built


def anchors(page: Path) -> set[str]:
    from markdown.extensions.toc import slugify

    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.thorough
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    for page in PAGES:
        built = page.relative_to(DOCS).with_suffix("")
        folder = built.parent if built.name == "index" else built
        assert (tmp_path / "site" / folder / "index.html").is_file(), page
