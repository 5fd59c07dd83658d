"""The two sides on the bench: every piece of work that several tests need is done once, when it is first needed."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from aprjax.bisect.files import FilesReport, compare_files
from aprjax.bisect.layers.compare import layers
from aprjax.bisect.lockstep import Runner
from aprjax.bisect.margins.pair import AnySide, compare_margins
from aprjax.bisect.margins.report import FedTokens, MarginsReport
from aprjax.bisect.open_sides import Opened, arithmetics, run_side
from aprjax.bisect.tokens.compare import compare_tokens
from aprjax.bisect.tokens.fed import TokensReport, tokenize_both
from aprjax.bisect.tokens.report import TokensComparison
from aprjax.bisect.traced import Side, Traced, llama_preset
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.types import Checkpoint, CheckpointError
from aprjax.contracts.check.answers import Answer, answers_json, ask
from aprjax.contracts.check.opening import open_pair
from aprjax.contracts.check.traced_pass import Observer, TracedPass
from aprjax.contracts.types import CheckedSide, LayerStep
from aprjax.qwen2.arithmetic import Arithmetic, preset
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.model import Qwen2
from aprjax.qwen2.stages import Stage
from aprjax.text.probes import PROBES

# Upstream's least number of positions (FALSIFY-CPU-GPU-013) is 64; half as many again costs little.
POSITIONS = 96
Progress = Callable[[str, int, int], None]


class Bench:
    """Model and reference, and what was measured of them so far.

    Args:
        model: the side to judge, as given on the command line.
        ref: the side to judge it by.
        both, model_arithmetic, ref_arithmetic: names of presets; None takes what `layers` takes.
        steps: the steps of a layer that the pass is to hold to their tolerances.
        progress: told what is being done.

    Raises:
        CheckpointError: a side cannot be read.
    """

    def __init__(
        self,
        model: str,
        ref: str,
        *,
        both: str | None = None,
        model_arithmetic: str | None = None,
        ref_arithmetic: str | None = None,
        steps: tuple[LayerStep, ...] = (),
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        enable_compilation_cache()
        self.opened = open_pair(model, ref)
        self.steps = steps
        self.progress = progress
        self.artifacts: dict[str, str] = {}
        self._asked = {"both": both, "model": model_arithmetic, "ref": ref_arithmetic}
        self._stack = ExitStack()
        self._done: dict[Any, Any] = {}
        options = {"--arithmetic": both, "--model-arithmetic": model_arithmetic, "--ref-arithmetic": ref_arithmetic}
        given = [shlex.join([name, value]) for name, value in options.items() if value is not None]
        self.side_options = " ".join([shlex.join(["--model", model, "--ref", ref]), *given])

    def close(self) -> None:
        """Lets go of exported files and traces."""
        self._stack.close()

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `make`, made when first asked for; what it raises is raised again to whoever asks later."""
        if key not in self._done:
            try:
                self._done[key] = make()
            except (CheckpointError, ValueError) as error:
                self._done[key] = error
        if isinstance(self._done[key], Exception):
            raise self._done[key]
        return self._done[key]

    def keep_folder(self) -> Path:
        """A folder that goes with the bench."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="aprjax-")))

    def keep(self, name: str, document: Any) -> str:
        """Keeps a raw output under a file name: JSON, or text as it is."""
        if not isinstance(document, str):
            document = json.dumps(document, indent=1, allow_nan=False, default=float) + "\n"
        self.artifacts[name] = document
        return name

    def side(self, name: str) -> Opened:
        """The opened side."""
        return self.opened[0 if name == "model" else 1]

    def checkpoint(self, name: str) -> Checkpoint:
        """The file of a side.

        Raises:
            CheckpointError: it is a trace whose file is not at hand.
        """
        found = self.side(name).checkpoint
        if found is None:
            raise CheckpointError(
                "the side is a trace, and the file that it was made from is not at hand", file=self.side(name).side.path
            )
        return found

    @property
    def files(self) -> FilesReport | None:
        """The comparison of the two files; None where one is not at hand."""
        first, second = (side.checkpoint for side in self.opened)
        if first is None or second is None:
            return None

        def told(done: int, total: int) -> None:
            self.progress("comparing the files", done, total)

        return self.once("files", lambda: compare_files(first, second, progress=told))

    @cached_property
    def run_by(self) -> tuple[Arithmetic | None, Arithmetic | None]:
        """How each side computes."""
        return arithmetics(self.opened, self.files, **self._asked)

    @property
    def same_computation(self) -> bool:
        """Whether both sides run the same bytes by one arithmetic here, so that one run serves both."""
        files = self.files
        return (
            files is not None
            and not files.tensors
            and not files.config
            and self.run_by[0] == self.run_by[1]
            and all(side.runs_here for side in self.opened)
        )

    @property
    def tokens(self) -> TokensComparison:
        """The comparison of tokenizers, special tokens and templates."""
        return self.once("tokens", lambda: compare_tokens(self.opened))

    def prompt(self, name: str) -> TokensReport:
        """A probe's tokens, or a recorded trace's own.

        Raises:
            CheckpointError: no side can encode it.
        """
        recorded = next((side.tokens for side in self.opened if side.tokens is not None), None)
        if recorded is not None:
            return TokensReport("trace", None, "none", recorded)
        probe = next(probe for probe in PROBES if probe.name == name)
        pair = self.checkpoint("model"), self.checkpoint("ref")
        return self.once(("prompt", name), lambda: tokenize_both(*pair, name=name, text=probe.text, times=probe.wrap))

    def traced(self, name: str) -> TracedPass:
        """One lockstep pass over a probe; with a recorded trace there is but one prompt.

        Raises:
            CheckpointError: a side cannot run it.
        """
        asked = self.prompt(name)
        return self.once(("traced", asked.name), lambda: self._trace(asked))

    def _trace(self, asked: TokensReport) -> TracedPass:
        known = self.side("ref").checkpoint or self.side("model").checkpoint
        observer = Observer(None if known is None else known.config, self.steps)
        with ExitStack() as stack:
            pair = [run_side(s, asked.ids, by, stack) for s, by in zip(self.opened, self.run_by, strict=True)]
            report = layers(
                *pair,
                tokens=asked,
                positions=tuple(range(len(asked.ids))),
                files=self.files,
                progress=lambda what, done, total: self.progress(f"{asked.name}: {what}", done, total),
                observe=observer,
            )
        artifact = self.keep(f"layers-{asked.name}.json", report.to_json())
        return TracedPass(report, observer.spreads, observer.uses, artifact)

    def long_tokens(self, what: str = "pair") -> TokensReport:
        """The first tokens of the long probe; of a pair with a recorded trace, the trace's own, however few."""
        asked = self.prompt("long") if what == "pair" else self._of_one_file()
        return TokensReport("long", None, "none", tuple(asked.ids[:POSITIONS]), asked.agree, asked.reason)

    def _of_one_file(self) -> TokensReport:
        file = self.checkpoint("ref")
        probe = next(probe for probe in PROBES if probe.name == "long")
        told = {"name": probe.name, "text": probe.text, "times": probe.wrap}
        return self.once("one file", lambda: tokenize_both(file, file, **told))

    def output(self, what: str) -> MarginsReport:
        """Both sides' logits at every position: of the pair, of two backends, or of two arithmetics on one file.

        Raises:
            CheckpointError: a side cannot run it.
            EngineError: llama.cpp is asked for, and cannot run.
        """
        return self.once(("output", what), lambda: self._output(what))

    def _output(self, what: str) -> MarginsReport:
        tokens = self.long_tokens(what)
        with ExitStack() as stack:
            pair, files = self._sides_of_output(what, tokens.ids, stack)
            asked: dict[str, Any] = {
                "fed": FedTokens(what, None, "none", tokens.ids),
                "tokens": tokens,
                "files": files,
                "progress": lambda text, done, total: self.progress(f"{what}: {text}", done, total),
            }
            report = compare_margins(*pair, **asked, with_noise=False)
            if report.flips:
                # Only a flip asks for the noise, which takes several runs of each side.
                report = compare_margins(*pair, **asked, with_noise=True)
        self.keep(f"output-{what}.json", report.to_json())
        return report

    def _sides_of_output(
        self, what: str, tokens: tuple[int, ...], stack: ExitStack
    ) -> tuple[tuple[AnySide, AnySide], FilesReport | None]:
        if what == "pair":
            sides = [run_side(s, tokens, by, stack) for s, by in zip(self.opened, self.run_by, strict=True)]
            return (sides[0], sides[1]), self.files
        if what == "arithmetics":
            file = self.checkpoint("model")
            return (Runner(file, preset("llama.cpp")), Runner(file, preset("float32"))), None
        file = self.gguf()
        return (Runner(file, preset("llama.cpp")), self._llama_cpp(file, tokens, stack)), None

    def gguf(self) -> Checkpoint:
        """A side's GGUF file.

        Raises:
            CheckpointError: neither side has one.
        """
        for name in ("ref", "model"):
            file = self.side(name).checkpoint
            if file is not None and file.format == "gguf":
                return file
        raise CheckpointError(
            "neither side is a GGUF file, which llama.cpp could run", fix="give the GGUF file as reference"
        )

    def _llama_cpp(self, file: Checkpoint, tokens: tuple[int, ...], stack: ExitStack) -> Side:
        from aprjax.trace.llama_cpp import LlamaOptions, engine_facts, save_llama_cpp

        options = LlamaOptions()
        known = {key: str(value) for key, value in asdict(options).items() if value is not None}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aprjax-")))
        target = folder / "logits.safetensors"
        saved = save_llama_cpp(file.path, list(tokens), target, options, stages=(Stage.LM_HEAD,))
        return Traced(saved, file, llama_preset({**known, **engine_facts(options)}))

    def loaded(self, name: str) -> Qwen2:
        """A side's file, loaded; one where both sides are one computation.

        Raises:
            CheckpointError: the file does not run as a Qwen2, or is not at hand.
        """
        owner = "ref" if self.same_computation else name
        arithmetic = self.run_by[0 if owner == "model" else 1] or preset("llama.cpp")
        return self.once(("loaded", owner), lambda: Qwen2(self.checkpoint(owner), arithmetic))

    def answers(self, name: str) -> dict[tuple[str, str], Answer]:
        """A side's answers to all questions.

        Raises:
            CheckpointError: the side cannot generate, or has no tokenizer.
        """
        owner = "ref" if self.same_computation else name
        arithmetic = self.run_by[0 if owner == "model" else 1]

        def make() -> dict[tuple[str, str], Answer]:
            self.progress(f"{owner}: answering", 0, 1)
            return ask(self.side(owner), lambda: self.loaded(owner))

        found = self.once(("answers", owner), make)
        self.keep(f"answers-{name}.json", answers_json(found, arithmetic))
        return found

    def exported(self) -> Path:
        """The model's file as GGUF, every block kept; it lies in a folder that goes with the bench.

        Raises:
            CheckpointError: it cannot be written as GGUF.
        """

        def make() -> Path:
            self.progress("exporting to GGUF", 0, 1)
            folder = self.keep_folder()
            convert(self.checkpoint("model").path, folder / "exported.gguf", keep_blocks=True)
            return folder / "exported.gguf"

        return self.once("exported", make)

    def describe(self) -> dict[str, CheckedSide]:
        """What was checked."""
        found = {}
        for name, side, by in zip(("model", "ref"), self.opened, self.run_by, strict=True):
            file = side.checkpoint
            found[name] = CheckedSide(
                text=side.side.text,
                path=str(side.side.path if file is None else file.path),
                sha256=None if file is None else file.sha256(),
                nbytes=None if file is None else sum(part.stat().st_size for part in file.files or (file.path,)),
                format=side.side.kind if file is None or side.side.kind != "checkpoint" else file.format,
                arithmetic="" if by is None else by.name,
                architecture="" if file is None else file.config.architecture,
                tensors=None if file is None else len(file.tensors),
            )
        return found
