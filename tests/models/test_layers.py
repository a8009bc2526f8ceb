import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import batch_norm, convolution, layers


class _Conv(nn.Module):
  """One convolution, to call `layers.conv` in a compact method."""

  strides: int = 1
  padding: int = 1
  groups: int = 1

  @nn.compact
  def __call__(self, x):
    return layers.conv(
      x,
      4,
      3,
      name="conv",
      strides=self.strides,
      padding=self.padding,
      groups=self.groups,
      use_bias=True,
    )


def _windows(x, size, strides, padding, fill):
  """All windows of an NHWC array: [B, H', W', size, size, C]."""
  pad = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  x = np.pad(x, pad, constant_values=fill)
  w = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  return w[:, ::strides, ::strides].transpose(0, 1, 2, 4, 5, 3)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_pads_both_sides_alike(strides, groups):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 6, 8, 4)).astype(np.float32)
  model = _Conv(strides=strides, groups=groups)
  variables = model.init(jax.random.key(0), x)
  kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
  bias = np.asarray(variables["params"]["conv"]["bias"])
  windows = _windows(x, 3, strides, 1, 0.0)
  per = 4 // groups
  expected = [
    np.einsum(
      "bhwijc,ijco->bhwo",
      windows[..., g * per : (g + 1) * per],
      kernel[..., g * per : (g + 1) * per],
    )
    for g in range(groups)
  ]
  expected = np.concatenate(expected, -1) + bias
  np.testing.assert_allclose(
    model.apply(variables, x), expected, rtol=1e-4, atol=1e-5
  )


def test_default_initialisers_are_uniform_in_the_fan_in():
  init = layers.torch_default_init(jax.random.key(0), (3, 3, 64, 50))
  bound = 1 / np.sqrt(9 * 64)
  values = np.asarray(init)
  assert np.abs(values).max() <= bound
  assert np.abs(values).max() > 0.99 * bound
  assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
  bias = np.asarray(layers.uniform_bias_init(25)(jax.random.key(0), (5000,)))
  assert 0.19 < bias.max() <= 0.2 and -0.2 <= bias.min() < -0.19


def test_he_initialiser_is_normal_in_the_fan_out():
  init = layers.kaiming_normal_fan_out(jax.random.key(0), (3, 3, 50, 64))
  values = np.asarray(init)
  std = np.sqrt(2 / (9 * 64))
  assert values.std() == pytest.approx(std, rel=0.02)
  assert np.abs(values).max() > 3 * std  # not truncated at 2


