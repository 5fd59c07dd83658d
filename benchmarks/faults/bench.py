"""The fault bench: every registered fault is planted, and the toolkit must say where it is and what it is.

    python benchmarks/faults/bench.py --out benchmarks/results/DATE-faults.jsonl [--model tiny --model 0.5b …]

One line of JSON per case, written as soon as it is judged; cases that the file holds already are left out, so an
interrupted run goes on where it stopped. `table.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import Case, file_cases, mha_cases
from container import PlantError
from engine import Values
from judging import Result, judge_file
from judging_pairs import clean_cases, judge_clean, judge_located, judge_pair, pair_cases
from judging_traces import Studio, engine_cases, judge_engine, judge_trace, trace_cases
from small_model import TINY, TINY_MHA, write_small
from tensor_faults import MENDED, REFUSED
from workshop import Workshop

from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.convert import convert
from aprjax.checkpoint.fetch import model_location
from aprjax.qwen2 import PRESETS
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.text import PROBES, Tokenizer

# Engines that go through a model's layers together, so that its weights are decoded once for all of them.
AT_ONCE = 16
GROUPS = ("file", "computation", "trace", "pair", "locate", "clean")
MODELS = ("tiny", "tiny-mha", "0.5b", "1.5b")
# Those of tests/bisect/test_layers.py, below the vocabulary of the small model.
TINY_TOKENS = (5, 17, 300, 5, 256, 41, 99, 3, 250, 12, 7)
# "What is 2+2?" of Qwen2.5.
REAL_TOKENS = (3838, 374, 220, 17, 10, 17, 30)
TINY_PROBES = ("7 tokens", "15 tokens", "70 tokens")


def workshop(name: str, folder: Path) -> Workshop:
    """The model, its clean copy to plant faults in, and the reference."""
    if name.startswith("tiny"):
        path = write_small(folder / f"{name}.gguf", TINY_MHA if name == "tiny-mha" else TINY)
        convert(path, folder / f"{name}.apr")
        return Workshop(name, folder / f"{name}.apr", open_checkpoint(path), folder, TINY_TOKENS)
    path = model_location(f"qwen2.5-coder-{name}")
    clean = path
    if name == "1.5b":
        clean = folder / "1.5b.apr"
        if not clean.exists():
            convert(path, clean)
    return Workshop(name, clean, open_checkpoint(path), folder, REAL_TOKENS)


# Presets that real models run by: one of each kind of product.
_FEW = ("float32", "llama.cpp", "llama.cpp-exact", "realizar")


def all_cases(shop: Workshop, *, few: bool) -> list[Case]:
    """Everything for a model: the full cross product, or a part of it where a case takes seconds."""
    if shop.name == "tiny-mha":
        return list(mha_cases(range(shop.layers)))
    last = shop.layers - 1
    chosen = list(range(shop.layers)) if shop.name == "tiny" else [0, shop.layers // 2, last]
    few = few or shop.name != "tiny"
    files = list(file_cases(shop.name, chosen, few=few))
    computed = engine_cases(shop.name, chosen, few=few)
    in_layers = [case for case in computed if case.layer is not None]
    traces = trace_cases(shop.name, chosen, few=few)
    pairs, located, probes = (40, 4, TINY_PROBES) if shop.name == "tiny" else (10, 10, tuple(p.name for p in PROBES))
    names = tuple(PRESETS)
    if shop.name == "0.5b":
        # Seconds each: of faults of the computation some, most of them of one layer.
        computed = [computed[0], *computed[1:40:19], *in_layers[::4]]
        traces, pairs, probes, names = traces[::3], 5, ("direct", "chatml"), _FEW
    if shop.name == "1.5b":
        # A minute or more each: of every kind of fault some, at the first, the middle and the last layer.
        files, computed, traces = files[4::11], in_layers[::7], traces[1::10]
        pairs, located, probes, names = 1, 4, ("direct",), ("llama.cpp",)
    cases = [*files, *computed, *traces]
    cases += pair_cases(files, pairs, seed=1)
    cases += pair_cases(in_layers, pairs, seed=2)
    found = [case for case in files if case.fault not in (*REFUSED, *MENDED)]
    cases += [Case(shop.name, "locate", case.fault, parts=(case,)) for case in found[::located]]
    return cases + clean_cases(shop.name, probes, names)


def prompts_of(shop: Workshop) -> dict[str, tuple[int, ...]]:
    """The probes' tokens; of the small model, which has no words, tokens of three lengths."""
    if shop.name.startswith("tiny"):
        return {name: tuple((7 * i + 3) % 320 for i in range(int(name.split()[0]))) for name in TINY_PROBES}
    tokenizer = Tokenizer.from_checkpoint(shop.ref)
    return {probe.name: tuple(tokenizer.encode(probe.prompt())) for probe in PROBES}


