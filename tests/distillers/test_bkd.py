import jax
import numpy as np
from method_cases import Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={"bkd_loss": LossCase((S, T))},
  weights={"ce": 1, "kd": 0, "bkd": 1},
  golden=(Golden("bkd"),),
)


def test_the_minimum_is_the_teachers_probability():
  p = jax.nn.softmax(T)
  best = np.log(p) - np.log1p(-p)
  gradient = jax.grad(lambda s: losses.bkd_loss(s, T).sum())(best)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
