import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses
from kd_jax.models.layers import ModelOutputs

S, T = 3 * normal(0, 4, 7), 3 * normal(1, 4, 7)


def strong_views(inputs, case):
  student, teacher = (
    ModelOutputs(inputs.tensor(f"logits_{side}_strong"), {}) for side in "st"
  )
  return {"strong_student": student, "strong_teachers": (teacher,)}


METHOD = Method(
  losses={
    "mlkd_loss": LossCase(
      (S, T),
      kwargs={"temperature": 4.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T),
      per_example=False,
    )
  },
  small={"other_temperatures": (3.0,)},
  fields={"other_temperatures": (3.0, 5.0)},
  weights={"ce": 0.1, "kd": 0, "mlkd": 0.9},
  optim={"learning_rate": 0.025},
  relational=True,
  golden=(
    Golden(
      r"mlkd(_lskd)?",
      lambda case: {
        "temperature": case["temperatures"][0],
        "other_temperatures": tuple(case["temperatures"][1:]),
        "standardize": case["kd_weight"] == 9,
      },
      weights=lambda case: {
        "ce": case["ce_weight"],
        "mlkd": case["kd_weight"],
      },
      batch=strong_views,
    ),
  ),
  curves=(Curve("mlkd", folder="train_2", also={"ce": 0.1, "mlkd": 0.9}),),
)


@pytest.mark.parametrize("part", ["instance", "batch", "class"])
def test_parts(golden_inputs, part):
  ((_, case),) = golden_inputs.cases(f"mlkd_{part}")
  parts = ("instance", "batch", "classes")
  weights = {name: float(name.startswith(part)) for name in parts}
  value, gradient = jax.value_and_grad(losses.mlkd_loss)(
    *map(golden_inputs.tensor, ("logits_s", "logits_t")),
    temperature=case["temperatures"][0],
    other_temperatures=case["temperatures"][1:],
    **weights,
  )
  np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
  golden_inputs.assert_gradient(gradient, case["grad"]["logits_s"], part)


def test_gradient_of_the_strong_view(golden_inputs, tiny):
  ((_, case),) = golden_inputs.cases("mlkd")
  student, teacher = (
    ModelOutputs(golden_inputs.tensor(f"logits_{side}"), {}) for side in "st"
  )
  module = tiny.create(
    "mlkd", other_temperatures=tuple(case["temperatures"][1:])
  )

  def total(logits):
    views = strong_views(golden_inputs, case)
    views["strong_student"] = ModelOutputs(logits, {})
    batch = {"label": golden_inputs.labels(case), **views}
    output = module.apply({}, **tiny.given(student, teacher, batch))
    means = {name: jnp.mean(term) for name, term in output.terms.items()}
    return 0.1 * means["ce"] + 0.9 * means["mlkd"]

  gradient = jax.jit(jax.grad(total))(golden_inputs.tensor("logits_s_strong"))
  golden_inputs.assert_gradient(gradient, case["grad"]["logits_s_strong"], "")


def test_training_needs_the_strong_view(tiny):
  module, given = tiny.create("mlkd"), tiny.given()
  batch = {"label": given["batch"]["label"]}
  with pytest.raises(ValueError, match=r"strong view .* got none"):
    module.apply({}, **{**given, "batch": batch})
  evaluated = module.apply({}, **{**given, "batch": batch, "train": False})
  assert set(evaluated.terms) == {"ce", "kd"}


@pytest.mark.parametrize(
  ("name", "value"), [("instance", -1.0), ("other_temperatures", (2.0, 0.0))]
)
def test_numbers_out_of_range(name, value):
  with pytest.raises(ValueError, match=f"{name}: expected"):
    losses.mlkd_loss(S, T, temperature=4.0, **{name: value})