def test_batch_norm_keeps_the_unbiased_variance():
  rng = np.random.default_rng(0)
  x = (3 + 2 * rng.standard_normal((2, 2, 1, 3))).astype(np.float32)
  model = layers.BatchNorm()
  variables = model.init(jax.random.key(0), x, train=True)
  y, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
  flat = x.reshape(-1, 3)
  expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
  np.testing.assert_allclose(y.reshape(-1, 3), expected, rtol=1e-4, atol=1e-5)
  stats = state["batch_stats"]
  np.testing.assert_allclose(stats["mean"], 0.1 * flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(
    stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
  )


@pytest.fixture(params=["cpu", "default"])
def branch(request, monkeypatch):
  """Every choice between platforms, taken as on a CPU and as elsewhere."""

  def choose(*args, cpu, default):
    return (cpu if request.param == "cpu" else default)(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", choose)
  return request.param


@pytest.mark.parametrize("shape", [(64, 8, 8, 5), (3, 5, 7, 5), (1024, 5)])
def test_channel_sums(shape, branch):
  rng = np.random.default_rng(0)
  maps = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
  expected = [x.reshape(-1, 5).astype(np.float64).sum(0) for x in maps]
  found = jax.jit(batch_norm.channel_sums)(*maps)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_channel_sums_elsewhere_are_of_two_steps():
  """One sum for each group of rows, which XLA may not merge with the last."""
  x = jax.ShapeDtypeStruct((64, 8, 8, 32), jnp.float32)
  lowered = (
    jax.jit(batch_norm.channel_sums)
    .trace(x)
    .lower(lowering_platforms=("cuda",))
  )
  text = lowered.as_text()
  assert "tensor<64x32xf32>" in text and "optimization_barrier" in text


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments(offset, branch):
  """Exact, however far from 0 the mean is."""
  rng = np.random.default_rng(0)
  x = (offset + 2 * rng.standard_normal((64, 8, 8, 5))).astype(np.float32)
  flat = x.reshape(-1, 5).astype(np.float64)
  mean, var = jax.jit(batch_norm.moments)(x)
  np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(var, flat.var(0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_normalised_batch(dtype, branch):
  """Those that JAX finds of the definition; of each argument."""
  rng = np.random.default_rng(0)
  shape = (64, 8, 8, 5)
  x = jnp.asarray(3 + 2 * rng.standard_normal(shape), dtype)
  scale, bias = rng.standard_normal((2, 5)).astype(np.float32)
  weights = rng.standard_normal(shape).astype(np.float32)

  def plain(x, scale, bias):
    x = x.astype(jnp.float32)
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

  def ours(x, scale, bias):
    return batch_norm.normalize_batch(x, scale, bias, epsilon=1e-5)[0]

  def results(function):
    def loss(*args):
      return jnp.sum(jnp.sin(function(*args)) * weights)

    arguments = (x, scale, bias)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    return function(*arguments), *gradients

  for got, expected in zip(results(ours), results(plain), strict=True):
    assert got.dtype == expected.dtype
    error = np.abs(got.astype(np.float32) - expected).max()
    tolerance = 1e-5 if got.dtype == jnp.float32 else 1e-2
    assert error < tolerance * np.abs(expected).max()


def test_a_normalised_batch_gives_its_statistics_no_gradient():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)

  def loss(x):
    _, mean, var = batch_norm.normalize_batch(
      x, jnp.ones(3), jnp.zeros(3), epsilon=1e-5
    )
    return jnp.sum(mean + var)

  assert not np.any(jax.grad(loss)(x))


def test_a_gradient_of_batch_norm_adds_up_four_times():
  """Twice for the moments, twice for the gradients of what is learned."""

  def loss(x, scale, bias):
    y, *_ = batch_norm.normalize_batch(x, scale, bias, epsilon=1e-5)
    return jnp.sum(jnp.sin(y))

  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  compiled = gradient.lower(*map(jnp.zeros, ((8, 4), 4, 4))).compile()
  assert len(re.findall(r" reduce\(", compiled.as_text())) == 4


def test_batch_norm_evaluates_with_the_running_statistics():
  model = layers.BatchNorm(dtype=jnp.bfloat16)
  x = jnp.array([[1.0, 2.0]])
  variables = {
    "params": {"scale": jnp.array([2.0, 1.0]), "bias": jnp.array([0.5, 0.0])},
    "batch_stats": {"mean": jnp.array([0.0, 1.0]), "var": jnp.array([4, 0.25])},
  }
  y = model.apply(variables, x, train=False)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), [[1.5, 2.0]], rtol=1e-2)


def test_batch_norm_without_parameters():
  model = layers.BatchNorm(use_affine=False)
  variables = model.init(jax.random.key(0), jnp.ones((4, 3)), train=True)
  assert set(variables) == {"batch_stats"}


def test_pools():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 7, 7, 3)).astype(np.float32) - 5
  mean = _windows(x, 3, 2, 1, 0.0).mean((3, 4))
  np.testing.assert_allclose(
    layers.avg_pool(x, 3, strides=2, padding=1), mean, rtol=1e-5
  )
  best = _windows(x, 3, 2, 1, -np.inf).max((3, 4))
  np.testing.assert_array_equal(
    layers.max_pool(x, 3, strides=2, padding=1), best
  )
  pooled = layers.global_average_pool(jnp.asarray(x, jnp.bfloat16))
  assert pooled.dtype == jnp.float32
  np.testing.assert_allclose(pooled, x.mean((1, 2)), rtol=1e-2)


