"""aprjax: where, and why, do two Qwen2 checkpoints or engines stop agreeing?

`aprjax.open(path)` opens a checkpoint (GGUF, APR v2 or a Hugging Face folder). Importing aprjax
imports neither jax nor flax nor matplotlib.
"""

from aprjax.checkpoint import Checkpoint, CheckpointError, EncodedTensor, Finding
from aprjax.checkpoint import open_checkpoint as open  # noqa: A004 - the API name that the design gives

__all__ = ["Checkpoint", "CheckpointError", "EncodedTensor", "Finding", "open"]
__version__ = "0.1.0"
