import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "normkd_loss": LossCase(
      (S, T),
      kwargs={"temperature": 2.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T),
    )
  },
  fields={"alpha": None, "beta": None},
  weights={"ce": 0.1, "kd": 0, "normkd": 0.9},
  golden=(
    Golden(
      r"normkd_T\d", lambda case: {"temperature": case["temperature_norm"]}
    ),
    Golden(
      "normkd_dkd",
      lambda case: {
        "temperature": case["temperature_norm"],
        **{name: case[name] for name in ("alpha", "beta")},
      },
    ),
  ),
  curves=(
    Curve("normkd", lambda curves: {"temperature": 2.0}, folder="train_2"),
  ),
)


def test_the_scale_of_the_students_logits_does_not_count():
  plain, scaled = (
    losses.normkd_loss(s, T, temperature=2.0) for s in (S, 7 * S)
  )
  np.testing.assert_allclose(plain, scaled, rtol=1e-4)
