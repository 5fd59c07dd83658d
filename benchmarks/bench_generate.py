"""Decoding speed against llama.cpp on the same file, alone and many sequences at once; and what `generate` costs.

    python benchmarks/bench_generate.py [--model qwen2.5-coder-0.5b] [--tokens 64] [--repeats 3] [--agreement 128]

Both decode greedily after the same prompt, in turns within one run, with as many threads as there are cores. llama.cpp
is the build that is installed, float32 cache, flash attention off; loading, prefill and compilation are left out of
both. Then a step of many sequences stands beside a prefill of as many tokens, which reads the weights as often.
With --agreement, the questions of `generate` on a pair that agrees: the reference decodes, and one pass verifies.
"""

from __future__ import annotations

import statistics
import sys
import time
from itertools import pairwise

from llama import Llama
from measured import Least, Results, Table, cores, parser

import aprjax
from aprjax.checkpoint.fetch import model_location
from aprjax.qwen2 import preset
from aprjax.qwen2.batch import generate_batch
from aprjax.qwen2.compilation import enable_compilation_cache
from aprjax.qwen2.generate import generate
from aprjax.qwen2.model import Qwen2
from aprjax.text import Tokenizer, wrap

# Long to answer, and no near-tie at the first token, as `def fib(n):` is.
PROMPT = wrap("Explain what a hash table is.", "once")
WIDTHS = (1, 4, 16)
PEER = "llama.cpp itself"
# Issue "Fast, and at full size", acceptance 3 (of llama.cpp's tokens/s) and 4 (verifying, in traced prefills).
LEAST_SPEED, MOST_PREFILLS = 0.25, 2.0


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="qwen2.5-coder-0.5b")
    options.add_argument("--arithmetic", default="llama.cpp,float32")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--agreement", type=int, default=0, metavar="TOKENS")
    options.add_argument("--without-batches", action="store_true")
    arguments = options.parse_args()
    enable_compilation_cache()
    path = model_location(arguments.model)
    checkpoint = aprjax.open(path)
    prompt = Tokenizer.from_checkpoint(checkpoint).encode(PROMPT)
    models = {name: Qwen2(checkpoint, preset(name)) for name in arguments.arithmetic.split(",")}
    about = f"{arguments.model}, {cores()} cores; {arguments.tokens} tokens, greedy; the least of {arguments.repeats}."
    results = Results("generate", about, arguments.out)
    found: dict[str, list[int]] = {}
    least = {name: Least() for name in (*models, PEER)}
    with Llama(path, 1024, all_logits=False) as peer:
        # The first round compiles and is not counted.
        for counted in (False, *[True] * arguments.repeats):
            for name, model in models.items():
                clock = least[name] if counted else Least()
                found[name] = ours(model, prompt, arguments.tokens, clock)
            answer = peer.run(prompt, arguments.tokens)
            found[PEER] = answer.tokens
            if counted:
                least[PEER].seen(*answer.decode)
    engine, steps = least[PEER], arguments.tokens - 1
    rows = [
        (
            name,
            steps / clock.wall,
            1e3 * clock.processor / steps,
            engine.wall / clock.wall,
            engine.processor / clock.processor,
            common(found[name], found[PEER]),
        )
        for name, clock in least.items()
    ]
    columns = ("", "tokens/s", "processor ms a token", "speed of llama.cpp (wall)", "(processor)", "first tokens alike")
    results.add(Table("One sequence, one token at a time", columns, rows))
    results.bar("decoding, of llama.cpp's speed (wall)", engine.wall / least["llama.cpp"].wall, at_least=LEAST_SPEED)
    if not arguments.without_batches:
        rows = [(name, width, *together(model, prompt, width)) for name, model in models.items() for width in WIDTHS]
        columns = ("", "sequences", "tokens/s", "a step s", "a prefill of as many tokens s")
        results.add(Table("Many sequences at once", columns, rows))
    if arguments.agreement:
        rows = agreement(models["llama.cpp"], prompt, arguments.agreement, arguments.repeats)
        title = f"`generate` on an agreeing pair, {arguments.agreement} tokens"
        results.add(Table(title, ("", "wall s", "processor s"), rows))
        parts = {name: (wall, processor) for name, wall, processor in rows}
        ratio = parts["verifying in one pass"][1] / parts["a traced prefill of the same length"][1]
        results.bar("verifying, in traced prefills of the same length (processor)", ratio, at_most=MOST_PREFILLS)
    return results.finish()


def ours(model: Qwen2, prompt: list[int], count: int, clock: Least) -> list[int]:
    """Decodes, timed from the first token to the last; the tokens."""
    generation = generate(model, prompt, max_new_tokens=count)
    steps = iter(generation)
    next(steps)
    clock.of(lambda: list(steps))
    return generation.tokens


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two continuations begin with alike."""
    pairs = enumerate(zip(first, second, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(first))


def together(model: Qwen2, prompt: list[int], width: int) -> tuple[float, float, float]:
    """Tokens a second and seconds of a step of many sequences, and of a prefill of as many tokens."""
    prompts, steps = [prompt] * width, 8
    clock: list[float] = []
    for _ in range(2):
        clock.clear()
        generate_batch(
            model, prompts, max_new_tokens=steps, on_step=lambda done, total: clock.append(time.perf_counter())
        )
    # The last sequence's call of each step comes when the step is done.
    step = statistics.median(b - a for a, b in pairwise(clock[width - 1 :: width]))
    tokens, prefill = (prompt * width)[:width], Least()
    for _ in range(3):
        prefill.of(lambda: model(tokens))
    return width / step, step, prefill.wall


def agreement(model: Qwen2, prompt: list[int], count: int, repeats: int) -> list[tuple[str, float, float]]:
    """What `generate` asks of an agreeing pair, part by part, and a traced prefill of the same tokens."""
    from aprjax.bisect.generate.sides import LocalGenerator

    side = LocalGenerator(model.checkpoint, model.arithmetic)
    fed, continuation = tuple(prompt), ()
    clocks = [Least() for _ in range(3)]
    for counted in (False, *[True] * repeats):
        decoding, verifying, tracing = clocks if counted else [Least() for _ in range(3)]
        side.forget()
        continuation = decoding.of(lambda: side.generate(fed, count, ignore_stop=True)).tokens
        verifying.of(lambda given=continuation: side.score(fed, given))
        tracing.of(lambda given=continuation: model.run_with_cache([*fed, *given[:-1]]))
    names = ("the reference's decoding", "verifying in one pass", "a traced prefill of the same length")
    return [(name, clock.wall, clock.processor) for name, clock in zip(names, clocks, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
