import jax
import jax.numpy as jnp
import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "kd_loss": LossCase(
      (S, T),
      kwargs={"temperature": 4.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T),
    )
  },
  fields={"temperature": 4.5},
  golden=(
    Golden(
      r"(kd|funmatch_kl)_T[\d.]+",
      lambda case: {"temperature": case["temperature"]},
    ),
  ),
  curve=Curve("kd"),
)


def test_gradient_is_the_difference_of_the_softened_predictions():
  """d/dz = T (softmax(z / T) - softmax(t / T)): Hinton et al., equation 2."""
  z, t = jnp.array([[1.0, 3.0, -2.0]]), jnp.array([[0.0, 1.0, 4.0]])
  gradient = jax.grad(lambda z: losses.kd_loss(z, t, temperature=5.0)[0])(z)
  expected = 5.0 * (jax.nn.softmax(z / 5.0) - jax.nn.softmax(t / 5.0))
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)
