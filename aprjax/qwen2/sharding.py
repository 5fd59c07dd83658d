"""One model over several devices: every matrix split by its output rows, attention by its heads.

Tensor parallelism usually splits every second matrix by its columns and adds up the devices' partial sums
(arXiv:1909.08053). Then every float sum hangs on the number of devices. Here no sum is ever cut: a device holds some
of the output rows of *every* matrix, all their blocks, and multiplies them with the whole input by the same kernel that
one device runs; what the devices have computed is gathered, never added. So an output is the same number wherever it is
computed. Of a feed-forward block that gathers `intermediate_size` numbers a token where adding up would move twice
`hidden_size`; memory and arithmetic are the same.

Attention is split by key heads, each with the query heads that read it. Where there are fewer key heads than devices,
some devices have none. Heads and rows that do not divide are filled up with zeros.

`use_mesh` says where weights go that are packed inside it; `pack` asks. A split weight carries its mesh, so that
nothing else needs to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aprjax.blocks.dot import no_cotangent
from aprjax.blocks.relay import Relaid, relay

# The one axis of a mesh.
AXIS = "model"
_FIRST, _SECOND = P(AXIS), P(None, AXIS)


class MeshError(ValueError):
    """A mesh that the devices at hand do not allow."""


def device_mesh(count: int) -> Mesh:
    """The first `count` devices, of all hosts, as a mesh of one axis.

    Raises:
        MeshError: there are fewer, or `count` is less than one, or a host of several would be left without.
    """
    devices = jax.devices()
    if count < 1:
        raise MeshError(f"a mesh has at least one device, asked for {count}")
    if count > len(devices):
        platform = devices[0].platform
        hint = "; XLA_FLAGS=--xla_force_host_platform_device_count=N splits a processor into N" * (platform == "cpu")
        raise MeshError(f"a mesh of {count} devices was asked for, found {len(devices)} ({platform}){hint}")
    hosts = {device.process_index for device in devices[:count]}
    if len(hosts) < jax.process_count():
        raise MeshError(
            f"the first {count} of {len(devices)} devices belong to {len(hosts)} of {jax.process_count()} processes: "
            "every process needs a part"
        )
    return Mesh(np.asarray(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


class _Current:
    """Where weights go that are packed now: of the process, since threads pack, too."""

    mesh: Mesh | None = None


@contextmanager
def use_mesh(mesh: Mesh | int | None) -> Iterator[Mesh | None]:
    """Splits what is packed inside over `mesh`, or over so many devices; None is one device, not split.

    Raises:
        MeshError: there are not so many devices.
    """
    before, _Current.mesh = _Current.mesh, device_mesh(mesh) if isinstance(mesh, int) else mesh
    try:
        yield _Current.mesh
    finally:
        _Current.mesh = before


def current_mesh() -> Mesh | None:
    """What `use_mesh` says."""
    return _Current.mesh


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["rows", "mesh"])
@dataclass(frozen=True)
class SplitRelaid:
    """A `Relaid` whose rows lie on several devices, as many on each; zeros behind the last.

    Attributes:
        parts: every device's own `Relaid`, one after the other along the chunk axis, which is the axis that is split:
            inside a `shard_map` it is that device's. Its `rows` are those of one device.
        rows: output features.
        mesh: the devices.
    """

    parts: Relaid
    rows: int
    mesh: Mesh

    @property
    def name(self) -> str:
        """The block type."""
        return self.parts.name

    @property
    def columns(self) -> int:
        """Input features."""
        return self.parts.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all devices together."""
        return self.parts.nbytes


