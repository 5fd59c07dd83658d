"""Chat templates: the checkpoint's own, rendered safely, and the plain ChatML wrap.

`render_chat` gives what Hugging Face's `apply_chat_template` gives for the same template. `wrap` gives
what upstream's `apr run` and its gates build instead: a user turn and the assistant's header, without
the system turn that Qwen2.5's own template adds when the conversation has none.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from aprjax.checkpoint.types import Checkpoint, CheckpointError

Wrap = Literal["none", "once", "twice"]

# What a template may use. Qwen2.5's own takes two steps a message, and a process with jinja2 loaded
# needs 0.1 s and 40 MiB: the limits are far above that and still end an attack within seconds.
STEPS = 100_000
CHARACTERS = 16 << 20
CPU_SECONDS = 5
MEMORY_BYTES = 512 << 20
# A wall-clock limit for what uses no CPU; generous, since a loaded machine is slow to start a process.
WALL_SECONDS = 60.0

_CHILD = Path(__file__).with_name("render_child.py")
_TURN = "<|im_start|>"


class TemplateError(CheckpointError):
    """A chat template that is missing, malformed, hostile, or that refuses the conversation."""


def render_chat(
    checkpoint: Checkpoint,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt that the checkpoint's chat template makes of a conversation.

    Args:
        checkpoint: its `chat_template` is rendered; its special tokens are known to the template as
            `bos_token`, `eos_token` and `pad_token`.
        messages: `{"role": …, "content": …}` with whatever else the template reads (`tool_calls`);
            JSON values only.
        add_generation_prompt: end with the header of the assistant's turn.
        tools: JSON schemas of the functions on offer.
        **variables: further variables of the template.

    Returns:
        The prompt as text. Encode it with `parse_special=True`.

    Raises:
        TemplateError: no template; a template with an error, an attempt to leave its sandbox or to
            use more time or memory than rendering takes; messages that the template refuses.
        TypeError: messages, tools or variables that are no JSON values.
    """
    if not checkpoint.chat_template:
        raise TemplateError(
            "the file holds no chat template (tokenizer.chat_template)",
            file=checkpoint.path,
            fix="a base model has none: use the text as it is, or wrap it as ChatML (--wrap once)",
        )
    special = _special_tokens(checkpoint)
    chat = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    return _render(checkpoint.chat_template, special | chat | variables, file=checkpoint.path)


def wrap(text: str, times: Wrap | str = "once") -> str:
    r"""A ChatML user turn and the assistant's header around a text, without a system turn.

    Args:
        text: the prompt.
        times: `"twice"` wraps the wrapped text again, as upstream did when a hand-written ChatML prompt
            met `apr run`'s automatic wrapping (contracts.md section 0; #3672, #3743).

    Returns:
        `<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n`, or the text itself for `"none"`.

    Raises:
        ValueError: `times` is none of the three.
    """
    counts = {"none": 0, "once": 1, "twice": 2}
    if times not in counts:
        raise ValueError(f"wrap is {times!r}, expected one of {', '.join(counts)}")
    for _ in range(counts[times]):
        text = f"{_TURN}user\n{text}<|im_end|>\n{_TURN}assistant\n"
    return text


def is_wrapped(text: str) -> bool:
    """Whether a text is ChatML already, so that wrapping it would be the double-wrap mistake."""
    return text.lstrip().startswith(_TURN)


def _special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    vocabulary = checkpoint.vocabulary
    if vocabulary is None:
        return {}
    ids = {
        "bos_token": vocabulary.bos_token_id,
        "eos_token": vocabulary.eos_token_id,
        "pad_token": vocabulary.padding_token_id,
    }
    size = len(vocabulary.tokens)
    return {name: vocabulary.tokens[index] for name, index in ids.items() if index is not None and 0 <= index < size}


def _render(template: str, variables: Mapping[str, Any], *, file: str | Path | None) -> str:
    request = {
        "template": template,
        "variables": dict(variables),
        "steps": STEPS,
        "characters": CHARACTERS,
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
        # The child starts without site-packages and environment, and finds jinja2 where we would.
        "path": [entry for entry in sys.path if entry],
    }
    fix = "read the template (`aprjax inspect`): a hostile or broken one must not be used; --wrap once needs none"
    try:
        finished = subprocess.run(
            [sys.executable, "-I", "-S", str(_CHILD)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            # Nothing of the environment but what Python needs to start and a clock to be local.
            env={name: os.environ[name] for name in ("SYSTEMROOT", "TZ", "LD_LIBRARY_PATH") if name in os.environ},
            check=False,
        )
    except OSError as error:  # no interpreter to start, as in a Python embedded in another program
        raise TemplateError(f"chat template: the renderer cannot be started: {error}", file=file) from None
    except subprocess.TimeoutExpired:
        raise TemplateError(f"chat template: not rendered within {WALL_SECONDS:.0f} s", file=file, fix=fix) from None
    if finished.returncode != 0:
        raise TemplateError(f"chat template: {_cause_of_death(finished)}", file=file, fix=fix)
    answer = json.loads(finished.stdout)
    if "text" in answer:
        return answer["text"]
    line = answer.get("line")
    where = "chat template" if line is None else f"chat template, line {line}"
    raise TemplateError(f"{where}: {answer['error']}", file=file, fix=fix)


def _cause_of_death(finished: subprocess.CompletedProcess[bytes]) -> str:
    code = finished.returncode
    # The CPU limit is soft and hard at once: Linux may answer either with SIGXCPU or with SIGKILL.
    if -code in (getattr(signal, "SIGXCPU", 0), getattr(signal, "SIGKILL", 0)):
        return f"rendering took more than {CPU_SECONDS} s of CPU time or {MEMORY_BYTES >> 20} MiB"
    lines = finished.stderr.decode("utf-8", "replace").strip().splitlines()
    if lines and lines[-1].startswith("MemoryError"):
        return f"rendering took more than {MEMORY_BYTES >> 20} MiB"
    return f"the renderer died with code {code}" + (f": {lines[-1][:200]}" if lines else "")