@pytest.mark.parametrize(
  ("size", "window", "strides", "padding"),
  [(8, 2, 2, 0), (7, 2, 2, 0), (8, 3, 2, 1), (7, 3, 2, 1), (6, 3, 1, 1)],
)
def test_gradients_of_a_max_pool(size, window, strides, padding, branch):
  """Of maps with many equal pixels: the first of them has it all."""
  rng = np.random.default_rng(0)
  x = rng.integers(-2, 3, (3, size, size, 5)).astype(np.float32)
  direction = rng.standard_normal(x.shape, np.float32)
  pad = 2 * ((padding, padding),)

  def xla(x):
    return nn.max_pool(x, 2 * (window,), 2 * (strides,), pad)

  def ours(x):
    return layers.max_pool(x, window, strides=strides, padding=padding)

  def run(pool):
    @jax.jit
    def run(x):
      weights = jnp.arange(xla(x).size, dtype=x.dtype).reshape(xla(x).shape)
      grad = jax.grad(lambda x: jnp.sum(weights * pool(x)))(x)
      return grad, *jax.jvp(pool, (x,), (direction,))

    return run(x)

  for got, expected in zip(run(ours), run(xla), strict=True):
    np.testing.assert_array_equal(got, expected)


def test_a_cpu_has_no_select_and_scatter():
  def loss(x):
    return jnp.sum(layers.max_pool(x, 2, strides=2) ** 2)

  traced = jax.jit(jax.grad(loss)).trace(jnp.zeros((2, 4, 4, 3)))
  for platform, expected in {"cpu": False, "cuda": True}.items():
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.select_and_scatter" in text) == expected, platform


def test_channel_shuffle_interleaves_the_groups():
  x = jnp.arange(6).reshape(1, 1, 1, 6)
  assert layers.channel_shuffle(x, 2).ravel().tolist() == [0, 3, 1, 4, 2, 5]
  assert layers.channel_shuffle(x, 3).ravel().tolist() == [0, 2, 4, 1, 3, 5]


def test_stages_stop_at_the_last():
  maps = {"stem": 0, "stage1": 1, "stage2": 2, "stage2_preact": 9, "last": 3}
  output = layers.ModelOutputs(None, maps)
  assert output.stages() == [1, 2]
  assert output.stages(stem=True) == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("groups", [1, 6, 2])
