"""aprjax: where, and why, do two Qwen2 checkpoints or engines stop agreeing?

`aprjax.open(path)` opens a checkpoint (GGUF, APR v2 or a Hugging Face folder). Importing aprjax
imports neither jax nor flax nor matplotlib, and numpy only with the first name that is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aprjax.checkpoint import Checkpoint, CheckpointError, EncodedTensor, Finding
    from aprjax.checkpoint import open_checkpoint as open  # noqa: A004 - the API name that the design gives

__all__ = ["Checkpoint", "CheckpointError", "EncodedTensor", "Finding", "open"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The command line's `--help` and `--version` come here first: numpy would be a third of their time.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aprjax import checkpoint

    return getattr(checkpoint, "open_checkpoint" if name == "open" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
