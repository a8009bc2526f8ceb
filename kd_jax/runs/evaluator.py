"""Runs networks over a whole set of images, the test set as a rule."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kd_jax import data
from kd_jax.data.skipped import Skipped
from kd_jax.distributed import devices as devices_lib
from kd_jax.distributed import processes
from kd_jax.runs import programs
from kd_jax.training import metrics

Scores = dict[str, float]


class Evaluator:
  """Runs networks over a set of images, which is placed when first used.

  Attributes:
    skipped: the images that could not be decoded.
  """

  def __init__(
    self,
    source: data.Source | data.EncodedSource,
    devices: devices_lib.Devices,
    *,
    batch_size: int,
    pipeline: str,
    decoder: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str,
  ):
    """Cut the set into batches; it is placed when first used.

    Args:
      source: the set.
      devices: over which a batch is split.
      batch_size: images of a batch, rounded up to a multiple of the devices.
      pipeline: `config.data.pipeline`.
      decoder: `config.data.decoder`.
      mean: of the training images, per channel.
      std: likewise.
      dtype: of the networks' arithmetic.
    """
    self._devices = devices
    self._settings = {"mean": tuple(mean), "std": tuple(std), "dtype": dtype}
    count = devices.mesh.devices.size
    batch_size = math.ceil(min(batch_size, len(source.labels)) / count) * count
    share = {
      "process_index": jax.process_index(),
      "process_count": jax.process_count(),
    }
    self._stream: data.EvalStream | None = None
    self._chunks: list[Any] = []
    self._placed = False
    self.skipped = Skipped()
    if isinstance(source, data.EncodedSource):
      self._stream = data.eval_stream(
        source, batch_size, pipeline=pipeline, device=decoder, **share
      )
      self.skipped = self._stream.skipped
      return
    xs = data.eval_batches(source, batch_size, **share)
    count = len(xs["label"])
    size = 1 if jax.default_backend() == "cpu" else count
    for i in range(0, count, size):
      self._chunks.append({k: v[i : i + size] for k, v in xs.items()})

  def begin(
    self, eval_chunk: Callable[..., Any], variables: Any, teachers: Any
  ) -> Callable[[], Scores]:
    """Start evaluation; the caller may donate the variables afterwards.

    Args:
      eval_chunk: see `programs.Programs`.
      variables: {"student", "distiller"}.
      teachers: the teachers' variables.

    Returns:
      A function that waits for the scores: top1 and top5 in percent, ce.
    """
    sums: list[dict[str, Any]] = []
    for chunk in self._batches():
      sums.append(eval_chunk(variables, teachers, {}, chunk))
      if len(sums) > 1:  # one late: batches do not pile up on the device
        sums[-2] = jax.device_get(sums[-2])
    # A CPU has no queue: collectives of two programs in flight might meet.
    if jax.default_backend() == "cpu":
      jax.block_until_ready(sums)

    def scores() -> Scores:
      fetched = jax.device_get(sums)
      stacked = {k: np.stack([s[k] for s in fetched]) for k in fetched[0]}
      found: Scores = processes.broadcast(metrics.means(stacked))
      return found

    return scores

  def score(self, network: nn.Module, variables: Any) -> Scores:
    """Score a network alone, such as a teacher."""
    eval_chunk = programs.network_eval_chunk(
      network, devices=self._devices, **self._settings
    )
    return self.begin(eval_chunk, {"student": variables, "distiller": {}}, ())()

  def class_means(self, network: nn.Module, variables: Any) -> np.ndarray:
    """Average a network's pooled features over each class.

    Returns:
      [K, C] float32; zeros for a class without images.
    """
    chunk = programs.class_sums_chunk(
      network, devices=self._devices, **self._settings
    )
    sums, images = np.zeros((), np.float64), np.zeros((), np.float64)
    for batch in self._batches():
      found = jax.device_get(chunk(variables, (), {}, batch))
      sums, images = sums + found["pooled"], images + found["images"]
    return (sums / np.maximum(images, 1)[:, None]).astype(np.float32)

  def _batches(self) -> Iterable[Any]:
    """The set in chunks, on the devices."""
    if self._stream is not None:
      return (
        self._devices.shard({k: v[None] for k, v in batch.items()})
        for batch in self._stream
      )
    if not self._placed:
      self._chunks = [self._devices.shard(chunk) for chunk in self._chunks]
      self._placed = True
    return self._chunks
