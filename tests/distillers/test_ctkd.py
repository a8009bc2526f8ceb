import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import distillers, losses

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
  fields={
    **{"start": 10.0, "span": 2.0, "reversal_epochs": None},
    **{"alpha": None, "beta": None},
  },
  weights={"ce": 0.1, "kd": 0, "ctkd": 0.9},
  golden=(
    Golden("ctkd", lambda case: {}),
    Golden("ctkd_lskd", lambda case: {"standardize": True}),
    Golden(
      "ctkd_dkd",
      lambda case: {name: case[name] for name in ("alpha", "beta")},
    ),
  ),
  curves=(Curve("ctkd", folder="train_2"),),
)


def test_the_gradient_turns_round(golden):
  schedules = json.loads((golden / "losses_2.json").read_text())["schedules"]
  grad = jax.jit(
    jax.value_and_grad(
      lambda x, epoch: 3 * losses.reversed_gradient(x, epoch, epochs=10)
    )
  )
  for epoch, factor in schedules["ctkd_gradient_scale"].items():
    value, gradient = grad(2.0, int(epoch))
    assert value == 6.0
    np.testing.assert_allclose(gradient, 3 * factor, rtol=1e-5)


@pytest.mark.parametrize("kind", METHOD.golden, ids=lambda kind: kind.pattern)
def test_the_temperatures_gradient(golden_inputs, kind):
  """In the fifth epoch, whose factor is -0.5."""
  ((_, case),) = golden_inputs.cases(kind.pattern)
  module = distillers.create("ctkd", **kind.fields(case))
  outputs = [golden_inputs.output("", side) for side in "st"]

  def loss(theta):
    output = module.apply(
      {"params": {"theta": theta}},
      *outputs,
      {"label": golden_inputs.labels(case)},
      **{"teacher_head": None, "step": 0, "epoch": 5, "train": True},
    )
    return jnp.mean(output.terms["ctkd"])

  (expected,) = case["grad"]["ctkd_theta"]["probe"]
  found = jax.jit(jax.grad(loss))(jnp.ones(()))
  np.testing.assert_allclose(found, expected, rtol=1e-3)
