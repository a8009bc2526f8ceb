import jax
import jax.numpy as jnp
import pytest

from kd_jax.models import layers


def test_two_relus_of_bfloat16_in_a_sum():
  """XLA's CPU compiler gives NaN for two of `nn.relu` (JAX 0.11, 0.12)."""
  x = jnp.full((512, 8), 3, jnp.bfloat16)

  @jax.jit
  def total(x):
    y = layers.relu(layers.relu(x) - 1)
    return jnp.sum(y.astype(jnp.float32))

  assert float(total(x)) == 8192


def test_a_global_pool_is_float32_and_takes_maps_only():
  pooled = layers.global_average_pool(jnp.full((2, 3, 3, 4), 2, jnp.bfloat16))
  assert pooled.dtype == jnp.float32 and pooled.shape == (2, 4)
  with pytest.raises(ValueError, match=r"expected a map .*got shape \(2, 9, 4"):
    layers.global_average_pool(jnp.ones((2, 9, 4)))


def test_stages_stop_at_the_last():
  maps = {"stem": 0, "stage1": 1, "stage2": 2, "stage2_preact": 9, "last": 3}
  output = layers.ModelOutputs(None, maps)
  assert output.stages() == [1, 2]
  assert output.stages(stem=True) == [0, 1, 2]


def test_ranks_of_outputs():
  logits, tokens = jnp.ones((2, 7)), jnp.ones((2, 9, 4))
  features = {"stem": jnp.ones((2, 3, 3, 4)), "pooled": jnp.ones((2, 4))}
  good = layers.ModelOutputs(logits, {**features, "class_token": logits})
  assert good.checked() is good
  for name in ("stem", "stage1_preact", "block3", "last", "pooled"):
    bad = good._replace(features={**features, name: tokens})
    with pytest.raises(ValueError, match=rf"{name}: exp.*got shape \(2, 9, 4"):
      bad.checked()
  with pytest.raises(ValueError, match=r"logits: expected .*got shape \(7,\)"):
    good._replace(logits=logits[0]).checked()
