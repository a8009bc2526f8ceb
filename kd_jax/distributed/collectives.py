"""Collectives over a mapped axis.

With `axis_name=None` they return what they get, so that the code that calls
them also runs as a plain function on one device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import flatten_util

AXIS = "data"


def axis_mean(x: Any, axis_name: str | None) -> Any:
  """Mean of a pytree over the devices of a mapped axis."""
  return x if axis_name is None else jax.lax.pmean(x, axis_name)


def axis_mean_of_gradients(tree: Any, axis_name: str | None) -> Any:
  """`axis_mean` of a pytree, with all its scalars and vectors in one array.

  XLA joins small collectives too, but unpacks each array with a kernel.
  """
  leaves, structure = jax.tree.flatten(tree)
  small = [i for i, x in enumerate(leaves) if x.ndim < 2]
  if axis_name is None or not small:
    return axis_mean(tree, axis_name)
  packed, unpack = flatten_util.ravel_pytree([leaves[i] for i in small])
  rest = {i: x for i, x in enumerate(leaves) if i not in {*small}}
  packed, means = axis_mean((packed, rest), axis_name)
  means |= zip(small, unpack(packed), strict=True)
  return jax.tree.unflatten(structure, [means[i] for i in range(len(leaves))])


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


def axis_sum_rows(x: jax.Array, axis_name: str | None) -> jax.Array:
  """Sum over the devices of [B * devices, ...]; each keeps its B rows."""
  if axis_name is None:
    return x
  return jax.lax.psum_scatter(x, axis_name, scatter_dimension=0, tiled=True)


def axis_gather(x: Any, axis_name: str | None) -> Any:
  """Concatenates [B, ...] leaves of all devices to [B * devices, ...]."""
  if axis_name is None:
    return x
  return jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


def vary_like(x: jax.Array, *others: jax.Array) -> list[jax.Array]:
  """Marks the others as varying over the axes over which `x` varies.

  Matters only in a shard_map that tracks replication (`check_vma`): a gradient
  written by hand must vary over the same axes as its array.
  """

  def axes_of(x):
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return kind.varying if kind else frozenset()

  varied = []
  for other in others:
    if axes := axes_of(x) - axes_of(other):
      other = jax.lax.pcast(other, tuple(axes), to="varying")
    varied.append(other)
  return varied


def axis_moments(
  mean: jax.Array, variance: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
  """Mean and variance of all devices' examples, in one all-gather.

  Adds the variance of the means to the mean of the variances (Chan et al.,
  "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
  1979), which subtracts no large squares from each other.

  Args:
    mean: [C], of this device's examples; all devices have equally many.
    variance: [C], of this device's examples around that mean.
    axis_name: mapped axis of the devices, or None.

  Returns:
    (mean, variance), each [C].
  """
  if axis_name is None:
    return mean, variance
  mine = jnp.stack([mean, variance])[None]
  means, variances = jnp.moveaxis(axis_gather(mine, axis_name), 1, 0)
  mean = jnp.mean(means, axis=0)
  between = jnp.mean(jnp.square(means - mean), axis=0)
  return mean, jnp.mean(variances, axis=0) + between


def gather_processes(value: Any) -> np.ndarray:
  """Gathers a number or array of every process, of at most 32 bits a number.

  Returns:
    [processes, ...].
  """
  value = np.asarray(value)
  if jax.process_count() == 1:
    return value[None]
  from jax.experimental import multihost_utils  # brings much along

  gathered = multihost_utils.process_allgather(value)
  return np.asarray(gathered).astype(value.dtype)
