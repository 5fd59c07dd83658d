"""`hf:DIR`: a Qwen2 run by transformers on the CPU, by default in float32, captured through module hooks.

Two stages cannot be reached from outside: `qkv_matmul`, because torch's Linear adds the bias in the same
kernel, and `attn_scores`, which transformers' eager attention overwrites. They are unmeasured.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aprjax.checkpoint.safetensors_reader import read_safetensors
from aprjax.qwen2.stages import OUTSIDE, Stage
from aprjax.trace.engine import EngineError, check_tokens
from aprjax.trace.memory import MemoryTrace
from aprjax.trace.trace import TraceInfo

ABSENT = (Stage.QKV_MATMUL, Stage.ATTN_SCORES)
Values = dict[tuple[int, Stage], np.ndarray]

# Module of a layer → the stage that is its output, and the stage that is its input.
_OUTPUTS = {
    "input_layernorm": Stage.ATTN_NORM,
    "self_attn.o_proj": Stage.ATTN_OUT,
    "post_attention_layernorm": Stage.FFN_NORM,
    "mlp.gate_proj": Stage.FFN_GATE,
    "mlp.up_proj": Stage.FFN_UP,
    "mlp.act_fn": Stage.FFN_SILU,
    "mlp.down_proj": Stage.FFN_OUT,
    "": Stage.POST_FFN_RESIDUAL,
}
_INPUTS = {
    "self_attn.o_proj": Stage.ATTENTION,
    "post_attention_layernorm": Stage.POST_ATTN_RESIDUAL,
    "mlp.down_proj": Stage.FFN_SWIGL,
}


def run_transformers(folder: str | Path, tokens: list[int], dtype: str = "float32") -> MemoryTrace:
    """Runs a Hugging Face folder and returns every stage that hooks can reach, of every token.

    Args:
        folder: the model.
        tokens: what it is fed.
        dtype: what it computes in: float32, float16 or bfloat16; the values are float32 in any case.

    Raises:
        EngineError: transformers or torch is absent, or refuses the model.
        CheckpointError: the folder cannot be read, or has no such tokens.
    """
    folder = Path(folder)
    checkpoint = read_safetensors(folder)
    check_tokens(checkpoint, tokens)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise EngineError(f"{error.name} is not installed", file=folder, fix="install it with `make peers`") from None
    values: Values = {}
    try:
        with _quiet(transformers):
            model = transformers.Qwen2ForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
            ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(f"transformers cannot load it: {reason}", file=folder, fix="see the message") from error
    with _captured(model, values), torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    everyone = tuple(range(len(tokens)))
    engine = {
        "name": "transformers",
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "dtype": dtype,
        "device": "cpu",
        "attention": "eager",
        "threads": str(torch.get_num_threads()),
    }
    info = TraceInfo(
        path=str(folder),
        sha256=checkpoint.sha256(),
        format=checkpoint.format,
        arithmetic=f"transformers {dtype}",
        tokens=tuple(tokens),
        positions=everyone,
        head_positions=everyone,
        platform=f"{platform.machine()} cpu",
        engine=engine,
    )
    return MemoryTrace(info, values)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars, which are as they were afterwards."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _captured(model: Any, values: Values) -> Iterator[None]:
    """Hooks on every module that a stage enters or leaves; taken off afterwards."""
    modeling = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    projections: dict[int, dict[str, np.ndarray]] = {}

    def keep(layer: int, stage: Stage, tensor: Any) -> None:
        rows = tensor[0] if isinstance(tensor, tuple) else tensor
        # A copy: what follows may work in place.
        values[layer, stage] = np.array(rows[0].detach().float().numpy(), np.float32)

    def on_output(layer: int, stage: Stage) -> Any:
        return lambda module, arguments, output: keep(layer, stage, output)

    def on_input(layer: int, stage: Stage) -> Any:
        return lambda module, arguments: keep(layer, stage, arguments[0])

    def on_projection(layer: int, name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            parts = projections.setdefault(layer, {})
            parts[name] = output[0].detach().float().numpy().astype(np.float32)
            if len(parts) == 3:
                values[layer, Stage.QKV_BIAS] = np.concatenate([parts[p] for p in "qkv"], axis=1)

        return hook

    eager = modeling.eager_attention_forward

    def attention(module: Any, query: Any, key: Any, *arguments: Any, **options: Any) -> Any:
        output, weights = eager(module, query, key, *arguments, **options)
        for stage, heads in (
            (Stage.Q_POST_ROPE, query),
            (Stage.K_POST_ROPE, key),
            (Stage.ATTN_SOFTMAX, weights),
        ):
            by_position = heads[0].detach().float().numpy().transpose(1, 0, 2)
            values[module.layer_idx, stage] = np.array(by_position, np.float32).reshape(by_position.shape[0], -1)
        return output, weights

    with ExitStack() as stack:

        def add(handle: Any) -> None:
            stack.callback(handle.remove)

        body = model.model
        add(body.embed_tokens.register_forward_hook(on_output(OUTSIDE, Stage.EMBEDDING)))
        add(body.norm.register_forward_hook(on_output(OUTSIDE, Stage.FINAL_NORM)))
        add(model.lm_head.register_forward_hook(on_output(OUTSIDE, Stage.LM_HEAD)))
        for index, layer in enumerate(body.layers):
            for path, stage in _OUTPUTS.items():
                add(layer.get_submodule(path).register_forward_hook(on_output(index, stage)))
            for path, stage in _INPUTS.items():
                add(layer.get_submodule(path).register_forward_pre_hook(on_input(index, stage)))
            for name in "qkv":
                module = layer.get_submodule(f"self_attn.{name}_proj")
                add(module.register_forward_hook(on_projection(index, name)))
        # Eager attention is a function of the module, not a module: the one place that no hook reaches.
        modeling.eager_attention_forward = attention
        stack.callback(setattr, modeling, "eager_attention_forward", eager)
        yield
