"""The names of what `demo` can plant: all that the command line needs before it runs, and it must start fast."""

from enum import StrEnum


class DemoFault(StrEnum):
    """What `demo` can plant."""

    GATE_UP_SWAPPED = "gate-up-swapped"
    CHATML_ROW = "chatml-row"
    ROPE_THETA = "rope-theta"
    NONE = "none"
