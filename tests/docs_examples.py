"""The folder in which the examples of docs/ run, and the script that writes their outputs anew.

python tests/docs_examples.py docs/index.md docs/commands/files.md      the quick and thorough ones of these pages
python tests/docs_examples.py --real docs/commands/fetch.md             those on real models as well
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from console_examples import ROOT, Examples, renew

# What docs/commands/index.md asks a reader to do first.
SETUP = (
    "python -m aprjax demo",
    "python -m aprjax demo --fault chatml-row --out out/chatml",
    "cp aprjax/assets/tiny-qwen2-q4_k.gguf out/sound.gguf",
)


def make_demo_files(folder: Path, *, judged: bool = True) -> None:
    """Does what the reader of a page has done: the clone is there, and both demos have been run.

    Without `judged` the demos' files are made, and not their reports, which take compiling.
    """
    for name in ("aprjax", "contracts", "evidence", "tests"):
        (folder / name).symlink_to(ROOT / name)
    if not judged:
        from aprjax.demo import DemoFault, prepare

        for fault, name in ((DemoFault.GATE_UP_SWAPPED, "demo"), (DemoFault.CHATML_ROW, "chatml")):
            (folder / "out" / name).mkdir(parents=True)
            prepare(fault, folder / "out" / name)
    examples = Examples(folder)
    for line in SETUP if judged else SETUP[-1:]:
        output = examples.run(line)
        assert examples.code == 0, output


def new_folder(made: Path, folder: Path) -> Path:
    """A folder for one page, which begins with what was made once."""
    for source in made.iterdir():
        if source.is_symlink():
            (folder / source.name).symlink_to(source.resolve())
        else:
            shutil.copytree(source, folder / source.name)
    return folder


def main(arguments: list[str]) -> None:
    """Writes the outputs of the pages' examples anew."""
    kinds = ["quick", "thorough"] + ["real"] * ("--real" in arguments)
    with tempfile.TemporaryDirectory() as made:
        make_demo_files(Path(made))
        for page in (Path(argument) for argument in arguments if argument != "--real"):
            with tempfile.TemporaryDirectory() as folder:
                text = renew(page.read_text(encoding="utf-8"), Examples(new_folder(Path(made), Path(folder))), kinds)
            page.write_text(text, encoding="utf-8")
            print(page, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
