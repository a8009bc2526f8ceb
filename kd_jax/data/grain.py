"""The grain pipeline: shuffled batches from host memory or from files.

Grain's element is a whole batch here, made from the number of its step. This
costs Python time once a batch, not once an image, and gives random access: a
position is the number of the next step, for any number of processes, threads
and workers.
"""

import multiprocessing
import os
import signal
import threading
from typing import Any

import grain
import numpy as np
from absl import flags

from kd_jax.data import fetch
from kd_jax.data.batch import BatchPlan, Pipeline
from kd_jax.data.common import EncodedSource, Source, check_range
from kd_jax.distributed import signals


def _end_with(parent: Any) -> None:
  parent.join()
  os._exit(1)


def _start_worker(index: int, count: int) -> None:
  """Sets a worker process up.

  It ignores the signals that the training process watches, which needs more
  batches before it saves and stops. It ends when the training process dies.
  """
  del index, count
  for number in signals.WATCHED:
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


class GrainPipeline(Pipeline):
  """Batches made on the host; see `kd_jax.data.batch.Pipeline`.

  `resident` is {}, a chunk is the stacked batches as numpy arrays, and `load`
  hands its row through. The order of epoch e is numpy's permutation under a
  generator seeded with (seed, e).

  Image files are decoded, and a random crop of each is resized to the network's
  input. The crop is a function of (seed, epoch, position). An image that cannot
  be decoded is an error. If the source says "skip", it is listed in `skipped`
  and the next good image of the set replaces it.
  """

  def __init__(
    self,
    source: Source | EncodedSource,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    *,
    num_threads: int = 0,
    num_workers: int = 0,
    prefetch: int = 4,
    crop_area: tuple[float, float] = (0.08, 1.0),
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
  ):
    """Checks the options; nothing is read before the first chunk.

    Args:
      source: the training set.
      batch_size: global, in examples; a multiple of `process_count`.
      seed: of the order and of the crops, 0 or more.
      process_index: this process.
      process_count: of all processes.
      shuffle: false keeps the set's order in every epoch.
      num_threads: threads that fetch batches ahead; 0 fetches when asked.
        The batches are the same for any number of threads and workers.
      num_workers: processes that fetch, instead of threads; for image files
        only, since the threads of one process do not scale far.
      prefetch: batches fetched ahead, if there are threads or workers.
      crop_area: for image files: least and largest share of the picture's area.
      crop_aspect: for image files: least and largest width / height of a crop.

    Raises:
      ValueError: a value out of range.
    """
    if num_threads < 0 or num_workers < 0 or prefetch < 1:
      raise ValueError(
        "num_threads and num_workers must be 0 or more and prefetch 1 or more,"
        f" got {num_threads}, {num_workers} and {prefetch}."
      )
    super().__init__(
      BatchPlan(
        "grain",
        len(source),
        batch_size,
        seed,
        process_index,
        process_count,
        shuffle,
      )
    )
    fetch_batch: fetch.FromMemory | fetch.FromFiles
    if isinstance(source, Source):
      if num_workers:
        raise ValueError(
          f"num_workers is for image files; {source.name} is in memory, and"
          f" every worker would copy it: expected 0, got {num_workers}."
        )
      fetch_batch = fetch.FromMemory(self._plan, source)
    else:
      check_range("crop_area", crop_area, 1)
      check_range("crop_aspect", crop_aspect, 100)
      fetch_batch = fetch.FromFiles(self._plan, source, crop_area, crop_aspect)
    self._batches = grain.MapDataset.range(self.steps_per_epoch).repeat()
    self._batches = self._batches.map_with_index(
      lambda step, number: fetch_batch(step)
    )
    self._threads = grain.ReadOptions(
      num_threads=0 if num_workers else num_threads,
      prefetch_buffer_size=prefetch if num_threads and not num_workers else 0,
    )
    self._workers = grain.MultiprocessingOptions(
      num_workers=num_workers,
      per_worker_buffer_size=-(-prefetch // max(num_workers, 1)),
    )
    self._iterator: Any = None

  def _next(self) -> dict[str, np.ndarray]:
    """The next batch; starts a stream at the current step if there is none.

    Raises:
      BadImageError: see `kd_jax.data.fetch.FromFiles`.
      RuntimeError: a worker process died.
    """
    if self._iterator is None:
      # Grain's workers read absl flags, even if the program has none.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      stream = self._batches[self._step :].to_iter_dataset(self._threads)
      self._iterator = iter(stream.mp_prefetch(self._workers, _start_worker))
    try:
      batch = next(self._iterator)
    except RuntimeError as error:
      if not self._workers.num_workers:
        raise
      raise RuntimeError(
        f"A worker process of the grain pipeline died: {error} Exit code -9"
        " often means out of memory, and -7 out of shared memory (/dev/shm, in"
        " Docker --shm-size). Use fewer num_workers, a smaller prefetch, or"
        " num_threads."
      ) from error
    for index, reason in batch.pop("skipped"):
      self.skipped.add(index, reason)
    # Workers return an array class of grain's, in shared memory.
    return {name: np.asarray(value) for name, value in batch.items()}

  def next_chunk(self, k: int) -> dict[str, np.ndarray]:
    """Returns the next `k` batches, stacked: leaves [k, B, ...].

    Raises:
      ValueError: `k` steps would cross the end of the epoch.
      BadImageError: an image cannot be decoded, and the source says "error",
        or too many in a row cannot. The position stays.
      UnreadableError: a file is gone or cannot be read. The position stays.
      RuntimeError: a worker process died. The position stays.
    """
    self._plan.check_chunk(self._step, k)
    try:
      batches = [self._next() for _ in range(k)]
    except BaseException:
      self.close()
      raise
    self._step += k
    # A copy frees the workers' shared memory at once.
    if k == 1 and not self._workers.num_workers:
      return {name: value[None] for name, value in batches[0].items()}
    return {
      name: np.stack([batch[name] for batch in batches]) for name in batches[0]
    }

  def close(self) -> None:
    """Ends the workers; the next chunk starts them again."""
    iterator, self._iterator = self._iterator, None
    if iterator is not None:
      iterator.close()
