"""TrainState: parts in, the same parts out."""

import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.training import state as state_lib


def test_parts_of_two_modules_stay_apart():
  student = {
    "params": {"fc": {"kernel": jnp.ones(2)}},
    "batch_stats": {"bn": {"mean": jnp.zeros(3)}},
  }
  distiller = {"memory": {"bank": jnp.full(4, 2.0)}}
  state = state_lib.create(student, distiller, optax.trace(0.9))
  assert state.step.dtype == jnp.int32 and int(state.step) == 0
  assert state.params == {"student": student["params"], "distiller": {}}
  assert state.collections == {
    "student": {"batch_stats": student["batch_stats"]},
    "distiller": distiller,
  }
  assert state.variables("student") == student
  assert state.variables("distiller") == {"params": {}, **distiller}
  # The optimiser sees parameters alone.
  np.testing.assert_array_equal(
    state.opt_state.trace["student"]["fc"]["kernel"], [0, 0]
  )
  assert state.opt_state.trace["distiller"] == {}


def test_a_module_without_variables():
  assert state_lib.split_params({}) == ({}, {})
