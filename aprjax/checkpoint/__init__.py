"""Files <-> `Checkpoint`: GGUF, APR v2, Hugging Face safetensors; conversion; findings."""

from aprjax.checkpoint.open import open_checkpoint
from aprjax.checkpoint.types import (
    Checkpoint,
    CheckpointError,
    EncodedTensor,
    Finding,
    ModelConfig,
    Vocabulary,
    canonical_tensor_names,
    canonical_tensor_shapes,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "EncodedTensor",
    "Finding",
    "ModelConfig",
    "Vocabulary",
    "canonical_tensor_names",
    "canonical_tensor_shapes",
    "open_checkpoint",
]
