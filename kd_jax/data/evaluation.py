"""Padded batches for evaluation: every example in exactly one of them."""

import collections
import concurrent.futures
import os
from collections.abc import Iterator

import numpy as np

from kd_jax.data import images
from kd_jax.data.batch import local_batch_size
from kd_jax.data.common import EncodedSource, Source
from kd_jax.data.skipped import Skipped, check_in_a_row


def _eval_rows(
  count: int, batch_size: int, process_index: int, process_count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Positions int32 [n, B], 0 in the padding, and the mask bool [n, B]."""
  local = local_batch_size(batch_size, process_index, process_count)
  batches = -(-count // batch_size)
  rows = np.arange(batches * batch_size).reshape(batches, process_count, local)
  rows = rows[:, process_index]
  mask = rows < count
  return np.where(mask, rows, 0).astype(np.int32), mask


def eval_batches(
  source: Source,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> dict[str, np.ndarray]:
  """Cuts a set in memory into padded batches.

  Args:
    source: the set, of N examples.
    batch_size: global, in examples; a multiple of `process_count`.
    process_index: this process.
    process_count: of all processes.

  Returns:
    dict of `image` uint8 [n, B, H, W, C], `label` int32 [n, B], `index` int32
    [n, B] and `mask` bool [n, B], with n = ceil(N / batch_size) on every
    process and B = batch_size / process_count, in the set's order. Where
    `mask` is false the rest is zero; over all processes it is true N times.

  Raises:
    ValueError: batch_size or process_index out of range.
  """
  index, mask = _eval_rows(
    len(source), batch_size, process_index, process_count
  )
  return _gather(source, index, mask)


def _gather(
  source: Source, index: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
  image = source.images[index]
  image[~mask] = 0
  label = np.where(mask, source.labels[index], 0).astype(np.int32)
  return {"image": image, "label": label, "index": index, "mask": mask}


class EvalStream:
  """Padded batches of a set, one at a time.

  Iterating yields dicts of `image` uint8 [B, H, W, C], `label` int32 [B],
  `index` int32 [B] and `mask` bool [B], as `eval_batches` stacks them; `len` is
  their number, the same on every process. Threads decode and crop image files,
  two batches ahead. An image that cannot be decoded is an error. If the source
  says "skip", its mask is false instead and it is listed in `skipped`. Too many
  bad images in a row are always an error, and so is a missing file.

  Attributes:
    skipped: the images that this process could not decode.
  """

  # Batches that are decoded while the caller has one.
  _AHEAD = 2

  def __init__(
    self,
    source: Source | EncodedSource,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    num_threads: int = 0,
  ):
    """Reads nothing yet.

    Args:
      source: the set, of N examples.
      batch_size: global, in examples; a multiple of `process_count`.
      process_index: this process.
      process_count: of all processes.
      num_threads: threads that decode image files; 0: one for each core.

    Raises:
      ValueError: a value out of range.
    """
    if num_threads < 0:
      raise ValueError(f"num_threads must be 0 or more, got {num_threads}.")
    self._source = source
    self._index, self._mask = _eval_rows(
      len(source), batch_size, process_index, process_count
    )
    self._num_threads = num_threads or len(os.sched_getaffinity(0))
    self.skipped = Skipped()

  def __len__(self) -> int:
    return len(self._index)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    if isinstance(self._source, Source):
      for index, mask in zip(self._index, self._mask):
        yield _gather(self._source, index, mask)
    else:
      yield from self._decoded(self._source)

  def _decoded(self, source: EncodedSource) -> Iterator[dict[str, np.ndarray]]:
    def decode(image: np.ndarray, i: int) -> None:
      where = source.describe(i)
      image[:] = images.evaluate_crop(
        images.load(source.read_bytes(i), where),
        size=source.image_size,
        resize=source.resize,
      )

    in_a_row = 0
    pool = concurrent.futures.ThreadPoolExecutor(self._num_threads)
    ahead: collections.deque = collections.deque()
    try:
      for number in range(len(self) + self._AHEAD):
        if number < len(self):
          index, mask = self._index[number].copy(), self._mask[number].copy()
          image = np.zeros((len(index), *source.image_shape), np.uint8)
          work = [
            (row, pool.submit(decode, image[row], int(index[row])))
            for row in np.flatnonzero(mask)
          ]
          ahead.append((image, index, mask, work))
        if number < self._AHEAD:
          continue
        image, index, mask, work = ahead.popleft()
        for row, future in work:
          try:
            future.result()
            in_a_row = 0
          except images.BadImageError as error:
            if source.on_bad_image != "skip":
              raise
            self.skipped.add(int(index[row]), str(error))
            mask[row], index[row], image[row] = False, 0, 0
            in_a_row += 1
            check_in_a_row(source, in_a_row, str(error))
        label = np.where(mask, source.labels[index], 0).astype(np.int32)
        yield {"image": image, "label": label, "index": index, "mask": mask}
    finally:
      pool.shutdown(cancel_futures=True)
