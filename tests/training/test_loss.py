"""The sum of the weighted terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.training import loss

TERMS = {
  "ce": jnp.array([1.0, 3.0]),
  "kd": jnp.array(5.0, jnp.bfloat16),
  "bad": jnp.array([jnp.nan, 1.0]),
}


def test_weighted_sum_averages_examples():
  total = loss.weighted_sum(TERMS, {"ce": 2, "kd": 0.5})
  assert total.dtype == jnp.float32
  assert float(total) == 2 * 2.0 + 0.5 * 5.0


def test_weight_zero_leaves_a_term_out():
  assert float(loss.weighted_sum(TERMS, {"ce": 1.0, "bad": 0.0})) == 2.0
  assert float(loss.weighted_sum(TERMS, {"ce": 1.0, "simkd": 0})) == 2.0


def test_weight_may_be_traced():
  ramp = jax.jit(lambda w: loss.weighted_sum(TERMS, {"ce": 1.0, "kd": w}))
  np.testing.assert_allclose(ramp(0.0), 2.0)
  np.testing.assert_allclose(ramp(0.5), 4.5)


def test_weights_that_fit_no_term():
  with pytest.raises(ValueError, match=r"'simkd' is not a term.*bad, ce, kd"):
    loss.weighted_sum(TERMS, {"simkd": 1.0})
  with pytest.raises(ValueError, match="at least one weight other than 0"):
    loss.weighted_sum(TERMS, {"ce": 0.0})
