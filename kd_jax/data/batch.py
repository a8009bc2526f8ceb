"""What the input pipelines share: the contract, the plan and evaluation."""

import abc
import collections
import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from kd_jax.data import images
from kd_jax.data.folder import EncodedSource
from kd_jax.data.sources import Source

_log = logging.getLogger(__name__)

Batch = dict[str, jax.Array]

# Bad images in a row after which the data are taken to be gone.
_MOST_SKIPPED = 100


class Pipeline(abc.ABC):
  """An endless, resumable stream of training batches.

  A batch is a dict of `image` uint8 [B, H, W, C], `label` int32 [B], `index`
  int32 [B] (position in the training set) and `mask` bool [B] (true: a real
  example, in training all are). B is this process's share of the global
  batch. The order is a function of (seed, epoch) only, and the same for any
  number of processes; an epoch drops its remainder.

  One step of training is `batch = load(resident, x)`, where `x` is one row of
  what `next_chunk` returned; under jit, `resident` is an argument. The position
  is the number of the next step.

  Attributes:
    skipped: the images that this process could not decode.
  """

  def __init__(self, plan: "BatchPlan"):
    """Begins with the first step."""
    self._plan = plan
    self._step = 0
    self.skipped = Skipped()

  @property
  def steps_per_epoch(self) -> int:
    """Global batches in an epoch."""
    return self._plan.steps_per_epoch

  @property
  def resident(self) -> Any:
    """Pytree of device arrays that `load` reads from, {} if none."""
    return {}

  @property
  def step(self) -> int:
    """Steps handed out since the first epoch's start."""
    return self._step

  @property
  def epoch(self) -> int:
    """The epoch of the next step, counted from 0."""
    return self._step // self.steps_per_epoch

  @abc.abstractmethod
  def next_chunk(self, k: int) -> Any:
    """The next `k` steps' inputs: a pytree with leaves [k, B, ...].

    Raises:
      ValueError: `k` steps would cross the end of the epoch. As with any other
        error, the position stays.
    """

  @staticmethod
  def load(resident: Any, x: Any) -> Batch:
    """One step's batch from its row of a chunk; pure, works under jit."""
    del resident
    return x

  def get_state(self) -> dict[str, Any]:
    """The position, as a dict that JSON can hold."""
    return {**self._plan.identity(), "step": self._step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position of `get_state`, exactly.

    Raises:
      ValueError: the state is of another order (seed, batch size, ...).
    """
    self._plan.check_identity(state)
    self.close()
    self._step = int(state["step"])

  @abc.abstractmethod
  def close(self) -> None:
    """Ends threads and processes; the next chunk would start them again."""


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size is the global one: expected a multiple of the"
      f" {process_count} processes, got {batch_size}."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index must be in 0..{process_count - 1}, got {process_index}."
    )
  return batch_size // process_count


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """How a training set is cut into global batches and shared out.

  Every process takes its contiguous share of every global batch, so that the
  shares, put side by side, are the batch that one process would have.

  Attributes:
    pipeline: name of the pipeline, which decides the order.
    num_examples: in the training set.
    batch_size: global, in examples.
    seed: of the order, 0 or more.
    process_index: this process.
    process_count: of all processes.
    shuffle: whether epochs are permuted.
  """

  pipeline: str
  num_examples: int
  batch_size: int
  seed: int
  process_index: int = 0
  process_count: int = 1
  shuffle: bool = True

  def __post_init__(self):
    _local_size(self.batch_size, self.process_index, self.process_count)
    if self.batch_size > self.num_examples:
      raise ValueError(
        f"batch_size {self.batch_size} is more than the {self.num_examples}"
        " examples of the training set, and training drops an incomplete"
        f" batch. Use at most {self.num_examples}."
      )
    if self.seed < 0:
      raise ValueError(f"seed must be 0 or more, got {self.seed}.")

  @property
  def steps_per_epoch(self) -> int:
    """Global batches in an epoch; the remainder is dropped."""
    return self.num_examples // self.batch_size

  @property
  def local_size(self) -> int:
    """Examples of a batch that this process takes."""
    return self.batch_size // self.process_count

  @property
  def local_start(self) -> int:
    """Where this process's share of a global batch begins."""
    return self.process_index * self.local_size

  def check_chunk(self, step: int, k: int) -> None:
    """Raises ValueError unless steps [step, step + k) are of one epoch."""
    left = self.steps_per_epoch - step % self.steps_per_epoch
    if not 1 <= k <= left:
      raise ValueError(
        f"A chunk must not cross the end of an epoch: expected k in 1..{left}"
        f" ({left} of {self.steps_per_epoch} steps are left), got {k}."
      )

  def identity(self) -> dict[str, Any]:
    """What a saved position is only valid with."""
    return {
      "pipeline": self.pipeline,
      "num_examples": self.num_examples,
      "batch_size": self.batch_size,
      "seed": self.seed,
      "shuffle": self.shuffle,
    }

  def check_identity(self, state: dict[str, Any]) -> None:
    """Raises ValueError if `state` was saved under another order."""
    for key, expected in self.identity().items():
      if state.get(key) != expected:
        raise ValueError(
          f"The saved data position is of another order: expected {key}"
          f" {expected!r} (this run), got {state.get(key)!r} (saved). Restore"
          " the setting, or start in a new workdir."
        )


class Skipped:
  """The images that a run left out as bad, each once.

  A process finds its own, and takes over what others, or it before a restart,
  have found.
  """

  def __init__(self):
    self._found: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._found)

  def add(self, index: int, reason: str) -> None:
    """Lists an image, and logs it the first time.

    Args:
      index: its position in the set.
      reason: a text that names the file.
    """
    if index not in self._found:
      self._found[index] = reason
      _log.warning("Left out (%d so far): %s", len(self._found), reason)

  def reasons(self) -> list[str]:
    """What was said of each, in the order of the set."""
    return [self._found[index] for index in sorted(self._found)]

  def get_state(self) -> dict[str, str]:
    """What was said of each, by its position: a dict that JSON can hold."""
    return {str(index): reason for index, reason in self._found.items()}

  def unite(self, state: dict[str, str]) -> None:
    """Lists also what is in a state of `get_state`, each image once."""
    for index, reason in state.items():
      self._found.setdefault(int(index), reason)


