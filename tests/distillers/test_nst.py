import jax
import jax.numpy as jnp
import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

# The first pair has more channel pairs than squared positions, the second not.
BIG, SMALL = normal(0, 4, 4, 4, 20), normal(1, 4, 4, 4, 3)
TEACHERS = [normal(2, 4, 2, 2, 8), normal(3, 4, 5, 5, 4)]
METHOD = Method(
  losses={
    "nst_loss": LossCase(
      ([BIG, SMALL], TEACHERS),
      minimum=([BIG, SMALL], [2 * BIG, 3 * SMALL]),
      scale_free=True,
    )
  },
  weights={"ce": 1, "kd": 0, "nst": 50},
  golden=(Golden("nst_inner"),),
  curves=(
    Curve("nst", folder="train_2"),
    Curve("nst", folder="train_2", pair=0),
  ),
)


def test_golden_of_some_maps(golden_inputs):
  """The method itself compares all stages."""
  inputs = golden_inputs
  value_and_grad = jax.jit(
    jax.value_and_grad(lambda s, t: jnp.mean(losses.nst_loss(s, t)))
  )
  for pair, case in inputs.cases("nst"):
    students, teachers = (
      [inputs.tensor(f"{pair}/{side}/{name}") for name in case["grad"]]
      for side in "st"
    )
    value, gradients = value_and_grad(students, teachers)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    for gradient, (name, expected) in zip(gradients, case["grad"].items()):
      inputs.assert_gradient(gradient, expected, f"{pair} {name}")


def test_stages_are_paired_from_the_first(tiny, make_output):
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  output, _ = tiny.apply(tiny.create("nst"), {}, teacher=teacher)
  expected = losses.nst_loss(tiny.student.stages(), teacher.stages()[:2])
  np.testing.assert_allclose(output.terms["nst"], expected, rtol=1e-5)
