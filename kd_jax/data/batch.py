"""The contract of the training pipelines, and how they cut batches."""

import abc
import dataclasses
from typing import Any

import jax

from kd_jax.data.skipped import Skipped

Batch = dict[str, jax.Array]


class Pipeline(abc.ABC):
  """An endless, resumable stream of training batches.

  A batch is a dict of `image` uint8 [B, H, W, C], `label` int32 [B], `index`
  int32 [B] (position in the training set) and `mask` bool [B] (true: a real
  example; in training always). B is this process's share of the global batch.
  An epoch drops its remainder. The order is a function of (seed, epoch) and the
  same for any number of processes; DALI's also depends on their number.

  A training step computes `batch = load(resident, x)`, where `x` is one row of
  a chunk from `next_chunk`; under jit, `resident` is an argument. The position
  is the number of the next step.

  Attributes:
    skipped: the images that this process could not decode and left out.
  """

  def __init__(self, plan: "BatchPlan"):
    """Starts at step 0."""
    self._plan = plan
    self._step = 0
    self.skipped = Skipped()

  @property
  def steps_per_epoch(self) -> int:
    """Number of global batches in an epoch."""
    return self._plan.steps_per_epoch

  @property
  def resident(self) -> Any:
    """Pytree of device arrays that `load` reads from; {} if none."""
    return {}

  @property
  def step(self) -> int:
    """Number of the next step, counted from 0."""
    return self._step

  @property
  def epoch(self) -> int:
    """Epoch of the next step, counted from 0."""
    return self._step // self.steps_per_epoch

  @abc.abstractmethod
  def next_chunk(self, k: int) -> Any:
    """Returns the next `k` steps' inputs: a pytree with leaves [k, B, ...].

    Raises:
      ValueError: `k` steps would cross the end of the epoch. As with any other
        error, the position stays.
    """

  @staticmethod
  def load(resident: Any, x: Any) -> Batch:
    """Makes a step's batch from its row of a chunk; pure, works under jit."""
    del resident
    return x

  def get_state(self) -> dict[str, Any]:
    """Returns the position, as a dict that JSON can hold.

    All processes call it together: a pipeline may gather their states.
    """
    return {**self._plan.identity(), "step": self._step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes exactly to a position of `get_state`.

    Raises:
      ValueError: the state has another order (seed, batch size, ...).
    """
    self._plan.check_identity(state)
    self.close()
    self._step = int(state["step"])

  @abc.abstractmethod
  def close(self) -> None:
    """Ends threads and processes; the next chunk starts them again."""


def local_batch_size(
  batch_size: int, process_index: int, process_count: int
) -> int:
  """Checks a global batch size and returns this process's share of it."""
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      "batch_size counts the examples of all processes: expected a multiple"
      f" of the {process_count} processes, got {batch_size}."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index must be in 0..{process_count - 1}, got {process_index}."
    )
  return batch_size // process_count


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """How a training set is cut into global batches and each process's shares.

  Each process takes a contiguous part of every global batch; side by side, the
  parts are the batch that one process alone would have.

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
    local_batch_size(self.batch_size, self.process_index, self.process_count)
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
    """Number of examples of a batch that this process takes."""
    return self.batch_size // self.process_count

  @property
  def local_start(self) -> int:
    """Start of this process's share in a global batch."""
    return self.process_index * self.local_size

  def check_chunk(self, step: int, k: int) -> None:
    """Raises ValueError unless steps [step, step + k) lie in one epoch."""
    left = self.steps_per_epoch - step % self.steps_per_epoch
    if not 1 <= k <= left:
      raise ValueError(
        f"A chunk must not cross the end of an epoch: expected k in 1..{left}"
        f" ({left} of {self.steps_per_epoch} steps are left), got {k}."
      )

  def identity(self) -> dict[str, Any]:
    """Returns the settings that a saved position depends on."""
    return {
      "pipeline": self.pipeline,
      "num_examples": self.num_examples,
      "batch_size": self.batch_size,
      "seed": self.seed,
      "shuffle": self.shuffle,
    }

  def check_identity(self, state: dict[str, Any]) -> None:
    """Raises ValueError if `state` was saved with other settings."""
    for key, expected in self.identity().items():
      if state.get(key) != expected:
        raise ValueError(
          f"The saved data position has another order: expected {key}"
          f" {expected!r} (this run), got {state.get(key)!r} (saved). Restore"
          " the setting, or start in a new workdir."
        )
