import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def test_gradient_is_the_difference_of_the_softened_predictions():
  """d/dz = T (softmax(z / T) - softmax(t / T)): Hinton et al., equation 2."""
  z, t = jnp.array([[1.0, 3.0, -2.0]]), jnp.array([[0.0, 1.0, 4.0]])
  gradient = jax.grad(lambda z: losses.kd_loss(z, t, temperature=5.0)[0])(z)
  expected = 5.0 * (jax.nn.softmax(z / 5.0) - jax.nn.softmax(t / 5.0))
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_temperature_may_be_traced():
  z, t = jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]])
  value = jax.jit(lambda x: losses.kd_loss(z, t, temperature=x))(3.0)
  expected = losses.kd_loss(z, t, temperature=3.0)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
