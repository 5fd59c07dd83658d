"""The model's dimensions and constants, from metadata and, where these are silent or contradicted, from tensor shapes.

Shapes are evidence: a matrix has the rows that it has, so the model can only be run with the tensors' numbers.
Constants (rope, epsilon) have no such witness: the file's word counts, and what is odd about it is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aprjax.checkpoint.apr_findings import FindingLog, shown
from aprjax.checkpoint.apr_metadata import Field, read_fields
from aprjax.checkpoint.config_rules import INTEGER_LIMITS, build_config, shortest_float32
from aprjax.checkpoint.types import CheckpointError, ModelConfig, RopePairing

# Every published Qwen2.5 has these (apr-format.md 2.3; A:contracts/model-families/qwen2.yaml).
QWEN2_THETA = 1e6
QWEN2_EPS = 1e-6
# realizar's default for an architecture other than qwen2 and qwen3.
OTHER_THETA = 1e4
# What `apr convert` writes whatever the model (apr-format.md 6.4), and the context of Qwen2.5's small models.
DEFAULT_CONTEXT = 32768
_QWEN2_NAMES = ("qwen2", "qwen2.5", "qwen", "qwen2forcausallm")
_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")

Shapes = Mapping[str, tuple[int, ...]]


def read_config(file: Path, metadata: Mapping[str, Any], shapes: Shapes, offset: int, log: FindingLog) -> ModelConfig:
    """The configuration of the model in an APR file.

    Args:
        file: for messages.
        metadata: of the file.
        shapes: canonical tensor name to shape as stored (matrices possibly in GGUF order).
        offset: of the metadata section, for messages.
        log: where findings go.

    Raises:
        CheckpointError: a required dimension is neither in the metadata nor in the shapes, or is out of all bounds.
    """
    return _ConfigReader(file, metadata, shapes, offset, log).read()


class _ConfigReader:
    """One pass over metadata and shapes; a class only because every step needs the same things."""

    def __init__(self, file: Path, metadata: Mapping[str, Any], shapes: Shapes, offset: int, log: FindingLog) -> None:
        self.file = file
        self.metadata = metadata
        self.shapes = shapes
        self.offset = offset
        self.log = log
        self.fields: dict[str, Field] = read_fields(metadata, offset, log)

    def read(self) -> ModelConfig:
        architecture = self._architecture()
        hidden = self._dimension(
            "hidden_size", self._width("model.norm.weight", "model.layers.0.input_layernorm.weight")
        )
        layers = self._layers()
        vocabulary = self._dimension("vocab_size", self._rows_beside("model.embed_tokens.weight", hidden))
        ffn = self._dimension("intermediate_size", self._rows_beside("model.layers.0.mlp.gate_proj.weight", hidden))
        q_width = self._projection_width("q", hidden)
        k_width = self._projection_width("k", hidden)
        heads, head_dim = self._heads(hidden, q_width)
        kv_heads = self._kv_heads(heads, head_dim, k_width)
        self._check_mirrors()
        return build_config(
            self.file,
            architecture=architecture,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=ffn,
            vocab_size=vocabulary,
            max_position_embeddings=self._context(),
            rope_theta=self._theta(architecture),
            rope_pairing=self._pairing(architecture),
            rms_norm_eps=self._eps(architecture),
        )

    def _find(
        self, id_: str, severity: Any, message: str, reference: str | None = None, tensor: str | None = None
    ) -> None:
        self.log.add(id_, severity, message, offset=self.offset, reference=reference, tensor=tensor)

    def _value(self, key: str) -> Any:
        found = self.fields.get(key)
        return None if found is None else found.value

    def _architecture(self) -> str:
        stated = self._value("architecture")
        if stated is None:
            for key in ("hf_model_type", "model_type"):
                candidate = self.metadata.get(key)
                if isinstance(candidate, str) and candidate.lower() in _QWEN2_NAMES:
                    self._find(
                        "apr-architecture-absent",
                        "error",
                        f"architecture is absent; {key} says {shown(candidate)}. realizar refuses the file (C-01)",
                        "C-01, #2254",
                    )
                    return "qwen2"
            raise CheckpointError(
                "the metadata name no architecture, so this is no language model, or its metadata were lost",
                file=self.file,
                offset=self.offset,
                fix='set "architecture": "qwen2", or re-convert the model',
            )
        name = stated.lower()
        if name not in _QWEN2_NAMES:
            self._find(
                "apr-architecture-other",
                "error",
                f"architecture is {shown(stated)}; aprjax computes Qwen2, and so will not reproduce another one",
            )
            # No architecture has a longer name; the rest would only flood messages.
            return name[:40]
        if stated != "qwen2":
            self._find(
                "apr-architecture-spelling",
                "warning",
                f"architecture is spelled {shown(stated)}; realizar's defaults (rope_theta 1e6, EOS 151645) apply to "
                "exactly 'qwen2'",
                "C-01, GH-329",
            )
        return "qwen2"

    def _dimension(self, key: str, evidence: int | None) -> int:
        """A required dimension; the tensors' number where the metadata have none or another one."""
        stated = self._value(key)
        if stated is None or (key == "vocab_size" and stated == 0):
            if evidence is None:
                raise CheckpointError(
                    f"{key} is neither in the metadata nor to be seen from a tensor's shape",
                    file=self.file,
                    offset=self.offset,
                    fix="this is no complete Qwen2 language model; re-convert it from its original file",
                )
            default = "takes it from the embedding as well" if key == "vocab_size" else "refuses the file (C-03)"
            severity = "warning" if key == "vocab_size" else "error"
            self._find(
                "apr-dimension-absent",
                severity,
                f"{key} is absent; the tensors' shapes say {evidence}. realizar {default}, AprTransformer takes its "
                "own default",
                "C-03, #2254",
            )
            stated = evidence
        elif evidence is not None and evidence != stated:
            self._find(
                "apr-dimension-contradicted",
                "error",
                f"{key} is {stated}, the tensors' shapes say {evidence}, which is what aprjax goes by",
                "GH-88, GH-479",
            )
            stated = evidence
        return self._bounded(key, stated)

    def _bounded(self, key: str, value: int) -> int:
        low, high = INTEGER_LIMITS[key]
        if not low <= value <= high:
            raise CheckpointError(
                f"{key} is {value}, expected {low} to {high}; realizar refuses the file as well",
                file=self.file,
                offset=self.offset,
                fix="the metadata are damaged; re-convert the model",
            )
        return value

    def _width(self, *names: str) -> int | None:
        for name in names:
            shape = self.shapes.get(name, ())
            if len(shape) == 1:
                return shape[0]
        return None

    def _rows_beside(self, name: str, hidden: int) -> int | None:
        """The other dimension of a matrix one of whose dimensions is `hidden`, in whichever order they are stored."""
        shape = self.shapes.get(name, ())
        if len(shape) != 2 or hidden not in shape:
            return None
        return shape[0] if shape[1] == hidden else shape[1]

    def _projection_width(self, projection: str, hidden: int) -> int | None:
        prefix = f"model.layers.0.self_attn.{projection}_proj."
        return self._width(prefix + "bias") or self._rows_beside(prefix + "weight", hidden)

    def _layers(self) -> int:
        numbers = {int(match[1]) for name in self.shapes if (match := _LAYER.match(name))}
        evidence = max(numbers) + 1 if numbers else None
        stated = self._value("num_layers")
        if stated is None:
            return self._dimension("num_layers", evidence)
        # Missing layers do not make the model a shorter one: here the metadata are believed, and tensors are missing.
        if evidence is not None and evidence > stated:
            self._find(
                "apr-dimension-contradicted",
                "error",
                f"num_layers is {stated}, but there are tensors of layer {evidence - 1}; realizar ignores the layers "
                "above",
                "#2254",
            )
        return self._bounded("num_layers", stated)

    def _heads(self, hidden: int, q_width: int | None) -> tuple[int, int]:
        heads, head_dim = self._value("num_heads"), self._value("head_dim")
        if heads is None:
            if head_dim and q_width and q_width % head_dim == 0:
                heads = self._dimension("num_heads", q_width // head_dim)
            else:
                raise CheckpointError(
                    "num_heads is absent, and no tensor's shape tells it",
                    file=self.file,
                    offset=self.offset,
                    fix="re-convert the model; realizar refuses the file as well (C-03)",
                )
        heads = self._bounded("num_heads", heads)
        if q_width is not None and q_width % heads == 0:
            evidence = q_width // heads
            if head_dim is not None and head_dim != evidence:
                self._find(
                    "apr-head-dim-contradicted",
                    "error",
                    f"head_dim is {head_dim}, but q_proj has {q_width} rows for {heads} heads: {evidence}, which is "
                    "what realizar and aprjax go by",
                    "GH-479, GH-305, PMAT-833",
                )
            return heads, self._bounded("head_dim", evidence)
        if q_width is not None:
            self._find(
                "apr-heads-do-not-divide",
                "error",
                f"q_proj has {q_width} rows, which {heads} heads do not divide",
                "GH-479",
            )
        if head_dim is None and hidden % heads:
            raise CheckpointError(
                f"{heads} heads do not divide the hidden size {hidden}, and there is no head_dim; realizar refuses the "
                "file",
                file=self.file,
                offset=self.offset,
                fix="the metadata are damaged; re-convert the model",
            )
        return heads, self._bounded("head_dim", head_dim or hidden // heads)

    def _kv_heads(self, heads: int, head_dim: int, k_width: int | None) -> int:
        stated = self._value("num_kv_heads")
        evidence = k_width // head_dim if k_width and k_width % head_dim == 0 else None
        if stated is None:
            used = evidence or heads
            self._find(
                "apr-kv-heads-absent",
                "warning" if used == heads else "error",
                f"num_kv_heads is absent; k_proj's shape says {used}. realizar takes num_heads ({heads})",
                "GH-88",
            )
            stated = used
        elif evidence is not None and evidence != stated:
            self._find(
                "apr-kv-heads-contradicted",
                "error",
                f"num_kv_heads is {stated}, but k_proj has {k_width} rows of head_dim {head_dim}: {evidence}, which is "
                "what aprjax goes by",
                "GH-88",
            )
            stated = evidence
        stated = self._bounded("num_kv_heads", stated)
        if heads % stated:
            raise CheckpointError(
                f"{stated} key-value heads do not divide {heads} heads; realizar refuses the file",
                file=self.file,
                offset=self.offset,
                fix="the metadata are damaged; re-convert the model",
            )
        return stated

    def _context(self) -> int:
        stated = self._value("max_position_embeddings")
        if stated in (None, 0):
            self._find(
                "apr-context-absent",
                "info",
                f"max_position_embeddings is absent; realizar takes 0, aprjax {DEFAULT_CONTEXT}. It bounds no "
                "computation here",
            )
            return DEFAULT_CONTEXT
        return stated

    def _theta(self, architecture: str) -> float:
        stated = self._value("rope_theta")
        default = QWEN2_THETA if architecture in ("qwen2", "qwen3") else OTHER_THETA
        if stated is None or stated == 0:
            self._find(
                "apr-rope-theta-absent",
                "warning",
                f"rope_theta is absent; {default:g} is realizar's default for {architecture!r}",
                "R-02, C-02, GH-329",
            )
            return default
        if architecture == "qwen2" and stated != QWEN2_THETA:
            self._find(
                "apr-rope-theta-unusual",
                "warning",
                f"rope_theta is {stated:g}; every published Qwen2.5 has {QWEN2_THETA:g}",
                "R-02, C-02, GH-329",
            )
        return _as_float32(stated)

    def _pairing(self, architecture: str) -> RopePairing:
        stated = self._value("rope_type")
        default: RopePairing = "neox" if architecture.startswith("qwen") else "norm"
        if stated is None:
            self._find(
                "apr-rope-type-absent",
                "info",
                f"rope_type is absent; readers infer {default!r} pairing from the architecture {architecture!r}",
                "CORRECTNESS-011, PMAT-107",
            )
            return default
        if stated not in (0, 2):
            self._find(
                "apr-rope-type-unknown",
                "error",
                f"rope_type is {stated}, expected 0 (norm) or 2 (neox); aprjax goes by the architecture: {default!r}",
                "CORRECTNESS-011",
            )
            return default
        pairing: RopePairing = "neox" if stated == 2 else "norm"
        if pairing != default:
            self._find(
                "apr-rope-type-wrong",
                "error",
                f"rope_type {stated} pairs channels the {pairing!r} way, but {architecture} was trained with "
                f"{default!r}. realizar and aprjax do as the file says; AprTransformer ignores the key",
                "CORRECTNESS-011, GH-329, PMAT-797, #2084",
            )
        return pairing

    def _eps(self, architecture: str) -> float:
        stated = self._value("rms_norm_eps")
        if stated is None:
            self._find(
                "apr-eps-absent", "warning", f"rms_norm_eps is absent; readers take {QWEN2_EPS:g} for {architecture!r}"
            )
            return QWEN2_EPS
        value = _as_float32(stated)
        if architecture == "qwen2" and value != QWEN2_EPS:
            self._find(
                "apr-eps-unusual", "warning", f"rms_norm_eps is {stated:g}; every published Qwen2.5 has {QWEN2_EPS:g}"
            )
        return value

    def _check_mirrors(self) -> None:
        """`apr import` writes some constants a second time, as `model.rope_theta` and the like."""
        for key, found in self.fields.items():
            mirror = self.metadata.get(f"model.{key}")
            if isinstance(mirror, int | float | str) and mirror != found.value:
                self._find(
                    "apr-metadata-mirror",
                    "error",
                    f"{found.spelling} is {found.value!r}, but its copy model.{key} is {shown(str(mirror))}: one of "
                    "them was edited. Readers use the former",
                )


def _as_float32(value: float) -> float:
    """The real tools' metadata hold float32 (apr-format.md 2.1); what is out of its range, `build_config` refuses."""
    in_range = abs(value) < 1e30
    return shortest_float32(value) if in_range else value
