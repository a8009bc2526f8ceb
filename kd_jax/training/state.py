"""TrainState: everything that training changes, as arrays and nothing else."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from kd_jax import distillers
from kd_jax.distributed import collectives


class TrainState(struct.PyTreeNode):
  """The state of one training run, or of several at once: see `join`.

  Attributes:
    step: int32 scalar, the number of optimiser updates made.
    params: `{"student": ..., "distiller": ...}`, what the gradient is taken of.
    collections: the same two keys; every other collection of the two modules
      (`batch_stats`, `memory`).
    opt_state: the optimiser's state.
  """

  step: jax.Array
  params: Any
  collections: Any
  opt_state: optax.OptState

  def variables(self, module: str) -> dict[str, Any]:
    """All variables of `"student"` or `"distiller"`, for `apply`."""
    return {"params": self.params[module], **self.collections[module]}


def split_params(variables: Any) -> tuple[Any, dict[str, Any]]:
  """Parts `module.init`'s result into its parameters and the rest."""
  rest = {k: v for k, v in variables.items() if k != "params"}
  return variables.get("params", {}), rest


def create(
  student_variables: Any,
  distiller_variables: Any,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """A fresh state at step 0."""
  student_params, student_rest = split_params(student_variables)
  distiller_params, distiller_rest = split_params(distiller_variables)
  params = {"student": student_params, "distiller": distiller_params}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    collections={"student": student_rest, "distiller": distiller_rest},
    opt_state=optimizer.init(params),
  )


def join(states: Sequence[TrainState]) -> TrainState:
  """Makes one state of those of several trials at the same step.

  Args:
    states: of arrays, or of anything that belongs to them.

  Returns:
    The only one, or a state of the first's `step` and tuples of all else.
  """
  if len(states) == 1:
    return states[0]
  return TrainState(
    step=states[0].step,
    params=tuple(state.params for state in states),
    collections=tuple(state.collections for state in states),
    opt_state=tuple(state.opt_state for state in states),
  )


def part(state: TrainState, count: int) -> list[TrainState]:
  """The states of `count` trials, of which `join` has made one."""
  if count == 1:
    return [state]
  return [
    TrainState(state.step, *parts)
    for parts in zip(
      state.params, state.collections, state.opt_state, strict=True
    )
  ]


_log = logging.getLogger(__name__)


def state_specs(
  state: TrainState, distiller: distillers.Distiller
) -> TrainState:
  """Which arrays of a state are split over the devices, for `place`.

  Args:
    state: of arrays.
    distiller: whose `memory_rows` they are.

  Returns:
    The state with a spec for every array.
  """

  def spec(path, _):
    place = [jax.tree_util.keystr((key,), simple=True) for key in path]
    memory = place[:3] == ["collections", "distiller", "memory"]
    split = memory and place[-1] in distiller.memory_rows
    return P(collectives.AXIS) if split else P()

  return jax.tree_util.tree_map_with_path(spec, state)
