"""The CPU's convolutions and max-pools: XLA's values and gradients."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import convolution

NUMBERS = ("NHWC", "HWIO", "NHWC")


def pair(padding):
  return ((padding, padding), (padding, padding))


@pytest.mark.parametrize(
  ("examples", "size", "width", "groups", "strides", "padding"),
  [
    # Depthwise: dense, strided, padded beyond the kernel.
    *((3, 1, 3, 6, 1, 1), (3, 4, 3, 6, 1, 1), (2, 7, 3, 6, 2, 1)),
    *((2, 7, 3, 6, 1, 0), (2, 7, 3, 6, 1, 2), (2, 7, 3, 6, 1, 3)),
    # 1x1, strided and grouped.
    *((3, 4, 1, 1, 1, 0), (3, 4, 1, 1, 2, 0), (3, 4, 1, 2, 2, 0)),
    (3, 2, 1, 6, 1, 0),
    # Maps smaller than the kernel.
    *((3, 1, 3, 1, 1, 1), (3, 2, 3, 1, 1, 1), (3, 4, 3, 1, 2, 1)),
    # Grouped.
    *((3, 2, 3, 2, 1, 1), (3, 4, 3, 2, 2, 1)),
    # The kernel's gradient whole, and by parts, the last of them smaller.
    *((4, 32, 3, 1, 1, 1), (5, 32, 3, 1, 1, 1), (37, 32, 3, 1, 2, 1)),
  ],
)
def test_values_gradients_and_tangents_are_xlas(
  examples, size, width, groups, strides, padding
):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((examples, size, size, 6), np.float32)
  kernel = rng.standard_normal((width, width, 6 // groups, 6), np.float32)
  directions = (np.ones_like(x), rng.standard_normal(kernel.shape, np.float32))

  def results(convolve):
    def function(x, kernel):
      return convolve(
        *(x, kernel, (strides, strides), pair(padding)),
        feature_group_count=groups,
        dimension_numbers=NUMBERS,
      )

    def loss(x, kernel):
      y = function(x, kernel)
      return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def run(x, kernel):
      gradient = jax.grad(loss, (0, 1), has_aux=True)(x, kernel)
      return gradient, jax.jvp(function, (x, kernel), directions)[1]

    return jax.tree.leaves(run(x, kernel))

  ours = results(convolution.convolve)
  xla = results(jax.lax.conv_general_dilated)
  for got, expected in zip(ours, xla, strict=True):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("examples", [2, 8])
@pytest.mark.parametrize("groups", [1, 6])
def test_gradients_elsewhere(groups, examples, monkeypatch):
  """As on a GPU, whose way a CPU can go as well."""
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
  )
  test_values_gradients_and_tangents_are_xlas(examples, 7, 3, groups, 1, 1)


def lowered(function, *shapes, platform="cpu"):
  """The text of a function of float32 arrays for a platform."""
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  traced = jax.jit(function).trace(*arrays)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def convolve_same(x, kernel, groups=1):
  return convolution.convolve(
    x,
    kernel,
    (1, 1),
    pair(kernel.shape[0] // 2),
    feature_group_count=groups,
  )


def gradient(argnums, groups=1):
  def loss(x, kernel):
    return jnp.sum(jnp.sin(convolve_same(x, kernel, groups)))

  return jax.grad(loss, argnums)


@pytest.mark.parametrize(
  ("size", "width", "groups", "convolved"),
  [
    (2, 3, 1, {"cpu": False, "cuda": False}),  # a small map
    (3, 3, 1, {"cpu": True, "cuda": True}),
    (2, 3, 4, {"cpu": False, "cuda": True}),  # depthwise
    (9, 3, 4, {"cpu": False, "cuda": True}),
    (9, 3, 2, {"cpu": True, "cuda": True}),
    (9, 1, 1, {"cpu": False, "cuda": True}),  # 1x1
    (9, 1, 2, {"cpu": False, "cuda": True}),
  ],
)
def test_what_needs_no_convolution(size, width, groups, convolved):
  shapes = (1, size, size, 4), (width, width, 4 // groups, 4)
  for platform, expected in convolved.items():
    text = lowered(
      lambda x, k: convolve_same(x, k, groups), *shapes, platform=platform
    )
    assert ("stablehlo.convolution" in text) == expected, platform


@pytest.mark.parametrize(
  ("examples", "size", "platform", "of_kernel"),
  [
    *((4, 32, "cpu", 1), (8, 32, "cpu", 2), (64, 32, "cpu", 8)),
    *((256, 32, "cpu", 8), (256, 4, "cpu", 4), (64, 4, "cpu", 1)),
    (64, 32, "cuda", 1),
  ],
)
def test_gradients_that_are_made(examples, size, platform, of_kernel):
  """One convolution forward, one for the input, and on a CPU 8 for a kernel."""
  shapes = (examples, size, size, 3), (3, 3, 3, 2)

  def count(argnums):
    text = lowered(gradient(argnums), *shapes, platform=platform)
    return text.count("stablehlo.convolution")

  assert count((0, 1)) == 2 + of_kernel
  assert count(0) == 2  # of a frozen network
  assert count(1) == 1 + of_kernel  # of the first layer


def test_a_depthwise_input_gradient_is_a_sum_of_windows():
  """And not of nine padded maps."""
  text = lowered(gradient(0, groups=6), (16, 8, 8, 6), (3, 3, 1, 6))
  amounts = re.findall(r"pad .*low = \[(.*)\], high = \[(.*)\], inter", text)
  # A negative amount cuts a window out.
  windows = [low for low, high in amounts if "-" in low + high]
  # With one padded map forward and one in the gradient.
  assert (len(windows), len(amounts)) == (9, 11)


def test_a_1x1_kernel_gradient_is_a_product_of_rows():
  """Of one axis of 1,024; of three, XLA would transpose the maps."""
  text = lowered(gradient(1), (16, 8, 8, 6), (1, 1, 6, 6))
  assert "contracting_dims = [0] x [0]" in text
  assert "contracting_dims = [0, 1, 2]" not in text


def test_depthwise_sums_of_bfloat16_lose_nothing():
  x = jnp.ones((1, 3, 3, 2), jnp.bfloat16)
  kernel = jnp.full((3, 3, 1, 2), 2.0**-9, jnp.bfloat16).at[0, 0].set(1.0)
  y = convolution.convolve(x, kernel, (1, 1), pair(0), feature_group_count=2)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, np.full((1, 1, 1, 2), 1 + 2.0**-6))


@pytest.mark.parametrize(
  ("size", "window", "strides", "padding"),
  [(7, 2, 2, 0), (8, 3, 2, 1), (7, 3, 2, 1), (6, 3, 1, 1)],
)
def test_gradients_of_a_max_pool(size, window, strides, padding, branch):
  """Of maps with many equal pixels: the first of them has it all."""
  rng = np.random.default_rng(0)
  x = rng.integers(-2, 3, (3, size, size, 5)).astype(np.float32)
  direction = rng.standard_normal(x.shape, np.float32)

  def xla(x):
    return nn.max_pool(x, 2 * (window,), 2 * (strides,), pair(padding))

  def ours(x):
    return convolution.max_pool(x, window, strides=strides, padding=padding)

  def results(pool):
    @jax.jit
    def run(x):
      weights = jnp.arange(xla(x).size, dtype=x.dtype).reshape(xla(x).shape)
      grad = jax.grad(lambda x: jnp.sum(weights * pool(x)))(x)
      return grad, *jax.jvp(pool, (x,), (direction,))

    return run(x)

  for got, expected in zip(results(ours), results(xla), strict=True):
    np.testing.assert_array_equal(got, expected)


def test_a_cpu_has_no_select_and_scatter():
  def loss(x):
    return jnp.sum(convolution.max_pool(x, 2, strides=2) ** 2)

  for platform, expected in {"cpu": False, "cuda": True}.items():
    text = lowered(jax.grad(loss), (2, 4, 4, 3), platform=platform)
    assert ("stablehlo.select_and_scatter" in text) == expected, platform
