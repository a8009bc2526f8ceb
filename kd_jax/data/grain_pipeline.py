"""The grain pipeline: shuffled batches from host memory, resumable.

Grain's element here is a whole batch, fetched by its number with one gather
from the array of images. Per-image elements cost Python time for every image;
this costs it once per batch, and gives random access, hence exact resume.
"""

import functools
from typing import Any

import grain
import numpy as np

from kd_jax.data.batch import Batch, BatchPlan
from kd_jax.data.sources import Source


# Two epochs: prefetching threads are in the next one before this one ends.
@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The permutation of an epoch, int32 [num_examples]."""
  rng = np.random.default_rng((seed, epoch))
  return rng.permutation(num_examples).astype(np.int32)


class GrainPipeline:
  """Batches gathered on the host; see `kd_jax.data.batch.Pipeline`.

  `resident` is {}, a chunk is the stacked batches as numpy arrays, and `load`
  hands its row through. The order of epoch e is numpy's permutation under a
  generator seeded with (seed, e).
  """

  def __init__(
    self,
    source: Source,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    *,
    num_threads: int = 0,
    prefetch: int = 4,
  ):
    """Sets the stream up; nothing is read before the first chunk.

    Args:
      source: the training set.
      batch_size: global, in examples; a multiple of `process_count`.
      seed: of the order, 0 or more.
      process_index: this process.
      process_count: of all processes.
      shuffle: false keeps the set's order in every epoch.
      num_threads: threads that fetch batches ahead; 0 fetches when asked.
        The order is the same for any number.
      prefetch: batches fetched ahead, if there are threads.

    Raises:
      ValueError: a value out of range.
    """
    if num_threads < 0 or prefetch < 1:
      raise ValueError(
        "num_threads must be 0 or more and prefetch 1 or more, got"
        f" {num_threads} and {prefetch}."
      )
    self._plan = BatchPlan(
      "grain",
      len(source),
      batch_size,
      seed,
      process_index,
      process_count,
      shuffle,
    )
    self._source = source
    self._step = 0
    batches = grain.MapDataset.range(self.steps_per_epoch).repeat()
    self._iterator = iter(
      batches.map_with_index(self._fetch).to_iter_dataset(
        grain.ReadOptions(
          num_threads=num_threads,
          prefetch_buffer_size=prefetch if num_threads else 0,
        )
      )
    )

  def _fetch(self, step: int, number: int) -> dict[str, np.ndarray]:
    """Batch `number` of the epoch that `step` is in."""
    plan = self._plan
    start = number * plan.batch_size + plan.local_start
    stop = start + plan.local_size
    if plan.shuffle:
      epoch = step // plan.steps_per_epoch
      order = _epoch_order(plan.seed, epoch, plan.num_examples)
      index = order[start:stop].copy()
    else:
      index = np.arange(start, stop, dtype=np.int32)
    return {
      "image": self._source.images.take(index, axis=0),
      "label": self._source.labels.take(index),
      "index": index,
      "mask": np.ones(index.shape, bool),
    }

  @property
  def steps_per_epoch(self) -> int:
    """Global batches in an epoch."""
    return self._plan.steps_per_epoch

  @property
  def resident(self) -> dict[str, Any]:
    """Empty: a chunk brings everything."""
    return {}

  @property
  def step(self) -> int:
    """Steps handed out since the first epoch's start."""
    return self._step

  @property
  def epoch(self) -> int:
    """The epoch of the next step, counted from 0."""
    return self._step // self.steps_per_epoch

  def next_chunk(self, k: int) -> dict[str, np.ndarray]:
    """The next `k` batches, stacked: leaves [k, B, ...].

    Raises:
      ValueError: `k` steps would cross the end of the epoch.
    """
    self._plan.check_chunk(self._step, k)
    batches = [next(self._iterator) for _ in range(k)]
    self._step += k
    if k == 1:
      return {name: value[None] for name, value in batches[0].items()}
    return {
      name: np.stack([batch[name] for batch in batches]) for name in batches[0]
    }

  @staticmethod
  def load(resident: Any, x: Any) -> Batch:
    """A row of a chunk is the batch already."""
    del resident
    return x

  def get_state(self) -> dict[str, Any]:
    """The position, grain's own included, as a dict that JSON can hold."""
    return {
      **self._plan.identity(),
      "step": self._step,
      "grain": self._iterator.get_state(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position of `get_state`, exactly.

    Raises:
      ValueError: the state is of another order.
    """
    self._plan.check_identity(state)
    self._iterator.set_state(state["grain"])
    self._step = int(state["step"])
