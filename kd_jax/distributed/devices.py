"""Devices: the mesh, placing arrays, and mapping a function over devices."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.distributed import collectives

# Each of them holds the data set.
_MOST_CPU_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices of a run.

  Attributes:
    mesh: a mesh with one axis, `collectives.AXIS`.
    mapping: "shard_map" or "pmap".
  """

  mesh: jax.sharding.Mesh
  mapping: str = "shard_map"

  @property
  def batch_sharding(self) -> NamedSharding:
    """Sharding of leaves [k, B, ...], with B split over the devices."""
    return NamedSharding(self.mesh, P(None, collectives.AXIS))

  def replicate(self, tree: Any) -> Any:
    """Copies a pytree of arrays, equal in all processes, to every device."""
    return self.place(tree, jax.tree.map(lambda _: P(), tree))

  def place(self, tree: Any, specs: Any) -> Any:
    """Places a pytree of arrays as a pytree of specs says.

    Args:
      tree: whole arrays, equal in all processes.
      specs: for each array P(), a copy on each device, or P(AXIS), its rows
        split over the devices and padded with zeros to a multiple of them.

    Returns:
      The placed arrays.
    """

    def put(x, spec):
      sharding = NamedSharding(self.mesh, spec)
      if spec != P():
        rows = -x.shape[0] % self.mesh.devices.size
        x = jnp.pad(x, [(0, rows), *[(0, 0)] * (x.ndim - 1)])
      return put_whole(x, sharding)

    return jax.tree.map(put, tree, specs)

  def shard(self, xs: Any) -> Any:
    """Places this process's [k, B, ...] leaves, split along B."""
    sharding = self.batch_sharding

    def place(x):
      if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
      if jax.process_count() > 1:
        x = np.asarray(x)
      if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
      return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, xs)

  def count(self, *flags: bool) -> jax.Array:
    """Counts the processes that set each flag; returned asynchronously.

    The devices compute the sum after the work that they already have.

    Returns:
      int32, [flags].
    """
    mine = self.mesh.local_mesh.devices.size
    rows = np.zeros((mine, len(flags)), np.int32)
    rows[0] = flags
    sharding = NamedSharding(self.mesh, P(collectives.AXIS))
    return self._sum(jax.make_array_from_process_local_data(sharding, rows))

  @functools.cached_property
  def _sum(self):
    return jax.jit(
      lambda x: jnp.sum(x, axis=0),
      out_shardings=NamedSharding(self.mesh, P()),
    )

  def map_chunk(
    self,
    fn: Callable[..., Any],
    *,
    donate: bool = False,
    carry_specs: Any = None,
  ) -> Callable[..., Any]:
    """Compiles `fn(carry, constants, resident, xs)` over the devices.

    `xs` has leaves [k, B, ...], split along B. All other arguments and the
    results are replicated; `fn` must make its results equal on all devices
    (with means and sums over `AXIS`).

    Args:
      fn: the function of one replica.
      donate: whether the result may reuse `carry`'s memory.
      carry_specs: pytree of specs of `carry`, if parts of it are split; `fn`
        then returns (carry, replicated results). Not for "pmap".

    Returns:
      The compiled function; takes the arguments of `fn`.
    """
    if self.mapping == "pmap":
      return self._pmap(fn)
    carry = P() if carry_specs is None else carry_specs
    mapped = jax.shard_map(
      fn,
      mesh=self.mesh,
      in_specs=(carry, P(), P(), P(None, collectives.AXIS)),
      out_specs=P() if carry_specs is None else (carry, P()),
      # With tracking, the gradient of a replicated parameter is already a sum
      # over the axis; the step takes the mean itself.
      check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,) if donate else ())

  def map_batches(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `fn(scalar, constants, resident, xs)` over the devices.

    Args:
      fn: of one replica; computes leaves [k, B, ...] from leaves [k, B, ...].

    Returns:
      The compiled function, whose results are split along B like `xs`.
    """
    split = P(None, collectives.AXIS)
    return jax.jit(
      jax.shard_map(
        fn,
        mesh=self.mesh,
        in_specs=(P(), P(), P(), split),
        out_specs=split,
        check_vma=False,
      )
    )

  def _pmap(self, fn):
    mine = self.mesh.local_mesh.devices
    mapped = jax.pmap(
      fn,
      axis_name=collectives.AXIS,
      in_axes=(None, None, None, 1),
      out_axes=None,
      devices=list(self.mesh.devices.flat),
    )

    def split(x):
      if not x.is_fully_addressable:
        shards = sorted(x.addressable_shards, key=lambda s: s.index[1].start)
        x = np.concatenate([np.asarray(s.data) for s in shards], axis=1)
      size = mine.size
      return x.reshape(x.shape[0], size, x.shape[1] // size, *x.shape[2:])

    def call(carry, constants, resident, xs):
      if jax.process_count() == 1:
        return mapped(carry, constants, resident, jax.tree.map(split, xs))
      # pmap takes no arrays that other processes hold parts of.
      whole = jax.tree.map(_local_copy, (carry, constants, resident))
      result = mapped(*whole, jax.tree.map(split, xs))
      return self.replicate(jax.tree.map(_local_copy, result))

    return call


def _local_copy(x):
  return x if x.is_fully_addressable else x.addressable_data(0)


def put_whole(x: Any, sharding: NamedSharding) -> jax.Array:
  """Places a whole array, equal in all processes, as a sharding says."""
  if sharding.is_fully_addressable:
    return jax.device_put(x, sharding)
  host = np.asarray(x)
  return jax.make_array_from_callback(
    host.shape, sharding, lambda index: host[index]
  )


def split_cpu(*batch_sizes: int) -> None:
  """Makes each core of a CPU a device, if all batch sizes divide by them.

  XLA runs only the large operations of a device's program on several cores;
  with a device per core, everything runs in parallel (see docs/speed.md). Call
  it before JAX is first used. Does nothing if JAX_NUM_CPU_DEVICES or XLA_FLAGS
  set the number, on accelerators, or in one of several processes.

  Args:
    *batch_sizes: of all runs to come, in examples.
  """
  named = getattr(jax.config, "jax_num_cpu_devices", -1)
  forced = "xla_force_host_platform_device_count"
  chosen = named > 0 or forced in os.environ.get("XLA_FLAGS", "")
  if chosen or jax.distributed.is_initialized():
    return
  size = math.gcd(*batch_sizes)
  most = min(len(os.sched_getaffinity(0)), _MOST_CPU_DEVICES)
  count = max(n for n in range(1, most + 1) if size % n == 0)
  jax.config.update("jax_num_cpu_devices", count)


def require_backend() -> None:
  """Checks that JAX finds a device.

  Raises:
    ValueError: if it finds none for JAX_PLATFORMS.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    named = os.environ.get("JAX_PLATFORMS", "")
    raise ValueError(
      f"JAX_PLATFORMS={named}: expected a platform that has a device, got none"
      f" ({str(error) or 'no reason given'}). Install its plugin (pip install"
      " kd_jax[cuda12]), or set JAX_PLATFORMS=cpu"
    ) from error


def make_devices(
  *, num_devices: int = 0, mapping: str = "shard_map"
) -> Devices:
  """Picks the devices of a run.

  Args:
    num_devices: number of devices, in JAX's order; 0 takes all.
    mapping: "shard_map" or "pmap".

  Returns:
    The devices.

  Raises:
    ValueError: if there are fewer devices, or for an unknown mapping.
  """
  available, processes = jax.devices(), jax.process_count()
  if not 0 <= num_devices <= len(available):
    raise ValueError(
      f"config.parallel.num_devices: expected 0 (all) to {len(available)}"
      f" ({available[0].platform} devices seen), got {num_devices}"
    )
  if num_devices % processes:
    raise ValueError(
      "config.parallel.num_devices: expected 0 (all) or a multiple of the"
      f" {processes} processes, got {num_devices}"
    )
  if mapping not in ("shard_map", "pmap"):
    raise ValueError(
      "config.parallel.mapping: expected 'shard_map' or 'pmap', got"
      f" {mapping!r}"
    )
  # Each process's devices are neighbours: its pipeline loads their part of B.
  each = (num_devices or len(available)) // processes
  chosen = [
    device
    for process in range(processes)
    for device in [d for d in available if d.process_index == process][:each]
  ]
  mesh = jax.sharding.Mesh(np.asarray(chosen), (collectives.AXIS,))
  return Devices(mesh=mesh, mapping=mapping)
