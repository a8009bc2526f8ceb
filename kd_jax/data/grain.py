"""The grain pipeline: shuffled batches from host memory or from files.

Grain's element here is a whole batch, made from its number. Per-image elements
cost Python time for every image; this costs it once per batch, and gives random
access: a position is the number of the next step, whatever the number of
processes, threads and workers.
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


def _end_with(parent: Any) -> None:
  parent.join()
  os._exit(1)


def _start_worker(index: int, count: int) -> None:
  """Sets a worker process up.

  A signal to the whole process group is the training process's to answer (it
  saves, and asks for a few batches more); a killed one leaves nobody behind.
  """
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


class GrainPipeline(Pipeline):
  """Batches made on the host; see `kd_jax.data.batch.Pipeline`.

  `resident` is {}, a chunk is the stacked batches as numpy arrays, and `load`
  hands its row through. The order of epoch e is numpy's permutation under a
  generator seeded with (seed, e).

  Image files are decoded and a random crop of each is resized to the network's
  input: the same crop for a (seed, epoch, position), whoever makes it. One that
  cannot be decoded is an error, or, where the source says "skip", is listed in
  `skipped`, and the next of the set that can be stands in for it.
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
    """Sets the stream up; nothing is read before the first chunk.

    Args:
      source: the training set.
      batch_size: global, in examples; a multiple of `process_count`.
      seed: of the order and of the crops, 0 or more.
      process_index: this process.
      process_count: of all processes.
      shuffle: false keeps the set's order in every epoch.
      num_threads: threads that fetch batches ahead; 0 fetches when asked.
        The batches are the same for any number of threads and workers.
      num_workers: processes that do, instead of threads; of image files only,
        whose decoding one process's threads do not scale far.
      prefetch: batches fetched ahead, if there are threads or workers.
      crop_area: of image files: least and largest share of the picture's area.
      crop_aspect: of image files: least and largest width / height of a crop.

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
          f"num_workers is of image files; {source.name} is in memory, and"
          f" every worker would copy it: expected 0, got {num_workers}."
        )
      fetch_batch = fetch.FromMemory(self._plan, source)
    else:
      check_range("crop_area", crop_area, 1)
      check_range("crop_aspect", crop_aspect, 100)
      fetch_batch = fetch.FromFiles(self._plan, source, crop_area, crop_aspect)
    # Endless: as long as grain can count.
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
    """The next batch of the stream, which begins at `step` when there is none.

    Raises:
      BadImageError: see `kd_jax.data.fetch.FromFiles`.
      RuntimeError: a worker process died.
    """
    if self._iterator is None:
      # Grain's workers have flags, also in a program that parses none.
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
        f"A worker process of the grain pipeline died: {error} Exit code -9 is"
        " often memory that ran out, and -7 shared memory (/dev/shm, in"
        " Docker --shm-size): use fewer num_workers, a smaller prefetch, or"
        " num_threads instead."
      ) from error
    for index, reason in batch.pop("skipped"):
      self.skipped.add(index, reason)
    # Workers' arrays are of a class of grain's, over shared memory.
    return {name: np.asarray(value) for name, value in batch.items()}

  def next_chunk(self, k: int) -> dict[str, np.ndarray]:
    """The next `k` batches, stacked: leaves [k, B, ...].

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
    # Copies of what workers made: their shared memory is free at once.
    if k == 1 and not self._workers.num_workers:
      return {name: value[None] for name, value in batches[0].items()}
    return {
      name: np.stack([batch[name] for batch in batches]) for name in batches[0]
    }

  def close(self) -> None:
    """Ends the workers; the next chunk would start them again."""
    iterator, self._iterator = self._iterator, None
    if iterator is not None:
      iterator.close()
