"""The relational loss over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax import losses
from kd_jax.distributed import collectives


@pytest.mark.parametrize("devices", [2, 4])
def test_the_mean_over_devices_is_the_global_loss(devices):
  """Value and, of replicated weights, gradient."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((8, 3, 3, 2)), jnp.float32)
  t = jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
  w = jnp.asarray(rng.standard_normal((2, 4)), jnp.float32)

  def value_and_grad(w, x, t, axis_name=None):
    def loss(w):
      return losses.sp_loss(x @ w, t, axis_name=axis_name)

    return collectives.axis_mean(jax.value_and_grad(loss)(w), axis_name)

  mesh = jax.sharding.Mesh(jax.devices()[:devices], ("d",))
  mapped = jax.jit(
    jax.shard_map(
      lambda w, x, t: value_and_grad(w, x, t, "d"),
      mesh=mesh,
      in_specs=(P(), P("d"), P("d")),
      out_specs=P(),
      check_vma=False,
    )
  )
  value, gradient = mapped(w, x, t)
  expected_value, expected_gradient = jax.jit(value_and_grad)(w, x, t)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