def results(shop: Workshop, cases: Sequence[Case], before: Container[str] = ()) -> Iterator[tuple[Case, Result | None]]:
    """The result of every case; None where the fault does not exist in this model.

    Before engines compute wrongly, one that does not must be found to be right, unless that is among `before`.
    """
    real = shop.name in ("0.5b", "1.5b")
    prompts = prompts_of(shop) if any(case.group == "clean" for case in cases) else {}
    for case in cases:
        try:
            if case.group == "file":
                yield case, judge_file(shop, case, bounds=real)
            elif case.group == "pair" and case.parts[0].group == "file":
                yield case, judge_pair(shop, case)
            elif case.group == "locate":
                yield case, judge_located(shop, case)
            elif case.group == "clean":
                yield case, judge_clean(shop, case, prompts)
        except PlantError as error:
            print(f"left out: {case.key}: {error}", file=sys.stderr)
            yield case, None
    traced = [case for case in cases if is_traced(case)]
    if not traced:
        return
    studio = Studio(shop.name, shop.ref, shop.folder, shop.tokens)
    sound = Case(shop.name, "clean", "trace of a sound engine")
    clean: Values | None = None
    for start in range(0, len(traced), AT_ONCE):
        group = traced[start : start + AT_ONCE]
        batch = [case for case in group if case.group != "trace"]
        if clean is None:
            # The sound engine goes through the weights with the first faulty ones.
            clean, *ran = studio.run([sound, *batch])
            if sound.key not in before:
                yield sound, judge_engine(studio, sound, clean)
        else:
            ran = studio.run(batch) if batch else []
        for case, values in zip(batch, ran, strict=True):
            yield case, judge_engine(studio, case, values, clean=clean if real else None)
        for case in group:
            if case.group == "trace":
                yield case, judge_trace(studio, case, clean)


def is_traced(case: Case) -> bool:
    """Whether it is a fault of an engine or a trace."""
    return case.group in ("computation", "trace") or (case.group == "pair" and case.parts[0].group == "computation")


def done_before(path: Path) -> set[str]:
    """Keys of the cases that a file of results holds; half a line, which a killed run left at its end, is taken off."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    return {json.loads(line)["case"]["key"] for line in whole.decode().splitlines()}


def run(shop: Workshop, cases: Sequence[Case], out: Path, *, most: int | None = None) -> None:
    """Judges the cases that are not done (no more than `most` of them), and appends their results."""
    before = done_before(out)
    todo = [case for case in cases if case.key not in before][:most]
    start = time.perf_counter()
    with out.open("a", encoding="utf-8") as stream:
        for index, (case, result) in enumerate(results(shop, todo, before)):
            if result is None:
                continue
            stream.write(json.dumps(result.to_json(), default=float) + "\n")
            stream.flush()
            good = False not in (result.localised, result.explained, result.both) and not result.false_alarm
            state = "ok" if good else f"MISS {result.reason[:160]}"
            print(f"{time.perf_counter() - start:7.1f} s {index + 1}/{len(todo)} {case.key}: {state}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--group", action="append", choices=GROUPS)
    parser.add_argument("--fault", action="append", help="only these faults")
    parser.add_argument("--layer", type=int, action="append", help="only these layers")
    parser.add_argument("--few", action="store_true", help="each fault once or twice")
    parser.add_argument("--most", type=int, help="no more cases than these, and then stop")
    parser.add_argument("--folder", type=Path, help="for models and faulty copies, kept; a temporary one by default")
    options = parser.parse_args()
    enable_compilation_cache()
    with tempfile.TemporaryDirectory(prefix="aprjax-") as temporary:
        folder = options.folder or Path(temporary)
        for name in options.model or MODELS:
            shop = workshop(name, folder)
            cases = [
                case
                for case in all_cases(shop, few=options.few)
                if (not options.group or case.group in options.group)
                and (not options.fault or case.fault in options.fault)
                and (not options.layer or case.layer in options.layer)
            ]
            run(shop, cases, options.out, most=options.most)
    return 0


if __name__ == "__main__":
    sys.exit(main())
