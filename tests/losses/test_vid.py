import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def test_the_best_variance_is_the_mean_squared_error():
  """d loss / d v = 0 at v = E (mu - t)^2, as for any Gaussian."""
  rng = np.random.default_rng(0)
  mean, target = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
  best = jnp.asarray(((mean - target) ** 2).mean((0, 1, 2)))

  def loss(variance):
    return jnp.mean(
      losses.vid_loss(jnp.asarray(mean), variance, jnp.asarray(target))
    )

  np.testing.assert_allclose(jax.grad(loss)(best), 0.0, atol=1e-6)
  assert loss(best) < loss(1.1 * best)


def test_variance_is_positive():
  variance = losses.vid_variance(jnp.array([-1e4, 0.0, 1e4]))
  np.testing.assert_allclose(variance, [1e-5, np.log(2) + 1e-5, 1e4], rtol=1e-6)
