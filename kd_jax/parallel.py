"""Devices: the collectives, and the one place that maps a step over them.

Every collective of the package goes through `axis_mean`, `axis_sum`,
`axis_gather` and `axis_index` below. With `axis_name=None` they do nothing, so
that the code that calls them runs, and is tested, as a plain function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


def axis_mean(x: Any, axis_name: str | None) -> Any:
  """Mean of a pytree over the devices of a mapped axis."""
  return x if axis_name is None else jax.lax.pmean(x, axis_name)


def axis_sum(x: Any, axis_name: str | None) -> Any:
  """Sum of a pytree over the devices of a mapped axis."""
  return x if axis_name is None else jax.lax.psum(x, axis_name)


def axis_size(axis_name: str | None) -> int:
  """Number of devices along a mapped axis, 1 without one."""
  return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def axis_index(axis_name: str | None) -> jax.Array:
  """This device's position along a mapped axis, 0 without one."""
  if axis_name is None:
    return jnp.zeros((), jnp.int32)
  return jax.lax.axis_index(axis_name)


def axis_gather(x: Any, axis_name: str | None) -> Any:
  """Concatenates [B, ...] leaves of all devices to [B * devices, ...]."""
  if axis_name is None:
    return x
  return jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices of a run, and how a per-replica function is mapped over them.

  Attributes:
    mesh: a mesh with the one axis `AXIS`.
    mapping: "shard_map" or "pmap".
  """

  mesh: jax.sharding.Mesh
  mapping: str = "shard_map"

  def replicate(self, tree: Any) -> Any:
    """Copies a pytree of arrays onto every device."""
    return jax.device_put(tree, NamedSharding(self.mesh, P()))

  def shard(self, xs: Any) -> Any:
    """Places [k, B, ...] host leaves with B spread over the devices."""
    sharding = NamedSharding(self.mesh, P(None, AXIS))

    def place(x):
      if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
      return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, xs)

  def map_chunk(
    self, fn: Callable[..., Any], *, donate: bool = False
  ) -> Callable[..., Any]:
    """Compiles `fn(carry, constants, resident, xs)` over the devices.

    `xs` has leaves [k, B, ...], split along B; all else, results included, is
    replicated, and `fn` has to make its results equal on all devices (means
    and sums over `AXIS`). Replication is not tracked (`check_vma=False`):
    under shard_map's tracking the transpose of using a replicated parameter
    is already a sum over the axis, and the mean of the gradients that the
    step takes would leave them too large by the number of devices.

    Args:
      fn: the per-replica function.
      donate: whether `carry`'s memory may be reused for the result.

    Returns:
      The compiled function, with the arguments of `fn`.
    """
    if self.mapping == "pmap":
      return self._pmap(fn)
    mapped = jax.shard_map(
      fn,
      mesh=self.mesh,
      in_specs=(P(), P(), P(), P(None, AXIS)),
      out_specs=P(),
      check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,) if donate else ())

  def _pmap(self, fn):
    size = self.mesh.devices.size
    mapped = jax.pmap(
      fn,
      axis_name=AXIS,
      in_axes=(None, None, None, 1),
      out_axes=None,
      devices=list(self.mesh.devices.flat),
    )

    def call(carry, constants, resident, xs):
      def split(x):
        return x.reshape(x.shape[0], size, x.shape[1] // size, *x.shape[2:])

      return mapped(carry, constants, resident, jax.tree.map(split, xs))

    return call


def make_devices(
  *, num_devices: int = 0, mapping: str = "shard_map"
) -> Devices:
  """Picks the devices of a run.

  Args:
    num_devices: how many, in JAX's order; 0 takes all.
    mapping: "shard_map" or "pmap".

  Returns:
    The devices.

  Raises:
    ValueError: if there are fewer devices, or for an unknown mapping.
  """
  available = jax.devices()
  if not 0 <= num_devices <= len(available):
    raise ValueError(
      f"config.parallel.num_devices: expected 0 (all) to {len(available)}"
      f" ({available[0].platform} devices seen), got {num_devices}"
    )
  if mapping not in ("shard_map", "pmap"):
    raise ValueError(
      "config.parallel.mapping: expected 'shard_map' or 'pmap', got"
      f" {mapping!r}"
    )
  chosen = available[: num_devices or len(available)]
  mesh = jax.sharding.Mesh(np.asarray(chosen), (AXIS,))
  return Devices(mesh=mesh, mapping=mapping)
