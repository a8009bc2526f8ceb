import jax
import numpy as np
from method_cases import Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
LABELS = np.array([0, 6, 2, 2], np.int32)
METHOD = Method(
  losses={
    "wsld_loss": LossCase(
      (S, T, LABELS),
      kwargs={"temperature": 2.0},
      refused={"temperature": (0.0, -1.0)},
    )
  },
  weights={"ce": 1, "kd": 0, "wsld": 2.5},
  golden=(
    Golden(
      r"wsld_T\d",
      lambda case: {"temperature": case["temperature"]},
      weights=lambda case: {"wsld": case["alpha"]},
    ),
  ),
)


def test_what_the_student_knows_has_no_weight():
  """And what it knows as well as its teacher has 1 - 1 / e."""
  sure = 1e3 * np.eye(7, dtype=np.float32)[LABELS]
  np.testing.assert_array_equal(
    losses.wsld_loss(sure, T, LABELS, temperature=2.0), 0.0
  )
  p = jax.nn.softmax(T / 2.0)
  entropy = -(p * np.log(p)).sum(1)
  np.testing.assert_allclose(
    losses.wsld_loss(T, T, LABELS, temperature=2.0),
    4 * (1 - np.exp(-1)) * entropy,
    rtol=1e-5,
  )
