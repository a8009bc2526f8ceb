import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def test_no_smoothing_by_default(numpy_losses):
  logits = jnp.array([[2.0, -1.0, 0.5]])
  labels = jnp.array([1])
  expected = numpy_losses["cross_entropy"](np.asarray(logits, float), [1])
  value = losses.cross_entropy_loss(logits, labels)
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_label_beyond_the_classes_is_not_a_number():
  """Rather that than training on the last class without a word."""
  value = losses.cross_entropy_loss(jnp.zeros((2, 3)), jnp.array([2, 3]))
  assert np.isfinite(value[0])
  assert np.isnan(value[1])
