"""The texts that are compared when the user gives none.

Three, because the faults of the story behind this tool hide in different places: a direct prompt never
touches the embedding rows of ChatML's control tokens, a ChatML prompt begins with one, and neither is
long enough to show a wrong rotation at large positions or an error that grows with the context.
"""

from __future__ import annotations

from dataclasses import dataclass

from aprjax.text.template import Wrap, wrap

_LONG = '''The lighthouse keeper kept two ledgers. In the first she wrote what the sea did: wind from the north-west, \
force 6, barometer falling from 1013 to 998 hPa between noon and dusk. In the second she wrote what the sea \
had not done, and that one was thicker. "A ship that did not founder," she told the inspector, "is also an \
event; it just leaves no wreckage." He counted the pages and asked whether the two books ever disagreed.

They had, once. On 17 March 1931 the lamp turned every 11.8 seconds instead of every 12, and for 49 nights \
nobody noticed, since each captain compared the light with his own watch and blamed the watch. She found it \
by counting flashes: 305 an hour where there should have been 300. So she wrote down a rule, years later, \
for her grandson's computer:

```python
def first_disagreement(ours, theirs, tolerance=1e-6):
    """Index of the first pair that differs by more than the tolerance, or None."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} flashes against {len(theirs)}")
    for index, (a, b) in enumerate(zip(ours, theirs)):
        if abs(a - b) > tolerance * max(1.0, abs(b)):
            return index
    return None
```

Die Enkelin übersetzte es später ins Deutsche: „Vergleiche nie zwei Dinge, bevor du weißt, ob sie dasselbe \
messen.“ Und darunter, kleiner: Größe, Maß, Zeitpunkt. 她的弟弟把它刻在门上:先看钟,再看海。

| night | flashes | drift (s) |
|-------|---------|-----------|
| 1     | 300     | 0.00      |
| 25    | 302     | -0.08     |
| 49    | 305     | -0.20     |

The inspector read all of it twice and signed both ledgers. What convinced him was neither the table nor the \
code but the last line, in which she had set out the order of her doubts: first the lamp, then the gears, \
then the clock, and only then'''


@dataclass(frozen=True)
class Probe:
    """One prompt.

    Attributes:
        name: `direct`, `chatml` or `long`.
        text: what the user would have typed.
        wrap: how it is wrapped before it is encoded.
    """

    name: str
    text: str
    wrap: Wrap

    def prompt(self) -> str:
        """The text as it is encoded."""
        return wrap(self.text, self.wrap)


PROBES: tuple[Probe, ...] = (
    # The prompt of upstream's token parity gate (contracts.md 1.2): 7 tokens.
    Probe("direct", "What is 2+2?", "none"),
    # Upstream's golden_output prompt: 15 tokens with the turn's markers.
    Probe("chatml", "What is 2+2?", "once"),
    # About 500 tokens: prose, code, numbers, a table, German and Chinese.
    Probe("long", _LONG, "none"),
)
