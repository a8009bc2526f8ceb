"""TrainState: everything that training changes, as arrays and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from kd_jax import distillers
from kd_jax.distributed import collectives


class TrainState(struct.PyTreeNode):
  """The state of one training run.

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


def state_specs(
  state: TrainState, distiller: distillers.Distiller
) -> TrainState:
  """Say which arrays of a state are split over the devices, for `place`.

  Args:
    state: of arrays.
    distiller: whose `memory_rows` they are.

  Returns:
    The state with a spec for every array.
  """

  def spec(path: Any, _: Any) -> P:
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    memory = names[:3] == ["collections", "distiller", "memory"]
    split = memory and "/".join(names[3:]) in distiller.memory_rows
    return P(collectives.AXIS) if split else P()

  specs: TrainState = jax.tree_util.tree_map_with_path(spec, state)
  return specs
