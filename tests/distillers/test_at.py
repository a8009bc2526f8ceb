import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

BIG, SMALL = normal(0, 4, 8, 8, 5), normal(1, 4, 4, 4, 3)
TEACHERS = [normal(2, 4, 4, 4, 3), normal(3, 4, 5, 5, 3)]
METHOD = Method(
  losses={
    "at_loss": LossCase(
      ([BIG, SMALL], TEACHERS),
      minimum=([BIG, SMALL], [2 * BIG, 3 * SMALL]),
      scale_free=True,
    )
  },
  weights={"ce": 1, "kd": 1, "at": 1000},
  golden=(Golden("attention"),),
  curves=(Curve("attention"),),
)


def test_one_map_needs_no_list():
  np.testing.assert_array_equal(
    losses.at_loss(BIG, TEACHERS[0]), losses.at_loss([BIG], TEACHERS[:1])
  )


def test_stages_are_paired_from_the_first(tiny, make_output):
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  output, _ = tiny.apply(tiny.create("at"), {}, teacher=teacher)
  expected = losses.at_loss(tiny.student.stages(), teacher.stages()[:2])
  np.testing.assert_allclose(output.terms["at"], expected, rtol=1e-6)
