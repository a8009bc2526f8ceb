"""Training batches on the host, each made from the number of its step.

Order and crops are functions of (seed, epoch, position), so any process or
thread can make any batch. The classes pickle, for worker processes.
"""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from kd_jax.data import images
from kd_jax.data.batch import BatchPlan
from kd_jax.data.common import EncodedSource, Source
from kd_jax.data.skipped import check_in_a_row

# Separates the generators of the crops from those of the orders.
_CROP = 1


# Two epochs, because threads prefetch across the end of one.
@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The permutation of an epoch, int32 [num_examples]."""
  rng = np.random.default_rng((seed, epoch))
  return rng.permutation(num_examples).astype(np.int32)


def _positions(plan: BatchPlan, step: int) -> np.ndarray:
  """This process's share of a step's batch: int32 [B], a copy of its own."""
  epoch, number = divmod(step, plan.steps_per_epoch)
  start = number * plan.batch_size + plan.local_start
  stop = start + plan.local_size
  if not plan.shuffle:
    return np.arange(start, stop, dtype=np.int32)
  return _epoch_order(plan.seed, epoch, plan.num_examples)[start:stop].copy()


@dataclasses.dataclass(frozen=True)
class FromMemory:
  """Gathers a batch from a set in memory."""

  plan: BatchPlan
  source: Source

  def __call__(self, step: int) -> dict[str, Any]:
    """Returns the batch of a step: image, label, index, mask, no skips."""
    index = _positions(self.plan, step)
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
    area: least and largest share of the picture that a crop takes.
    aspect: least and largest width / height of a crop.
  """

  plan: BatchPlan
  source: EncodedSource
  area: tuple[float, float]
  aspect: tuple[float, float]

  def __call__(self, step: int) -> dict[str, Any]:
    """Returns the batch of a step: image, label, index, mask, skipped.

    `skipped` has a (position, reason) for each image that cannot be decoded,
    if the source says "skip". The next good image of the set replaces it: the
    same one in every run, on any number of processes.

    Raises:
      BadImageError: an image cannot be decoded and the source says "error", or
        too many in a row cannot.
      UnreadableError: a file is gone or cannot be read.
    """
    index = _positions(self.plan, step)
    image = np.empty((len(index), *self.source.image_shape), np.uint8)
    epoch = step // self.plan.steps_per_epoch
    skipped: list[tuple[int, str]] = []
    for row, i in enumerate(index.tolist()):
      for bad in itertools.count():
        position = (i + bad) % len(self.source)
        try:
          image[row] = self._crop(epoch, position)
          break
        except images.BadImageError as error:
          if self.source.on_bad_image != "skip":
            raise
          skipped.append((position, str(error)))
          check_in_a_row(self.source, bad + 1, str(error))
      index[row] = position
    return {
      "image": image,
      "label": self.source.labels.take(index),
      "index": index,
      "mask": np.ones(index.shape, bool),
      "skipped": tuple(skipped),
    }

  def _crop(self, epoch: int, i: int) -> np.ndarray:
    """The crop of image `i` in an epoch, uint8 [S, S, 3]."""
    return images.load_random_resized_crop(
      self.source.read_bytes(i),
      self.source.describe(i),
      np.random.default_rng((self.plan.seed, epoch, i, _CROP)),
      size=self.source.image_size,
      area=self.area,
      aspect=self.aspect,
    )
