import numpy as np
from method_cases import Golden, LossCase, Method, normal, softmax

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
SETTINGS = {
  **{"temperature": 4.0, "weight_temperature": 3.0},
  **{"alpha": 1.0, "beta": 2.0},
}
METHOD = Method(
  losses={
    "ikl_loss": LossCase(
      (S, T),
      kwargs=SETTINGS,
      refused={
        **{"temperature": (0.0,), "weight_temperature": (0.0, -1.0)},
        **{"alpha": (-1.0,), "beta": (-1.0,)},
      },
      huge=1e6,  # a fused division by 3 rounds otherwise than one that is not
    )
  },
  fields={"alpha": 2.0, "beta": 2.0, "weight_temperature": 2.0},
  weights={"ce": 1, "kd": 0, "ikl": 1},
  golden=(
    Golden(
      "ikl",
      lambda case: {
        **{n: case[n] for n in ("alpha", "beta", "temperature")},
        "weight_temperature": case["temperature2"],
      },
    ),
  ),
)


def test_all_pairs_of_classes():
  """The sum over pairs that the closed form stands for."""
  w, d = softmax(T / 3.0), T - S
  pairs = np.square(d[:, :, None] - d[:, None])
  expected = 0.25 * np.einsum("bi,bj,bij->b", w, w, pairs)
  found = losses.ikl_loss(S, T, **{**SETTINGS, "alpha": 0.0, "beta": 1.0})
  np.testing.assert_allclose(found, expected, rtol=1e-4)
