import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "ctkd_loss": LossCase(
      (S, T, np.float32(1.0)),
      kwargs={"start": 1.0, "span": 2.0},
      refused={"start": (0.0, -1.0), "span": (-1.0,)},
      trained=(0, 1, 2),
      minimum=(T, T, np.float32(1.0)),
    )
  },
  fields={"start": 10.0, "span": 2.0, "reversal_epochs": None},
  weights={"ce": 0.1, "kd": 0, "ctkd": 0.9},
  golden=(
    Golden("ctkd", lambda case: {}),
    Golden("ctkd_lskd", lambda case: {"standardize": True}),
  ),
  curves=(Curve("ctkd", folder="train_2"),),
)


def test_the_gradient_turns_round(golden):
  schedules = json.loads((golden / "losses_2.json").read_text())["schedules"]
  for epoch, factor in schedules["ctkd_gradient_scale"].items():
    value, gradient = jax.value_and_grad(
      lambda x, e=int(epoch): 3 * losses.reversed_gradient(x, e, epochs=10)
    )(2.0)
    assert value == 6.0
    np.testing.assert_allclose(gradient, 3 * factor, rtol=1e-5)


@pytest.mark.parametrize("name", ["ctkd", "ctkd_lskd"])
def test_the_temperatures_gradient(golden_inputs, name):
  """In the fifth epoch, whose factor is -0.5."""
  ((_, case),) = golden_inputs.cases(name)
  logits = [golden_inputs.tensor(f"logits_{side}") for side in "st"]
  if name == "ctkd_lskd":
    logits = [losses.standardize_logits(z) for z in logits]

  def loss(theta):
    theta = losses.reversed_gradient(theta, 5, epochs=10)
    return jnp.mean(losses.ctkd_loss(*logits, theta, start=1.0, span=20.0))

  (expected,) = case["grad"]["ctkd_theta"]["probe"]
  np.testing.assert_allclose(jax.grad(loss)(1.0), expected, rtol=1e-3)
