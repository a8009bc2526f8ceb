import functools

import jax
import numpy as np
from method_cases import Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
LABELS = np.array([0, 6, 2, 2], np.int32)
SETTINGS = {
  **{"temperature": 4.0, "confidence_temperature": 1.0},
  **{"alpha": 1.0, "beta": 8.0},
}
METHOD = Method(
  losses={
    "rld_loss": LossCase(
      (S, T, LABELS),
      kwargs=SETTINGS,
      refused={
        **{"temperature": (0.0,), "confidence_temperature": (0.0, -1.0)},
        **{"alpha": (-1.0,), "beta": (-1.0,)},
      },
      minimum=(T, T, np.argmax(T, 1).astype(np.int32)),
    )
  },
  fields={"alpha": 2.0, "beta": 4.0, "confidence_temperature": 2.0},
  weights={"ce": 1, "kd": 0, "rld": 1},
  golden=(
    Golden(
      "rld",
      lambda case: {
        **{n: case[n] for n in ("alpha", "beta", "temperature")},
        "confidence_temperature": case["alpha_temperature"],
      },
    ),
  ),
)


def test_a_wrong_order_is_not_taught():
  """Classes that the teacher puts above the label get no gradient of beta."""
  settings = {**SETTINGS, "alpha": 0.0}
  loss = functools.partial(losses.rld_loss, **settings)
  gradient = jax.jit(jax.grad(lambda s: loss(s, T, LABELS).sum()))(S)
  below = T[np.arange(4), LABELS][:, None] > T
  np.testing.assert_array_equal(np.asarray(gradient)[~below], 0.0)
  assert np.abs(np.asarray(gradient)[below]).max() > 0
  lowest = np.argmin(T, 1).astype(np.int32)
  np.testing.assert_array_equal(jax.jit(loss)(S, T, lowest), 0.0)
