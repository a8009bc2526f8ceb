import numpy as np
from method_cases import (
  STRAYING,
  Curve,
  Golden,
  LossCase,
  Method,
  normal,
  softmax,
)

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "dist_loss": LossCase(
      (S, T),
      kwargs={"temperature": 4.0, "beta": 1.0, "gamma": 1.5},
      refused={"temperature": (0.0, -1.0), "beta": (-1.0,), "gamma": (-1.0,)},
      per_example=False,
    )
  },
  fields={"beta": 2.0, "gamma": 2.0},
  weights={"ce": 1, "kd": 0, "dist": 2},
  relational=True,
  golden=(
    Golden(
      r"dist_(b2_g1_)?T\d",
      lambda case: {n: case[n] for n in ("temperature", "beta", "gamma")},
    ),
  ),
  curves=(Curve("dist", folder="train_2", tolerance=STRAYING),),
)


def test_the_weights_belong_to_rows_and_columns():
  p, q = softmax(S), softmax(T)
  for beta, gamma, (a, b) in ((1, 0, (p, q)), (0, 1, (p.T, q.T))):
    rho = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)]
    found = losses.dist_loss(S, T, temperature=1.0, beta=beta, gamma=gamma)
    np.testing.assert_allclose(found, 1 - np.mean(rho), rtol=1e-5)
