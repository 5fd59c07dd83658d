"""What upstream's bounds look at, for every fault of the bench on a real model, by the shortest way.

    python benchmarks/faults/measure_bounds.py --model 1.5b --out evidence/fault-bounds-1.5b-DATE

`bench.py` asks the whole toolkit about each fault. Here a faulty file shares with the reference every matrix that is
the same bytes in both, so that a fault costs one pass; faulty engines run together. Which stage is the first beyond
rounding is asked of the planted layer alone: all layers before it are the same bytes under the same arithmetic, or
computed by the same code, and do not differ. Faults that the folder's `result.json` has are not measured again:
`--minutes` ends a part, and the same command goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench import REAL_TOKENS, workshop
from bounds import bounds, document, write
from cases import Case, file_cases
from container import PlantError
from engine import Values
from judging_pairs import _MIXED
from judging_traces import Studio, bounds_between, engine_cases, expected_place
from tensor_faults import MENDED
from workshop import PlantedCase, Workshop

from aprjax.bisect.lockstep import LayerPair, Runner, WeightSource, arbiter, run_final
from aprjax.bisect.metrics import relative_l2
from aprjax.bisect.noise.floor import NoiseFloor
from aprjax.bisect.replay.layers import padded
from aprjax.checkpoint import open_checkpoint
from aprjax.checkpoint.fetch import model_location
from aprjax.checkpoint.types import Checkpoint, CheckpointError, EncodedTensor
from aprjax.qwen2.arithmetic import PRESETS, Arithmetic
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.loading import load_layer, require_runnable
from aprjax.qwen2.model import embed_padded, trim
from aprjax.qwen2.modules import DecoderLayer
from aprjax.qwen2.stages import OUTSIDE, Stage

# Engines that go through the layers together: some 40 MB of captured values each, of a 1.5B model. More would decode
# the weights less often, and lose more when a part is cut off.
AT_ONCE = 12
SELECTION = [
    "Of every kind of fault in the bench's register one is taken (of a file at its first or last strength and tensor",
    "in turn, of a computation in one layer if it can be), the layers being the first, the middle and the last in",
    "turn; then the others of the bench's short list, as far as the time went. What the reader refuses is no case.",
]
Staged = dict[Stage, np.ndarray]


class Held(WeightSource):
    """Matrices of the reference, packed once; of a faulty file only those that differ are packed."""

    def __init__(self, ref: Checkpoint) -> None:
        super().__init__(lambda name: name not in self.changed)
        self.ref = ref
        self.changed: set[str] = set()

    def look_at(self, model: Checkpoint) -> None:
        """Which tensors of a file are not the reference's, byte for byte."""
        self.changed = {name for name in self.ref.tensors if not _same(model.tensors.get(name), self.ref.tensors[name])}
        # The head goes by this name, also where it is the embedding.
        if "lm_head.weight" not in self.ref.tensors and "model.embed_tokens.weight" in self.changed:
            self.changed.add("lm_head.weight")

    def clear(self) -> None:
        """Keeps everything: one model is in memory, and every fault is of it."""


def _same(one: EncodedTensor | None, other: EncodedTensor) -> bool:
    return (
        one is not None
        and (one.block_type, one.shape, one.row_padded) == (other.block_type, other.shape, other.row_padded)
        and np.array_equal(one.data, other.data)
    )


