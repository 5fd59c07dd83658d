"""One of several processes of one computation: `python hosts_child.py PORT PROCESSES INDEX` prints its logits' digest.

Each has two virtual devices; the model lies over all of them. The first writes the logits to stdout as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from tiny import CONFIG, tiny_checkpoint  # noqa: E402

from aprjax.qwen2.arithmetic import PRESETS  # noqa: E402
from aprjax.qwen2.model import Qwen2  # noqa: E402

TOKENS = [3, 1, 4, 1, 5]


def main(port: int, processes: int, index: int) -> None:
    """Joins the others, runs, and prints."""
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", num_processes=processes, process_id=index)
    checkpoint = tiny_checkpoint(replace(CONFIG, num_layers=1), types={"": "Q8_0"})
    loaded = Qwen2(checkpoint, PRESETS["llama.cpp"], mesh=2 * processes if processes > 1 else None)
    logits = np.asarray(loaded(TOKENS))
    weight = loaded.layers[0].mlp.up_proj.weight
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "mine": [shard.data.nbytes for shard in jax.tree.leaves(weight)[0].addressable_shards],
                "bytes": jax.tree.leaves(weight)[0].nbytes,
                "logits": logits.tobytes().hex(),
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
