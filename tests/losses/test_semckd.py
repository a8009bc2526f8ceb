import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def test_attention(numpy_losses):
  rng = np.random.default_rng(0)
  queries, keys = rng.standard_normal((3, 2, 5)), rng.standard_normal((3, 4, 5))
  for soft in (1.0, 0.3):
    expected = numpy_losses["semckd_attention"](queries, keys, soft)
    value = losses.semckd_attention(
      jnp.asarray(queries, jnp.float32),
      jnp.asarray(keys, jnp.float32),
      soft=soft,
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(value.sum(-1), 1.0, rtol=1e-6)