class Files:
    """The reference's runs, and a faulty file's beside them."""

    def __init__(self, shop: Workshop) -> None:
        self.shop, self.held = shop, Held(shop.ref)
        self.runs: dict[str, tuple[Values, list[np.ndarray]]] = {}

    @cached_property
    def layers(self) -> list[DecoderLayer]:
        """The reference's."""
        self.held.changed = set()
        return [load_layer(self.shop.ref, index, self.held) for index in range(self.shop.layers)]

    def ref_run(self, arithmetic: Arithmetic) -> tuple[Values, list[np.ndarray]]:
        """The reference's values, and the input of every layer, the last one's output behind them."""
        if arithmetic.name not in self.runs:
            self.runs[arithmetic.name] = self._run(Runner(self.shop.ref, arithmetic), self.layers)
        return self.runs[arithmetic.name]

    def _run(self, side: Runner, layers: Sequence[DecoderLayer]) -> tuple[Values, list[np.ndarray]]:
        tokens = list(self.shop.tokens)
        hidden = [embed_padded(side.checkpoint, tokens, side.arithmetic)]
        context, values = side.context(len(hidden[0])), {}
        for index, layer in enumerate(layers):
            output, captured = side.run(layer, hidden[-1], context)
            hidden.append(output)
            values |= {(index, str(s)): trim(s, value, len(tokens)) for s, value in captured.items()}
        values[OUTSIDE, "embedding"] = hidden[0][: len(tokens)]
        return values, hidden

    def head(self, model: Runner, ref: Runner, hidden: tuple[np.ndarray, np.ndarray]) -> LayerPair:
        """Final norm and head of both."""
        rows = list(range(len(self.shop.tokens)))
        ((_, pair),) = run_final(model, ref, hidden, rows, self.held)
        return pair

    def measure(self, case: Case) -> dict[str, Any] | None:
        """One fault of a file; None where the model does not admit it, or the file is refused."""
        try:
            with self.shop.model((case,)) as (model, (planted,)):
                require_runnable(model)
                return self._measured(case, model, planted)
        except (PlantError, CheckpointError) as error:
            print(f"left out: {case.key}: {error}", file=sys.stderr)
            return None

    def _measured(self, case: Case, model: Checkpoint, planted: PlantedCase) -> dict[str, Any]:
        shop, count = self.shop, len(self.shop.tokens)
        mixed = any(
            name in model.tensors and model.tensors[name].block_type != tensor.block_type
            for name, tensor in shop.ref.tensors.items()
        )
        # As `layers` chooses: where block types differ, only decoded weights compare the files alone.
        arithmetic = PRESETS["float32" if mixed else "llama.cpp"]
        theirs, hidden = self.ref_run(arithmetic)
        self.held.look_at(model)
        sides = Runner(model, arithmetic), Runner(shop.ref, arithmetic)
        layers = [load_layer(model, index, self.held) for index in range(shop.layers)]
        ours, own = self._run(sides[0], layers)
        head = self.head(*sides, (own[-1][:count], hidden[-1][:count]))
        ours[OUTSIDE, "lm_head"], clean = head.model[Stage.LM_HEAD], {**theirs}
        clean[OUTSIDE, "lm_head"] = head.ref[Stage.LM_HEAD]
        if planted.layer == OUTSIDE and planted.stage == "embedding":
            pair = LayerPair(OUTSIDE, {}, *_one(Stage.EMBEDDING, theirs, ours), None, dict)
        elif planted.layer == OUTSIDE:
            pair = self.head(*sides, (hidden[-1][:count], hidden[-1][:count]))
        else:
            pair = self._layer(sides, planted.layer, layers[planted.layer], hidden[planted.layer])
        place = first_beyond(pair, count)
        row = {"case": case.to_json(), "measures": bounds_between(ours, clean)}
        return {**row, "localised": place == planted.stage, "found": {"stage": place}}

    def _layer(self, sides: tuple[Runner, Runner], index: int, layer: DecoderLayer, hidden: np.ndarray) -> LayerPair:
        """The planted layer, computed from the reference's own inputs."""
        count, arithmetic = len(self.shop.tokens), sides[1].arithmetic
        context = sides[1].context(len(hidden))
        _, theirs = sides[1].run(self.layers[index], hidden, context)
        # A file's own constants are in its context: the base of the rotation.
        _, local = sides[0].run(layer, hidden, sides[0].context(len(hidden)), theirs)
        judge = Runner(self.shop.ref, arbiter(arithmetic))

        def rounding() -> Staged:
            return _trimmed(judge.run(self.layers[index], hidden, judge.context(len(hidden)), theirs)[1], count)

        return LayerPair(index, {}, _trimmed(theirs, count), _trimmed(local, count), None, rounding)

    def clean(self, case: Case) -> dict[str, Any]:
        """One file under two arithmetics."""
        one, _, other = case.fault.rpartition(", ")[0].partition(" against ")
        self.held.changed = set()
        values = []
        for name in (one, other):
            side = Runner(self.shop.ref, PRESETS[name])
            found, hidden = self.ref_run(side.arithmetic)
            last = hidden[-1][: len(self.shop.tokens)]
            values.append({**found, (OUTSIDE, "lm_head"): self.head(side, side, (last, last)).model[Stage.LM_HEAD]})
        return {"case": case.to_json(), "measures": bounds_between(*values)}


