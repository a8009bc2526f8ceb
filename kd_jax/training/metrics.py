"""Sums on the device, means on the host.

A device never divides: a step returns sums over its global batch and their
count, so that means over any number of steps, batches or devices are exact.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.distributed import collectives

COUNT = "count"


def topk_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether each label is among the k largest logits.

  Args:
    logits: [B, C].
    labels: [B] int.
    k: with k >= C every number is a hit; NaN never is. Ties count against the
      label.

  Returns:
    [B] float32, 1 for a hit.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)
  if k >= logits.shape[1]:
    return (~jnp.isnan(own[:, 0])).astype(jnp.float32)
  # Comparisons with NaN are false: count what is surely smaller instead of
  # what is larger, so that a diverged network scores 0 and not 100 %.
  smaller = jnp.sum((logits < own).astype(jnp.int32), axis=1)
  return (smaller >= logits.shape[1] - k).astype(jnp.float32)


def global_sums(
  values: Mapping[str, jax.Array],
  count: jax.Array,
  axis_name: str | None,
) -> dict[str, jax.Array]:
  """Adds local sums and their count over the devices.

  Args:
    values: name -> local sum.
    count: local number of examples.
    axis_name: the mapped axis, or None.

  Returns:
    The global sums, and the global count under "count".
  """
  sums: dict[str, jax.Array] = collectives.axis_sum(
    {**values, COUNT: count}, axis_name
  )
  return sums


def means(sums: Mapping[str, Any]) -> dict[str, float]:
  """Divides sums (scalars, or arrays over steps) by their count.

  Args:
    sums: what a step returned, fetched to the host.

  Returns:
    name -> mean, without the count; hits ("top1", "top5") in percent.

  Raises:
    ValueError: if there was no example.
  """
  count = float(np.sum(sums[COUNT], dtype=np.float64))
  if not count:
    raise ValueError(
      "expected images to score, got none: not one could be decoded. Check the"
      " data"
    )
  return {
    name: float(np.sum(value, dtype=np.float64))
    * (100.0 if name.startswith("top") else 1.0)
    / count
    for name, value in sums.items()
    if name != COUNT
  }


def first_non_finite(sums: Mapping[str, Any]) -> tuple[int, list[str]] | None:
  """Finds the first step whose sums are not all finite.

  Args:
    sums: arrays [k] over k steps, on the host.

  Returns:
    (position in 0..k-1, the names that are not finite there), or None.
  """
  bad = {name: ~np.isfinite(value) for name, value in sums.items()}
  anywhere = np.logical_or.reduce(list(bad.values()))
  if not anywhere.any():
    return None
  first = int(np.argmax(anywhere))
  return first, [name for name, flags in bad.items() if flags[first]]