@pytest.mark.parametrize("width", [1, 3])
def test_convolutions_are_those_of_xla(size, strides, groups, width):
  """Values and gradients against XLA's convolution, wherever ours differs."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, size, size, 6), np.float32)
  kernel = rng.standard_normal((width, width, 6 // groups, 6), np.float32)
  padding = 2 * ((width // 2, width // 2),)
  options = {
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": groups,
  }

  def run(convolve):
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(x, kernel):
      y = convolve(x, kernel, (strides, strides), padding, **options)
      return jnp.sum(jnp.sin(y)), y

    grads, y = jax.jit(run)(x, kernel)
    return y, *grads

  ours, xla = run(convolution.convolve), run(jax.lax.conv_general_dilated)
  for got, expected in zip(ours, xla, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


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
  @jax.jit
  def apply(x, kernel):
    return convolution.convolve(
      x,
      kernel,
      strides=(1, 1),
      padding=2 * ((width // 2, width // 2),),
      feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  traced = apply.trace(
    jnp.zeros((1, size, size, 4)), jnp.zeros((width, width, 4 // groups, 4))
  )
  for platform, expected in convolved.items():
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == expected, platform


OPTIONS = {
  "strides": (1, 1),
  "padding": ((1, 1), (1, 1)),
  "feature_group_count": 1,
  "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
}


@pytest.mark.parametrize("examples", [4, 5, 8, 37])
def test_kernel_gradients_of_few_examples_each_add_up(examples):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((examples, 32, 32, 3), np.float32)
  kernel = rng.standard_normal((3, 3, 3, 2), np.float32)
  directions = (np.ones_like(x), rng.standard_normal(kernel.shape, np.float32))

  def run(convolve):
    def function(x, kernel):
      y = convolve(x, kernel, *OPTIONS.values())
      return jnp.sum(jnp.sin(y))

    @jax.jit
    def run(x, kernel):
      backward = jax.grad(function, argnums=(0, 1))(x, kernel)
      return backward, jax.jvp(function, (x, kernel), directions)

    return jax.tree.leaves(run(x, kernel))

  def ours(x, kernel, *options):
    return convolution.convolve(x, kernel, **dict(zip(OPTIONS, options)))

  def xla(x, kernel, strides, padding, groups, numbers):
    return jax.lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=numbers
    )

  for got, expected in zip(run(ours), run(xla), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=5e-3)


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
  shapes = (
    jax.ShapeDtypeStruct((examples, size, size, 3), jnp.float32),
    jax.ShapeDtypeStruct((3, 3, 3, 2), jnp.float32),
  )

  def count(argnums):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(convolution.convolve(x, kernel, **OPTIONS)))

    traced = jax.jit(jax.grad(loss, argnums)).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.convolution")

  assert count((0, 1)) == 2 + of_kernel
  assert count(0) == 2  # of a frozen network
  assert count(1) == 1 + of_kernel  # of the first layer


@pytest.mark.parametrize(
  ("strides", "padding"), [(1, 0), (1, 2), (1, 3), (2, 1)]
)
def test_depthwise_tangents_and_gradients(strides, padding, branch):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 7, 7, 3), np.float32)
  kernel = rng.standard_normal((3, 3, 1, 3), np.float32)
  directions = (np.ones_like(x), rng.standard_normal(kernel.shape, np.float32))
  options = {
    "dimension_numbers": OPTIONS["dimension_numbers"],
    "feature_group_count": 3,
  }

  def run(convolve):
    def function(x, kernel):
      pad = 2 * ((padding, padding),)
      return convolve(x, kernel, 2 * (strides,), pad, **options)

    def loss(x, kernel):
      return jnp.sum(jnp.sin(function(x, kernel)))

    tangent = jax.jvp(function, (x, kernel), directions)
    # Several trials are trained at once by `vmap`.
    twice = jax.vmap(jax.grad(loss, argnums=(0, 1)))(
      np.stack([x, -x]), np.stack([kernel, kernel])
    )
    return jax.tree.leaves((tangent, twice))

  for got, expected in zip(
    run(convolution.convolve), run(jax.lax.conv_general_dilated), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def _lowered_gradient(argnums, kernel_shape, groups):
  """The text, for a CPU, of a convolution's gradient on maps of 8x8x6."""
  options = OPTIONS | {
    "feature_group_count": groups,
    "padding": 2 * ((kernel_shape[0] // 2,) * 2,),
  }

  def loss(x, kernel):
    return jnp.sum(jnp.sin(convolution.convolve(x, kernel, **options)))

  traced = jax.jit(jax.grad(loss, argnums)).trace(
    jnp.zeros((16, 8, 8, 6)), jnp.zeros(kernel_shape)
  )
  return traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_depthwise_input_gradient_is_a_sum_of_windows():
  """And not of nine padded maps."""
  text = _lowered_gradient(0, (3, 3, 1, 6), 6)
  amounts = re.findall(r"pad .*low = \[(.*)\], high = \[(.*)\], inter", text)
  # A negative amount cuts a window out.
  windows = [low for low, high in amounts if "-" in low + high]
  # With one padded map forward and one in the gradient.
  assert (len(windows), len(amounts)) == (9, 11)


def test_a_1x1_kernel_gradient_is_a_product_of_rows():
  """Of one axis of 1,024; of three, XLA would turn the maps over."""
  text = _lowered_gradient(1, (1, 1, 6, 6), 1)
  assert "contracting_dims = [0] x [0]" in text
  assert "contracting_dims = [0, 1, 2]" not in text


def test_depthwise_sums_of_bfloat16_lose_nothing():
  x = jnp.ones((1, 3, 3, 2), jnp.bfloat16)
  kernel = jnp.full((3, 3, 1, 2), 2.0**-9, jnp.bfloat16).at[0, 0].set(1.0)
  y = convolution.convolve(
    x,
    kernel,
    (1, 1),
    ((0, 0), (0, 0)),
    feature_group_count=2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, np.full((1, 1, 1, 2), 1 + 2.0**-6))


def test_two_relus_of_bfloat16_in_a_sum():
  """XLA's CPU compiler gives NaN for two of `nn.relu` (JAX 0.11, 0.12)."""
  x = jnp.full((512, 8), 3, jnp.bfloat16)

  @jax.jit
  def total(x):
    y = layers.relu(layers.relu(x) - 1)
    return jnp.sum(y.astype(jnp.float32))

  assert float(total(x)) == 8192
