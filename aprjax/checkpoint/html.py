"""A checkpoint as a notebook shows it."""

from __future__ import annotations

from html import escape

from aprjax.checkpoint.types import Checkpoint


def summary_html(checkpoint: Checkpoint) -> str:
    """What file it is, of which model, in which block types; and what was met while reading it.

    Names and messages come from files that nobody vouches for, and are escaped.
    """
    config, held = checkpoint.config, dict[str, list[int]]()
    for tensor in checkpoint.tensors.values():
        held.setdefault(tensor.block_type, []).append(tensor.nbytes)
    types = sorted(held.items(), key=lambda entry: -sum(entry[1]))
    rows = [
        ("model", f"{config.architecture}, {sum(t.size for t in checkpoint.tensors.values()):,} weights"),
        (
            "shape",
            f"{config.num_layers} layers, hidden {config.hidden_size}, ffn {config.intermediate_size}, "
            f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} key-value heads",
        ),
        ("constants", f"rope theta {config.rope_theta:g} ({config.rope_pairing}), eps {config.rms_norm_eps:g}"),
        ("vocabulary", "none" if checkpoint.vocabulary is None else f"{len(checkpoint.vocabulary.tokens):,} tokens"),
        ("tensors", "; ".join(f"{len(sizes)} {name}, {sum(sizes):,} bytes" for name, sizes in types)),
        ("findings", "; ".join(f"{f.severity}: {f.message}" for f in checkpoint.findings) or "none"),
    ]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<p><b>{escape(checkpoint.path.name)}</b> ({escape(checkpoint.format)})</p><table>{cells}</table>"
