import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 4, 4, 4, 3), normal(1, 4, 5, 5, 3)
METHOD = Method(
  losses={
    "sp_loss": LossCase(
      (S, T), minimum=(S, 2 * S), per_example=False, scale_free=True
    )
  },
  weights={"ce": 1, "kd": 1, "sp": 3000},
  relational=True,
  golden=(Golden("similarity"),),
  curves=(Curve("similarity"),),
)


@pytest.mark.parametrize("train", [True, False])
def test_it_reads_the_last_stages(tiny, make_output, train):
  """Evaluation needs no mapped axis."""
  axis = {} if train else {"axis_name": "devices", "sync": True}
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  module = tiny.create("sp", **axis)
  output, _ = tiny.apply(module, {}, teacher=teacher, train=train)
  expected = losses.sp_loss(
    tiny.student.features["stage2"], teacher.features["stage3"]
  )
  np.testing.assert_allclose(output.terms["sp"], expected, rtol=1e-5)
