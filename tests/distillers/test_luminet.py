import numpy as np
from method_cases import Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "luminet_loss": LossCase(
      (S, T),
      kwargs={"temperature": 4.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T),
      per_example=False,
    )
  },
  weights={"ce": 2, "kd": 0, "luminet": 1089},
  relational=True,
  golden=(
    Golden(
      "luminet",
      lambda case: {"temperature": case["temperature"]},
      weights=lambda case: {"luminet": case["alpha"] ** 2},
    ),
  ),
)


def test_a_classs_scale_and_offset_do_not_count():
  moved = S * np.float32([1, 2, 3, 4, 5, 6, 7]) + np.float32(
    [7, 0, 0, 1, 2, 3, 4]
  )
  plain, other = (
    losses.luminet_loss(s, T, temperature=2.0) for s in (S, moved)
  )
  np.testing.assert_allclose(plain, other, rtol=1e-4)