def require_some(source: EncodedSource, in_a_row: int, last: str) -> None:
  """Refuses to go on leaving out images when so many in a row are bad.

  Args:
    source: the set.
    in_a_row: how many have been.
    last: what was said of the last of them.

  Raises:
    BadImageError: they are too many.
  """
  if in_a_row >= min(len(source), _MOST_SKIPPED):
    raise images.BadImageError(
      f"{in_a_row} images in a row cannot be decoded; the last: {last}. Check"
      " that the data are still whole."
    )


def _eval_rows(
  count: int, batch_size: int, process_index: int, process_count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Positions [n, B] (0 where there is none), and whether there is one."""
  local = _local_size(batch_size, process_index, process_count)
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
  """Cuts a set in memory into padded batches, every example in one of them.

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
  """Padded batches of a set, one at a time; every example in one of them.

  Iterating yields dicts of `image` uint8 [B, H, W, C], `label` int32 [B],
  `index` int32 [B] and `mask` bool [B], as `eval_batches` stacks them; `len` is
  their number, the same on every process. Image files are decoded and cropped
  by threads, two batches ahead. One that cannot be decoded is an error, or,
  where the source says "skip", has a false mask and is listed in `skipped`;
  too many in a row are an error in any case, as is a file that is gone.
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
      num_threads: that decode image files; 0: one for each core.

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
    self._in_a_row = 0

  def __len__(self) -> int:
    return len(self._index)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    self._in_a_row = 0
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

    pool = concurrent.futures.ThreadPoolExecutor(self._num_threads)
    ahead: collections.deque = collections.deque()
    try:
      for number in range(len(self) + self._AHEAD):
        if number < len(self):
          index = self._index[number]
          image = np.zeros((len(index), *source.image_shape), np.uint8)
          work = [
            (row, pool.submit(decode, image[row], int(index[row])))
            for row in np.flatnonzero(self._mask[number])
          ]
          ahead.append((number, image, work))
        if number >= self._AHEAD:
          yield self._finish(source, *ahead.popleft())
    finally:
      pool.shutdown(cancel_futures=True)

  def _finish(
    self,
    source: EncodedSource,
    number: int,
    image: np.ndarray,
    work: list[tuple[int, concurrent.futures.Future]],
  ) -> dict[str, np.ndarray]:
    index, mask = self._index[number].copy(), self._mask[number].copy()
    skipped: list[tuple[int, str]] = []
    for row, future in work:
      try:
        future.result()
      except images.BadImageError as error:
        if source.on_bad_image != "skip":
          raise
        skipped.append((int(index[row]), str(error)))
        mask[row], index[row], image[row] = False, 0, 0
    self._leave_out(source, number, mask, skipped)
    label = np.where(mask, source.labels[index], 0).astype(np.int32)
    return {"image": image, "label": label, "index": index, "mask": mask}

  def _leave_out(
    self,
    source: EncodedSource,
    number: int,
    mask: np.ndarray,
    skipped: Iterable[tuple[int, str]],
  ) -> None:
    """Lists what batch `number` lacks.

    Args:
      source: the set.
      number: of the batch.
      mask: bool [B], false also where an image is left out.
      skipped: a (position, reason) for each of these, in their order.

    Raises:
      BadImageError: too many in a row are left out.
    """
    bad = iter(skipped)
    for good in mask[self._mask[number]]:
      if good:
        self._in_a_row = 0
        continue
      index, reason = next(bad)
      self.skipped.add(index, reason)
      self._in_a_row += 1
      require_some(source, self._in_a_row, reason)
