"""aprjax: where, and why, do two Qwen2 checkpoints or engines stop agreeing?

`aprjax.open(path)` opens a checkpoint (GGUF, APR v2 or a Hugging Face folder); each question of the command line is a
call of the same name (`aprjax.questions`), as in `aprjax.layers(model, ref, "What is 2+2?")`. Importing aprjax imports
neither jax nor flax nor matplotlib, and numpy only with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aprjax.assets import embedded_model
    from aprjax.checkpoint import Checkpoint, CheckpointError, EncodedTensor, Finding
    from aprjax.checkpoint import open_checkpoint as open  # noqa: A004 - the API name that the design gives
    from aprjax.checkpoint.altered import altered
    from aprjax.checkpoint.fetch import fetch
    from aprjax.questions import (
        attribute,
        chatml,
        files,
        generate,
        layers,
        locate,
        margins,
        tokens,
    )
    from aprjax.questions_of_one import capture, explain, noise, replay
    from aprjax.qwen2.arithmetic import Arithmetic, preset
    from aprjax.qwen2.stages import Stage

__all__ = [
    "Arithmetic",
    "Checkpoint",
    "CheckpointError",
    "EncodedTensor",
    "Finding",
    "Stage",
    "altered",
    "attribute",
    "capture",
    "chatml",
    "embedded_model",
    "explain",
    "fetch",
    "files",
    "generate",
    "layers",
    "locate",
    "margins",
    "noise",
    "open",
    "preset",
    "replay",
    "tokens",
]
__version__ = "0.1.0"

# Where the names are that neither `aprjax.checkpoint` nor `aprjax.questions` has.
_ELSEWHERE = {
    "Arithmetic": "aprjax.qwen2.arithmetic",
    "Stage": "aprjax.qwen2.stages",
    "altered": "aprjax.checkpoint.altered",
    "embedded_model": "aprjax.assets",
    "fetch": "aprjax.checkpoint.fetch",
    "preset": "aprjax.qwen2.arithmetic",
}
_OF_ONE_SIDE = ("capture", "explain", "noise", "replay")
_OF_CHECKPOINTS = ("Checkpoint", "CheckpointError", "EncodedTensor", "Finding", "open")


def __getattr__(name: str) -> Any:
    # The command line's `--help` and `--version` come here first: numpy would be a third of their time.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "aprjax.questions_of_one" if name in _OF_ONE_SIDE else "aprjax.questions"
    home = "aprjax.checkpoint" if name in _OF_CHECKPOINTS else _ELSEWHERE.get(name, home)
    return getattr(import_module(home), "open_checkpoint" if name == "open" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
