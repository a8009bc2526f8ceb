"""Fingerprints of arrays, which tell when their bytes have changed."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.distributed import collectives


def fingerprint(tree: Any) -> list[int]:
  """Compute a 64-bit sum over each array's bits, weighted by their position.

  It is computed on the host, because compiling it for every tree of arrays
  would take longer than all the checkpoints of a short run. In many processes,
  all have to call it.

  Args:
    tree: arrays.

  Returns:
    One number per leaf, in the order of `jax.tree.leaves`. It does not depend
    on the devices, on how they share the array, or on rows of zeros after it.
  """
  leaves = [_as_bits(x) for x in jax.tree.leaves(tree)]
  own, shared = [0] * len(leaves), []
  for i, leaf in enumerate(leaves):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
      own[i] = _weighted_sum(np.asarray(leaf))
    elif leaf.is_fully_replicated:
      own[i] = _weighted_sum(np.asarray(leaf.addressable_data(0)))
    else:
      shared.append(i)
      own[i] = sum(
        _weighted_sum(np.asarray(s.data), s.index[0].start or 0)
        for s in leaf.addressable_shards
        if s.replica_id == 0
      )
  if shared:
    # As halves: JAX has no 64 bits.
    parts = np.array([divmod(own[i] & _MASK, 2**32) for i in shared], np.uint32)
    gathered = collectives.gather_processes(parts)
    for i, column in zip(shared, gathered.swapaxes(0, 1)):
      own[i] = sum(int(high) * 2**32 + int(low) for high, low in column)
  return [value & _MASK for value in own]


_MASK = 2**64 - 1


_BLOCK = 1 << 16


def _weighted_sum(x: np.ndarray, first_row: int = 0) -> int:
  """Sum of words times odd weights; `x` begins at that row of its array."""
  start = first_row * math.prod(x.shape[1:])
  flat = np.ascontiguousarray(x).reshape(-1)
  words = flat.view(f"u{x.dtype.itemsize}")
  weights, total, done = _weights(), 0, 0
  while done < words.size:
    number, place = divmod(start + done, _BLOCK)
    block = words[done : done + _BLOCK - place].astype(np.uint64)
    part = int(block.dot(weights[place : place + block.size]))
    total += part * int(_scramble(np.array([number], np.uint64))[0])
    done += block.size
  return total & _MASK


@functools.cache
def _weights() -> np.ndarray:
  """Of the places in a block."""
  return _scramble(np.arange(_BLOCK, 2 * _BLOCK, dtype=np.uint64))


def _scramble(x: np.ndarray) -> np.ndarray:
  """Odd numbers, so that no change is lost; and no two changes cancel out."""
  x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
  x ^= x >> np.uint64(29)
  x *= np.uint64(0xBF58476D1CE4E5B9)
  x ^= x >> np.uint64(32)
  return x | np.uint64(1)


def _as_bits(x):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(x)
  return x
