import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def test_one_map_needs_no_list(numpy_losses):
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
  expected = numpy_losses["at"]([a.astype(float)], [b.astype(float)])
  value = losses.at_loss(jnp.asarray(a), jnp.asarray(b))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
