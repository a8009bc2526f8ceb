"""Batch normalisation: values, gradients, and how they are computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import batch_norm


def test_channel_sums_on_a_gpu_take_two_steps():
  """One sum for each group of rows, which XLA may not merge with the last."""
  x = jax.ShapeDtypeStruct((64, 8, 8, 32), jnp.float32)
  traced = jax.jit(batch_norm.channel_sums).trace(x)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "tensor<64x32xf32>" in text and "optimization_barrier" in text


@pytest.mark.parametrize("shape", [(64, 8, 8, 5), (3, 5, 7, 5), (1024, 5)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_exact_far_from_zero(offset, shape, branch):
  rng = np.random.default_rng(0)
  x = (offset + 2 * rng.standard_normal(shape)).astype(np.float32)
  flat = x.reshape(-1, 5).astype(np.float64)
  mean, var = jax.jit(batch_norm.moments)(x)
  np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(var, flat.var(0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_definition(dtype, branch):
  rng = np.random.default_rng(0)
  shape = (64, 8, 8, 5)
  x = jnp.asarray(3 + 2 * rng.standard_normal(shape), dtype)
  scale, bias = rng.standard_normal((2, 5)).astype(np.float32)
  weights = rng.standard_normal(shape).astype(np.float32)

  def definition(x, scale, bias):
    x = x.astype(jnp.float32)
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    y = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
    return y, *jax.lax.stop_gradient((mean, var))

  def ours(x, scale, bias):
    return batch_norm.normalize_batch(x, scale, bias, epsilon=1e-5)

  def results(function):
    def loss(*args):
      y, mean, var = function(*args)
      return jnp.sum(jnp.sin(y) * weights) + 1e3 * jnp.sum(mean + var)

    arguments = (x, scale, bias)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    return *function(*arguments), *gradients

  for got, expected in zip(results(ours), results(definition), strict=True):
    assert got.dtype == expected.dtype
    error = np.abs(got.astype(np.float32) - expected).max()
    tolerance = 1e-5 if got.dtype == jnp.float32 else 1e-2
    assert error < tolerance * np.abs(expected).max()


def test_a_gradient_takes_four_sums():
  """Two for the moments, two for the gradients of what is learned."""

  def loss(x, scale, bias):
    y, *_ = batch_norm.normalize_batch(x, scale, bias, epsilon=1e-5)
    return jnp.sum(jnp.sin(y))

  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  compiled = gradient.lower(*map(jnp.zeros, ((8, 4), 4, 4))).compile()
  assert len(re.findall(r" reduce\(", compiled.as_text())) == 4


def test_training_keeps_the_unbiased_variance():
  rng = np.random.default_rng(0)
  x = (3 + 2 * rng.standard_normal((2, 2, 1, 3))).astype(np.float32)
  model = batch_norm.BatchNorm()
  variables = model.init(jax.random.key(0), x, train=True)
  assert not np.any(variables["batch_stats"]["mean"])
  y, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
  flat = x.reshape(-1, 3)
  expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
  np.testing.assert_allclose(y.reshape(-1, 3), expected, rtol=1e-4, atol=1e-5)
  stats = state["batch_stats"]
  np.testing.assert_allclose(stats["mean"], 0.1 * flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(
    stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
  )


def test_evaluation_uses_the_running_statistics():
  model = batch_norm.BatchNorm(dtype=jnp.bfloat16)
  variables = {
    "params": {"scale": jnp.array([2.0, 1.0]), "bias": jnp.array([0.5, 0.0])},
    "batch_stats": {"mean": jnp.array([0.0, 1.0]), "var": jnp.array([4, 0.25])},
  }
  y = model.apply(variables, jnp.array([[1.0, 2.0]]), train=False)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), [[1.5, 2.0]], rtol=1e-2)