def rows_each(rows: int, devices: int) -> int:
    """Rows of a matrix on each device, those of the last ones filled up."""
    return -(-rows // devices)


def split_relay(name: str, packed: np.ndarray, mesh: Mesh) -> SplitRelaid:
    """`relay`, each device's rows put on that device. Only this host's devices are given theirs.

    Args:
        name: block type.
        packed: `uint8[rows, blocks, block_bytes]`.
        mesh: the devices.

    Raises:
        ValueError: see `relay`.
    """
    rows, devices = packed.shape[0], list(mesh.devices.flat)
    each = rows_each(rows, len(devices))
    mine = [index for index, device in enumerate(devices) if device.process_index == jax.process_index()]
    held: list[Relaid] = []
    for index in mine:
        part = packed[index * each : (index + 1) * each]
        if part.shape[0] < each:
            part = np.pad(part, ((0, each - part.shape[0]), (0, 0), (0, 0)))
        held.append(jax.device_put(relay(name, part), devices[index]))
    sharding = NamedSharding(mesh, _FIRST)

    def joined(*leaves: jax.Array) -> jax.Array:
        shape = (leaves[0].shape[0] * len(devices), *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(leaves))

    parts: Relaid = jax.tree.map(joined, *held)
    return SplitRelaid(parts, rows, mesh)


def replicated(value: Any, mesh: Mesh | None) -> Any:
    """The same value on every device, also inside a traced function; as it is without a mesh."""
    if mesh is None:
        return value
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(partial(lax.with_sharding_constraint, shardings=sharding), value)


def place(value: Any, mesh: Mesh | None) -> Any:
    """Puts a host's value on every device; on the default device without a mesh."""
    if mesh is None:
        return jnp.asarray(value)
    # From NumPy: every process of several hosts has the same value and fills its own devices.
    return jax.device_put(np.asarray(value), NamedSharding(mesh, P()))


Kernel = Callable[[Relaid, Any], Any]


def split_product(weight: SplitRelaid, x: Any, kernel: Kernel, *, gathered: bool = True) -> Any:
    """`kernel(part, x)` on every device for its own rows: `[tokens, rows]`.

    With `gathered` the result is whole on every device; without, it stays where it was computed if rows divide evenly,
    for an elementwise operation to go on with.
    """
    out: Any = _split_product(kernel, weight.mesh, weight.parts, x)
    if gathered or out.shape[1] != weight.rows:
        out = replicated(out, weight.mesh)
    return out[:, : weight.rows]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _split_product(kernel: Kernel, mesh: Mesh, parts: Relaid, x: Any) -> Any:
    # The kernels' loops do not say over which axes their values vary, so that JAX cannot check it.
    return jax.shard_map(kernel, mesh=mesh, in_specs=(_FIRST, P()), out_specs=_SECOND, check_vma=False)(parts, x)


def _split_forward(kernel: Kernel, mesh: Mesh, parts: Relaid, x: Any) -> tuple[Any, tuple[Relaid, Any]]:
    return _split_product(kernel, mesh, parts, x), (parts, x)


def _split_backward(kernel: Kernel, mesh: Mesh, kept: tuple[Relaid, Any], cotangent: Any) -> tuple[Any, Any]:
    parts, x = kept

    def local(parts: Relaid, x: Any, cotangent: Any) -> Any:
        (gradient,) = jax.vjp(partial(kernel, parts), x)[1](cotangent)
        # The one sum over devices: a gradient's parts come from different rows.
        return lax.psum(gradient, AXIS)

    gradient = jax.shard_map(local, mesh=mesh, in_specs=(_FIRST, P(), _SECOND), out_specs=P(), check_vma=False)(
        parts, x, cotangent
    )
    return jax.tree.map(no_cotangent, parts), gradient


_split_product.defvjp(_split_forward, _split_backward)


@dataclass(frozen=True)
class Heads:
    """The attention's operations, split over `mesh` by key heads, each with its query heads; whole without a mesh.

    Query heads of one key head stay together: they are rows of one matrix product, whose bits hang on its shape.
    """

    mesh: Mesh | None
    heads: int
    kv_heads: int

    def scores(self, kernel: Callable[[Any, Any], Any], q: Any, k: Any) -> Any:
        """`kernel(q[position, head, channel], k[key, kv_head, channel])` -> `[head, position, key]`."""
        if self.mesh is None:
            return kernel(q, k)
        arguments = (self._filled(q, 1, self.heads), self._filled(k, 1, self.kv_heads))
        return self._run(kernel, (_SECOND, _SECOND), _FIRST, *arguments)[: self.heads]

    def softmax(self, kernel: Callable[[Any, Any], Any], scores: Any, visible: Any) -> Any:
        """`kernel(scores[head, position, key], visible)` -> `[head, position, key]`."""
        if self.mesh is None:
            return kernel(scores, visible)
        return self._run(kernel, (_FIRST, P()), _FIRST, self._filled(scores, 0, self.heads), visible)[: self.heads]

    def values(self, kernel: Callable[[Any, Any], Any], probabilities: Any, v: Any) -> Any:
        """`kernel(probabilities[head, position, key], v[key, kv_head, channel])` -> `[position, head * channel]`."""
        if self.mesh is None:
            return kernel(probabilities, v)
        arguments = (self._filled(probabilities, 0, self.heads), self._filled(v, 1, self.kv_heads))
        return self._merged(self._run(kernel, (_FIRST, _SECOND), _SECOND, *arguments), v)

    def flash(self, kernel: Callable[[Any, Any, Any, Any], Any], q: Any, k: Any, v: Any, visible: Any) -> Any:
        """All of it in one kernel: `[position, head * channel]`."""
        if self.mesh is None:
            return kernel(q, k, v, visible)
        arguments = (self._filled(q, 1, self.heads), *(self._filled(x, 1, self.kv_heads) for x in (k, v)), visible)
        return self._merged(self._run(kernel, (_SECOND, _SECOND, _SECOND, P()), _SECOND, *arguments), v)

    def cached(self, value: Any) -> Any:
        """Keys or values `[capacity, kv_head, channel]`, lying as the cache is to lie."""
        if self.mesh is None:
            return value
        return lax.with_sharding_constraint(value, cache_sharding(self.mesh, self.kv_heads))

    def _filled(self, x: Any, axis: int, heads: int) -> Any:
        """Heads of zeros behind the last, until every device has as many."""
        assert self.mesh is not None
        missing = -self.kv_heads % self.mesh.size * (heads // self.kv_heads)
        return jnp.pad(x, [(0, missing if index == axis else 0) for index in range(x.ndim)]) if missing else x

    def _run(self, kernel: Callable[..., Any], specs: tuple[P, ...], out: P, *arguments: Any) -> Any:
        return jax.shard_map(kernel, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*arguments)

    def _merged(self, out: Any, v: Any) -> Any:
        return replicated(out, self.mesh)[:, : self.heads * v.shape[2]]


def cache_sharding(mesh: Mesh, kv_heads: int, *, batched: bool = False) -> NamedSharding:
    """How keys and values `[(row,) capacity, kv_head, channel]` lie: split by heads where these divide evenly.

    Elsewhere the whole cache is on every device.
    """
    axes = (None, None) if batched else (None,)
    return NamedSharding(mesh, P(*axes, AXIS if kv_heads % mesh.size == 0 else None))


def empty_cache(shape: tuple[int, ...], dtype: Any, mesh: Mesh | None) -> jax.Array:
    """Zeros `[(row,) capacity, kv_head, channel]` that lie as the cache is to lie."""
    sharding = None if mesh is None else cache_sharding(mesh, shape[-2], batched=len(shape) == 4)
    return jnp.zeros(shape, dtype, device=sharding)
