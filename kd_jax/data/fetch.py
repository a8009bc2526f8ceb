"""One batch of training by its number, on the host; pickles, for workers.

Shuffling and cropping are functions of (seed, epoch, position) alone, so that
any process or thread can make any batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from kd_jax.data import images
from kd_jax.data.batch import BatchPlan
from kd_jax.data.common import EncodedSource, Source
from kd_jax.data.skipped import check_in_a_row

# Sets the crops' generators apart from the orders'.
_CROP = 1


# Two epochs: prefetching threads are in the next one before this one ends.
@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The permutation of an epoch, int32 [num_examples]."""
  rng = np.random.default_rng((seed, epoch))
  return rng.permutation(num_examples).astype(np.int32)


def positions(plan: BatchPlan, step: int) -> np.ndarray:
  """This process's share of step `step`'s batch: int32 [B], its own copy."""
  epoch, number = divmod(step, plan.steps_per_epoch)
  start = number * plan.batch_size + plan.local_start
  stop = start + plan.local_size
  if not plan.shuffle:
    return np.arange(start, stop, dtype=np.int32)
  return _epoch_order(plan.seed, epoch, plan.num_examples)[start:stop].copy()


def crop_generator(seed: int, epoch: int, i: int) -> np.random.Generator:
  """What the crop of image `i` is drawn from in an epoch."""
  return np.random.default_rng((seed, epoch, i, _CROP))


def first_readable(
  source: EncodedSource,
  i: int,
  read: Callable[[int], Any],
  skipped: list[tuple[int, str]],
) -> tuple[int, Any]:
  """Reads image `i`, or the next of the set that can be decoded.

  Args:
    source: the set.
    i: position in it.
    read: of a position; raises BadImageError.
    skipped: takes up a (position, reason) for each that cannot be decoded.

  Returns:
    The position of what was read, and what `read` returned.

  Raises:
    BadImageError: `i` cannot be decoded and the source says "error", or too
      many in a row cannot.
    UnreadableError: a file is gone or cannot be read.
  """
  bad = 0
  while True:
    j = (i + bad) % len(source)
    try:
      return j, read(j)
    except images.BadImageError as error:
      if source.on_bad_image != "skip":
        raise
      skipped.append((j, str(error)))
      bad += 1
      check_in_a_row(source, bad, str(error))


@dataclasses.dataclass(frozen=True)
class FromMemory:
  """Gathers a batch from a set in memory, with one copy of its images."""

  plan: BatchPlan
  source: Source

  def __call__(self, step: int) -> dict[str, Any]:
    """The batch of step `step`: image, label, index, mask, and no skips."""
    index = positions(self.plan, step)
    return {
      "image": self.source.images.take(index, axis=0),
      "label": self.source.labels.take(index),
      "index": index,
      "mask": np.ones(index.shape, bool),
      "skipped": (),
    }


@dataclasses.dataclass(frozen=True)
class FromFiles:
  """Decodes a batch and cuts a random crop from each image.

  Attributes:
    plan: the order.
    source: the set.
    area: of a crop, least and largest share of the picture.
    aspect: of a crop, least and largest width / height.
  """

  plan: BatchPlan
  source: EncodedSource
  area: tuple[float, float]
  aspect: tuple[float, float]

  def __call__(self, step: int) -> dict[str, Any]:
    """The batch of step `step`: image, label, index, mask, skipped.

    `skipped` has a (position, reason) for each image that cannot be decoded,
    if the source says "skip". In its place stands the next image of the set
    that can be: the same one in every run, on any number of processes.

    Raises:
      BadImageError: an image cannot be decoded and the source says "error", or
        too many in a row cannot.
      UnreadableError: a file is gone or cannot be read.
    """
    index = positions(self.plan, step)
    image = np.empty((len(index), *self.source.image_shape), np.uint8)
    epoch = step // self.plan.steps_per_epoch
    skipped: list[tuple[int, str]] = []
    for row, i in enumerate(index.tolist()):
      index[row] = self._read(epoch, i, image[row], skipped)
    return {
      "image": image,
      "label": self.source.labels.take(index),
      "index": index,
      "mask": np.ones(index.shape, bool),
      "skipped": tuple(skipped),
    }

  def _read(
    self, epoch: int, i: int, out: np.ndarray, skipped: list[tuple[int, str]]
  ) -> int:
    """Fills `out` from image `i` or the next that is good; its position."""

    def read(j: int) -> None:
      out[:] = images.load_random_resized_crop(
        self.source.read_bytes(j),
        self.source.describe(j),
        crop_generator(self.plan.seed, epoch, j),
        size=self.source.image_size,
        area=self.area,
        aspect=self.aspect,
      )

    return first_readable(self.source, i, read, skipped)[0]
