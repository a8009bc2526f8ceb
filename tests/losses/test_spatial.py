"""Pooling and resizing by PyTorch's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses


def pool(x, height, width):
  """Adaptive average pool, one output pixel at a time."""
  rows, columns = x.shape[1:3]
  out = np.zeros((len(x), height, width, x.shape[-1]))
  for i in range(height):
    for j in range(width):
      top, bottom = i * rows // height, -(-(i + 1) * rows // height)
      left, right = j * columns // width, -(-(j + 1) * columns // width)
      out[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
  return out


@pytest.mark.parametrize(
  "size", [(8, 6), (4, 3), (1, 1), (5, 4), (3, 6), (9, 7)]
)
def test_adaptive_average_pool(size):
  x = np.random.default_rng(0).standard_normal((2, 8, 6, 3)).astype(np.float32)
  expected = pool(x.astype(np.float64), *size)
  pooled = losses.adaptive_average_pool(jnp.asarray(x), size)
  np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
  half = losses.adaptive_average_pool(jnp.asarray(x, jnp.bfloat16), size)
  assert half.dtype == jnp.float32


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (2, 1), (7, 3), (3, 5)])
def test_nearest_resize(size):
  x = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
  rows = [i * 4 // size[0] for i in range(size[0])]
  columns = [i * 4 // size[1] for i in range(size[1])]
  resized = losses.nearest_resize(jnp.asarray(x), size)
  np.testing.assert_array_equal(resized, x[:, rows][:, :, columns])


def test_pool_to_smaller_takes_either_side():
  small, big = jnp.ones((1, 2, 2, 3)), jnp.ones((1, 4, 4, 5))
  for a, b in ((small, big), (big, small)):
    a, b = losses.pool_to_smaller(a, b)
    assert a.shape[1:3] == b.shape[1:3] == (2, 2)


def test_l2_normalize_of_zero_is_zero():
  rows = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-15, 0.0]])
  value, vjp = jax.vjp(losses.l2_normalize, rows)
  np.testing.assert_allclose(value, [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-6)
  (gradient,) = vjp(jnp.ones_like(rows))
  np.testing.assert_array_equal(gradient[1:], 0.0)
  assert np.all(np.isfinite(gradient))
