"""The device pipeline: the whole set stays on the device, as uint8.

CIFAR's 50,000 images take 150 MB. With them on the device, the host sends only
positions. The compiled program shuffles, gathers, augments and normalises.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.data.batch import Batch, BatchPlan, Pipeline
from kd_jax.data.common import Source

# Separates the keys of the orders from others of the same seed.
_STREAM = 0x64617461


@functools.partial(jax.jit, static_argnames=("plan",))
def _epoch_order(epoch: jax.Array, *, plan: BatchPlan) -> jax.Array:
  """This process's part of an epoch's order, int32 [steps, B]."""
  if plan.shuffle:
    key = jax.random.fold_in(jax.random.key(plan.seed), _STREAM)
    key = jax.random.fold_in(key, epoch)
    order = jax.random.permutation(key, plan.num_examples)
  else:
    order = jnp.arange(plan.num_examples)
  steps = plan.steps_per_epoch
  order = order[: steps * plan.batch_size].reshape(steps, plan.batch_size)
  end = plan.local_start + plan.local_size
  return order[:, plan.local_start : end].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("k",))
def _rows(order: jax.Array, start: jax.Array, *, k: int) -> jax.Array:
  # The start is traced: each Python number would compile a new slice.
  return jax.lax.dynamic_slice_in_dim(order, start, k)


class DevicePipeline(Pipeline):
  """Batches gathered on the device; see `kd_jax.data.batch.Pipeline`.

  `resident` is {"image": uint8 [N, H, W, C], "label": int32 [N]} on the
  default device (replicate it over a mesh with `jax.device_put`), and a chunk
  is {"index": int32 [k, B]}. The order of epoch e is
  `jax.random.permutation` under a key folded from (seed, e), computed on the
  device once per epoch.
  """

  def __init__(
    self,
    source: Source,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
  ):
    """Puts the set on the device.

    Args:
      source: the training set.
      batch_size: global, in examples; a multiple of `process_count`.
      seed: of the order, 0 or more.
      process_index: this process.
      process_count: of all processes.
      shuffle: false keeps the set's order in every epoch.

    Raises:
      ValueError: a value out of range, or a set of image files.
    """
    if not isinstance(source, Source):
      raise ValueError(
        "The pipeline 'device' keeps the set in the device's memory: expected"
        f" a set in memory, got {source.name}, which has image files. Use the"
        " pipeline 'grain'."
      )
    super().__init__(
      BatchPlan(
        "device",
        len(source),
        batch_size,
        seed,
        process_index,
        process_count,
        shuffle,
      )
    )
    self._resident = {
      "image": jnp.asarray(source.images),
      "label": jnp.asarray(source.labels),
    }
    self._order: tuple[int, jax.Array] | None = None

  @property
  def resident(self) -> dict[str, jax.Array]:
    """The set, as device arrays: the first argument of `load`."""
    return self._resident

  def next_chunk(self, k: int) -> dict[str, jax.Array]:
    """Returns the next `k` steps' positions: {"index": int32 [k, B]}.

    Raises:
      ValueError: `k` steps would cross the end of the epoch.
    """
    self._plan.check_chunk(self._step, k)
    epoch, start = divmod(self._step, self.steps_per_epoch)
    if self._order is None or self._order[0] != epoch:
      self._order = (epoch, _epoch_order(jnp.int32(epoch), plan=self._plan))
    index = _rows(self._order[1], jnp.int32(start), k=k)
    self._step += k
    return {"index": index}

  @staticmethod
  def load(resident: Any, x: Any) -> Batch:
    """Gathers one step's batch.

    Args:
      resident: the set, as in `resident`.
      x: {"index": int32 [B]}, one row of a chunk (or a device's part of it).

    Returns:
      The batch: image, label, index, mask.
    """
    index = x["index"]
    return {
      # Positions are always in range; "clip" is faster than filling.
      "image": jnp.take(resident["image"], index, axis=0, mode="clip"),
      "label": jnp.take(resident["label"], index, axis=0, mode="clip"),
      "index": index,
      "mask": jnp.ones(index.shape, bool),
    }

  def close(self) -> None:
    """Does nothing: there are no threads."""