def _one(stage: Stage, theirs: Values, ours: Values) -> tuple[Staged, Staged]:
    return {stage: theirs[OUTSIDE, str(stage)]}, {stage: ours[OUTSIDE, str(stage)]}


def _trimmed(values: Staged, count: int) -> Staged:
    return {stage: trim(stage, value, count) for stage, value in values.items()}


def first_beyond(pair: LayerPair, count: int) -> str | None:
    """The first stage that differs, given its inputs, by more than rounding explains, or is no number."""
    noise, rows = NoiseFloor(), list(range(count))
    for stage in Stage:
        if stage not in pair.local:
            continue
        local, against = pair.local[stage], (pair.ref if pair.against is None else pair.against)[stage]
        if not np.isfinite(local[np.isfinite(against)]).all():
            return str(stage)
        apart = relative_l2(local, against)
        allowed = 0.0 if stage is Stage.EMBEDDING else noise.tolerance(pair, stage, rows, apart)
        if apart and allowed is not None and apart > allowed:
            return str(stage)
    return None


class Engines:
    """Faults of computations: a NumPy engine's values against the file's, from the engine's own inputs."""

    def __init__(self, files: Files) -> None:
        shop = files.shop
        self.files, self.studio = files, Studio(shop.name, shop.ref, shop.folder, shop.tokens)
        self.sound: Values | None = None

    def measure(self, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
        """Some faults; a sound engine goes with the first of them."""
        sound = [] if self.sound is not None else [Case(self.studio.name, "clean", "sound")]
        runs = self.studio.run([*sound, *cases])
        if self.sound is None:
            self.sound = runs.pop(0)
        for case, values in zip(cases, runs, strict=True):
            layer, stage = expected_place(case)
            place = first_beyond(self._replayed(values, layer, stage), len(self.studio.tokens))
            row = {"case": case.to_json(), "measures": bounds_between(values, self.sound)}
            yield {**row, "localised": place == stage, "found": {"stage": place}}

    def _replayed(self, values: Values, layer: int, stage: str) -> LayerPair:
        ref, tokens = self.studio.ref, list(self.studio.tokens)
        side, judge = Runner(ref, PRESETS["float32"]), Runner(ref, arbiter(PRESETS["float32"]))
        embedded = embed_padded(ref, tokens, side.arithmetic)
        if layer == OUTSIDE and stage == "embedding":
            ours, theirs = {Stage.EMBEDDING: values[OUTSIDE, stage]}, {Stage.EMBEDDING: embedded[: len(tokens)]}
            return LayerPair(OUTSIDE, ours, theirs, ours, None, dict)
        self.files.held.changed = set()
        if layer == OUTSIDE:
            last = values[self.files.shop.layers - 1, "post_ffn_residual"]
            pair = self.files.head(side, side, (last, last))
            normed = {Stage.LM_HEAD: values[OUTSIDE, "lm_head"], Stage.FINAL_NORM: values[OUTSIDE, "final_norm"]}
            return LayerPair(OUTSIDE, normed, pair.ref, normed, None, pair.rounding)
        ours = {s: values[layer, str(s)] for s in Stage if (layer, str(s)) in values}
        given = {s: padded(s, value, len(embedded)) for s, value in ours.items()}
        before = values[(layer - 1, "post_ffn_residual") if layer else (OUTSIDE, "embedding")]
        hidden = padded(Stage.POST_FFN_RESIDUAL, before, len(embedded))

        def computed(runner: Runner) -> Staged:
            found = runner.run(self.files.layers[layer], hidden, runner.context(len(hidden)), given)[1]
            return _visible(_trimmed(found, len(tokens)))

        expected, ours = computed(side), _visible(ours)
        return LayerPair(layer, ours, expected, ours, None, lambda: computed(judge), against=expected, rounded=expected)


def _visible(values: Staged) -> Staged:
    """Without the scores of masked keys, which no result depends on."""
    from aprjax.bisect.replay.layers import visible_part

    return {stage: visible_part(stage, value) for stage, value in values.items()}


def registered(name: str, layers: int) -> tuple[list[Case], list[Case]]:
    """The bench's short list: faults of files, and of computations."""
    chosen = [0, layers // 2, layers - 1]
    # Neither controls, nor a shape that is mended on reading: no fault of the model that runs.
    planted = [
        case
        for case in file_cases(name, chosen, few=True)
        if case.fault not in MENDED and not case.fault.startswith("control")
    ]
    return planted, engine_cases(name, chosen, few=True)


def in_turn(cases: Sequence[Case]) -> list[Case]:
    """Each kind once, its first case and its last by turns, and then the others."""
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.fault, []).append(case)
    chosen = [
        found[-1] if found[0].group == "computation" or turn % 2 else found[0]
        for turn, found in enumerate(kinds.values())
    ]
    return [*chosen, *(case for case in cases if case not in chosen)]


def measured(shop: Workshop, done: set[str], stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The cases that are not done, until it is time to stop."""
    files = Files(shop)
    clean = [Case(shop.name, "clean", f"{one} against {other}, direct") for one, other in _MIXED]
    for case in clean:
        if case.key not in done and not stop():
            yield files.clean(case)
    engines = Engines(files)
    planted, computed = (in_turn(cases) for cases in registered(shop.name, shop.layers))
    kinds = len({case.fault for case in planted}), len({case.fault for case in computed})
    for kind, part in (
        ("file", slice(0, kinds[0])),
        ("computation", slice(0, kinds[1])),
        ("file", slice(kinds[0], None)),
        ("computation", slice(kinds[1], None)),
    ):
        todo = [case for case in (planted if kind == "file" else computed)[part] if case.key not in done]
        for case in todo if kind == "file" else ():
            if stop():
                return
            row = files.measure(case)
            if row is not None:
                yield row
        for start in range(0, len(todo), AT_ONCE) if kind == "computation" else ():
            if stop():
                return
            yield from engines.measure(todo[start : start + AT_ONCE])


def bench_of(name: str, folder: Path) -> Workshop:
    """The model and its reference; a real one's faults are planted in a copy of its GGUF file, which opens at once."""
    if name == "tiny":
        return workshop(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = model_location(f"qwen2.5-coder-{name}")
    return Workshop(name, path, open_checkpoint(path), folder, REAL_TOKENS)


def save(out: Path, name: str, layers: int, rows: list[dict[str, Any]]) -> None:
    """The folder's JSON and page, with how many kinds of faults are among the rows."""
    order = ("clean", "file", "computation")
    rows.sort(key=lambda one: order.index(one["group"]))
    kinds = {}
    for group, cases in zip(order[1:], registered(name, layers), strict=True):
        have = {row["fault"] for row in rows if row["group"] == group}
        kinds[group] = [len(have), len({case.fault for case in cases})]
    command = f"python benchmarks/faults/measure_bounds.py --model {name} --out evidence/{out.name}"
    write(out, document(rows, [command], judged="place", selection=SELECTION, kinds=kinds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "0.5b", "1.5b"), default="1.5b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop then; the same command goes on")
    parser.add_argument("--folder", type=Path, help="for faulty copies, kept; a temporary one by default")
    options = parser.parse_args()
    enable_compilation_cache()
    kept = options.out / "result.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text("ascii"))["cases"] if kept.exists() else []
    done, end = {row["key"] for row in rows}, time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="aprjax-") as temporary:
        shop = bench_of(options.model, options.folder or Path(temporary))
        for row in measured(shop, done, lambda: time.monotonic() > end):
            (found,) = bounds([row])
            rows.append({"key": row["case"]["key"], "layer": row["case"]["layer"], **found})
            place = row.get("found", {}).get("stage")
            state = "" if row.get("localised") is not False else f": MISS, found at {place}"
            print(f"{len(rows)} {row['case']['key']}{state}", file=sys.stderr, flush=True)
            save(options.out, options.model, shop.layers, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
