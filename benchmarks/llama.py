"""llama.cpp as a peer: a process that computes when it is told to, so that two engines take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from measured import PLAIN_LLAMA, cores

import aprjax

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Answer:
    """Wall and processor seconds of feeding tokens at once, and of decoding after them; the decoded tokens.

    Attributes:
        captured: bytes of the nodes that were copied.
    """

    prefill: tuple[float, float]
    decode: tuple[float, float]
    tokens: list[int]
    captured: int


class Llama:
    """A model in llama.cpp, loaded once.

    Args:
        path: the GGUF file.
        context: the most tokens; of a capture, how many are fed.
        threads: as many as there are cores by default.
        all_logits: compute every position's logits, as a forward pass here does, and not only the last one's.
        capture: copy every node that a stage is made from, through the evaluation callback.
        library: folder of another build, which then computes as it does by default: repacked weights and tiles.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        threads: int | None = None,
        *,
        all_logits: bool = True,
        capture: bool = False,
        library: Path | None = None,
    ) -> None:
        options = {
            "path": str(path),
            "context": context,
            "layers": aprjax.open(path).config.num_layers,
            "threads": threads or cores(),
            "all_logits": all_logits,
            "capture": capture,
            "repack": library is not None,
            "flash_attention": False,
            "type_k": "f32",
            "type_v": "f32",
        }
        build = PLAIN_LLAMA if library is None else {"LLAMA_CPP_LIB_PATH": str(library), "GGML_CPU_TILED_MM": "1"}
        found = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("llama_child.py")), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **build, "PYTHONPATH": found},
            text=True,
        )

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.communicate()

    def run(self, tokens: Sequence[int], count: int = 0) -> Answer:
        """Feeds tokens, and decodes `count` greedily; its first is the prefill's, and is not timed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdin.write(json.dumps([list(map(int, tokens)), count]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read()[-500:]
            raise SystemExit(f"llama.cpp exited with {self._process.wait()}: {said}")
        prefill, decode, found, captured = json.loads(line)
        return Answer(tuple(prefill), tuple(decode), found, captured)
