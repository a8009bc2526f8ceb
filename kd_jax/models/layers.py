"""Layers that every family shares, with PyTorch's semantics.

The reference toolboxes are written in PyTorch; the defaults that decide an
accuracy (paddings, initialisers, BatchNorm's running variance) are therefore
PyTorch's here, so that weights are interchangeable and training starts alike.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kd_jax.distributed import collectives

Initializer = Callable[..., jax.Array]

# kaiming_uniform(a=sqrt(5)), PyTorch's default for convolutions and linear
# layers: uniform within +-1/sqrt(fan_in).
torch_default_init = nn.initializers.variance_scaling(
  1.0 / 3.0, "fan_in", "uniform"
)
# kaiming_normal(mode="fan_out", nonlinearity="relu").
kaiming_normal_fan_out = nn.initializers.variance_scaling(
  2.0, "fan_out", "normal"
)


class ModelOutputs(NamedTuple):
  """What every model returns.

  Attributes:
    logits: [B, num_classes] float32.
    features: named maps in forward order, NHWC: `stem`, `stage1`..`stageN`
      (after the activation), `stem_preact`/`stage1_preact`.. where the family
      has them, `last` (the map whose global average pool feeds the
      classifier), and `pooled` [B, C].
  """

  logits: jax.Array
  features: dict[str, jax.Array]

  def stages(self, *, stem: bool = False) -> list[jax.Array]:
    """The maps stage1..stageN, with `stem` before them if asked for."""
    maps = [self.features["stem"]] if stem else []
    index = 1
    while f"stage{index}" in self.features:
      maps.append(self.features[f"stage{index}"])
      index += 1
    return maps


def uniform_bias_init(fan_in: int) -> Initializer:
  """PyTorch's default bias: uniform within +-1/sqrt(fan_in)."""
  bound = 1.0 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _windows(
  x: jax.Array,
  size: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  fill: float = 0.0,
) -> list[jax.Array]:
  """What each pixel of a window sees of `x`: [B, rows, columns, C] for each."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
  last = [
    (x.shape[1 + i] - size[i]) // strides[i] * strides[i] + 1 for i in (0, 1)
  ]
  return [
    x[:, i : i + last[0] : strides[0], j : j + last[1] : strides[1]]
    for i in range(size[0])
    for j in range(size[1])
  ]


# In so many parts, of no fewer examples and pixels, a CPU makes a kernel's
# gradient.
_PARTS, _FEW, _FEW_PIXELS = 8, 4, 1024


def _convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  feature_group_count: int,
  **options: Any,
) -> jax.Array:
  """`lax.conv_general_dilated` of `nn.Conv`, by other means where that is slow.

  XLA's convolutions for the CPU, and those for their gradients, are slow in
  three cases (figures in docs/speed.md):
  - on maps smaller than the kernel, hundreds of times as slow as on larger ones
    (a 3x3 of 512 channels on 32 maps of 2x2: 1.4 s instead of 4 ms). There a
    window is gathered for each of the few pixels, and it is a matrix product;
  - depthwise, 3 to 100 times as slow as the sum of shifted and scaled maps;
  - of 1x1, for the kernel's gradient, 2 to 30 times as slow as the matrix
    product that it is.
  The gradient of other kernels, a convolution with the examples as channels,
  slows down with their number, of 128 to half its speed or less. On the CPU it
  is the sum of those of a few examples each.
  """
  height, width, inputs, outputs = kernel.shape
  rows, columns = (
    (x.shape[1 + i] + sum(padding[i]) - kernel.shape[i]) // strides[i] + 1
    for i in (0, 1)
  )

  def by_xla(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      strides,
      padding,
      feature_group_count=feature_group_count,
      **options,
    )

  def windows(x):
    return _windows(x, (height, width), strides, padding)

  def by_sum(x, kernel):
    weights = kernel.reshape(-1, outputs).astype(jnp.float32)
    terms = [w * k for w, k in zip(windows(x), weights)]
    return functools.reduce(jnp.add, terms).astype(x.dtype)

  def by_product(x, kernel):
    found = jnp.concatenate(windows(x), -1)
    if feature_group_count == 1:
      # Of rows, or the CPU turns the maps over for the kernel's gradient.
      flat = found.reshape(-1, found.shape[-1])
      y = jnp.dot(flat, kernel.reshape(-1, outputs))
      return y.reshape(*found.shape[:-1], outputs)
    found = found.reshape(*found.shape[:-1], feature_group_count, inputs)
    kernel = kernel.reshape(inputs, feature_group_count, -1)
    y = jnp.einsum("bhwgi,igo->bhwgo", found, kernel)
    return y.reshape(*y.shape[:-2], outputs)

  def by_parts(x, kernel):
    few = max(
      -(-x.shape[0] // _PARTS), _FEW, -(-_FEW_PIXELS // (rows * columns))
    )
    cuts = list(range(few, x.shape[0], few))
    return jnp.concatenate(
      [by_xla(part, kernel) for part in jnp.split(x, cuts)]
    )

  def by_shifts(x, kernel):
    """`by_sum` at stride 1 whose transpose, too, is a sum of windows."""
    weights = kernel.reshape(-1, outputs).astype(jnp.float32)
    places = [(i, j) for i in range(height) for j in range(width)]
    shifted = [
      jnp.pad(
        x * w,
        ((0, 0), (height - 1 - i, i), (width - 1 - j, j), (0, 0)),
      )
      for w, (i, j) in zip(weights, places)
    ]
    top, left = height - 1 - padding[0][0], width - 1 - padding[1][0]
    y = functools.reduce(jnp.add, shifted)
    return y[:, top : top + rows, left : left + columns].astype(x.dtype)

  def on_cpus(function):
    return functools.partial(
      jax.lax.platform_dependent, cpu=function, default=by_xla
    )

  def differentiable(function, of_input, of_kernel):
    """`function` with these tangents, which transposed are its gradients."""

    def tangent(primals, tangents):
      (x, kernel), (dx, dkernel) = primals, tangents
      terms = []
      if not isinstance(dx, SymbolicZero):
        terms.append(of_input(dx, kernel))
      if not isinstance(dkernel, SymbolicZero):
        terms.append(of_kernel(x, dkernel))
      return function(x, kernel), functools.reduce(jnp.add, terms)

    found = jax.custom_jvp(function)
    found.defjvp(tangent, symbolic_zeros=True)
    return found

  if inputs == 1 and feature_group_count == outputs > 1:
    depthwise = on_cpus(by_sum)
    is_dense = tuple(strides) == (1, 1) and all(
      max(pad) < n for pad, n in zip(padding, (height, width))
    )
    if not is_dense:
      return depthwise(x, kernel)
    return differentiable(depthwise, on_cpus(by_shifts), depthwise)(x, kernel)
  if height == width == 1:
    return on_cpus(by_product)(x, kernel)
  is_small = 0 < min(rows, columns) < max(height, width)
  if is_small and feature_group_count == 1:
    return by_product(x, kernel)
  # Of a program for batches of any size, nobody takes a gradient.
  fixed = isinstance(x.shape[0], int)
  if feature_group_count > 1 or not fixed or x.shape[0] <= _FEW:
    return by_xla(x, kernel)
  return differentiable(by_xla, by_xla, on_cpus(by_parts))(x, kernel)


def conv(
  x: jax.Array,
  features: int,
  kernel_size: int,
  *,
  name: str,
  strides: int = 1,
  padding: int = 0,
  groups: int = 1,
  use_bias: bool = False,
  kernel_init: Initializer = torch_default_init,
  bias_init: Initializer | None = None,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Convolves `x` [B, H, W, C]; call it inside a compact method.

  Padding is explicit because "SAME" shifts by one pixel at stride 2.
  """
  fan_in = kernel_size * kernel_size * x.shape[-1] // groups
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=(strides, strides),
    padding=((padding, padding), (padding, padding)),
    feature_group_count=groups,
    use_bias=use_bias,
    kernel_init=kernel_init,
    bias_init=bias_init or uniform_bias_init(fan_in),
    dtype=dtype,
    conv_general_dilated=_convolve,
    name=name,
  )(x)


def dense(
  x: jax.Array,
  features: int,
  *,
  name: str,
  use_bias: bool = True,
  kernel_init: Initializer = torch_default_init,
  bias_init: Initializer | None = None,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Linear layer on the last axis of `x`; call it inside a compact method."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=kernel_init,
    bias_init=bias_init or uniform_bias_init(x.shape[-1]),
    dtype=dtype,
    name=name,
  )(x)


# Rows of which a GPU does not add up a column in two steps.
_FEW_ROWS = 1024


def channel_sums(*maps: jax.Array) -> jax.Array:
  """Sums over all axes but the last of n maps [..., C] float32: [n, C].

  XLA for GPUs adds up the columns of a few thousand rows (CIFAR's last stage at
  batch 64 has 4,096) in a handful of blocks, which leaves most of the GPU idle
  (figures in docs/speed.md). There, sums of groups of rows come first, in as
  many blocks as there are groups, and then their sums.
  """
  rows, channels = maps[0].size // maps[0].shape[-1], maps[0].shape[-1]
  groups = 2 ** (max(rows - 1, 1).bit_length() // 2)

  def at_once(*maps):
    axes = tuple(range(maps[0].ndim - 1))
    return jnp.stack([jnp.sum(x, axes) for x in maps])

  def by_groups(*maps):
    sums = [jnp.sum(x.reshape(groups, -1, channels), 1) for x in maps]
    # Else XLA makes one sum of the two.
    return jnp.sum(jnp.stack(jax.lax.optimization_barrier(sums)), 1)

  if rows < _FEW_ROWS or rows % groups:
    return at_once(*maps)
  return jax.lax.platform_dependent(*maps, cpu=at_once, default=by_groups)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and (biased) variance over all axes but the last: [..., C] -> 2 x [C].

  On a CPU the variance is the mean square distance from the mean. Elsewhere,
  to read the array once instead of twice, both are of the distances from the
  first of the values, of which the variance is the mean square less the squared
  mean: shifted data (Chan et al., "Algorithms for Computing the Sample
  Variance", The American Statistician 37, 1983). What is lost grows with the
  number of standard deviations between that value and the mean, not with the
  mean itself.

  Args:
    x: float32.
  """
  count = x.size // x.shape[-1]

  def twice(x):
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes)

  def once(x):
    near = x[(0,) * (x.ndim - 1)]
    x = x - near
    mean, square = channel_sums(x, jnp.square(x)) / count
    return mean + near, jnp.maximum(square - jnp.square(mean), 0)

  return jax.lax.platform_dependent(x, cpu=twice, default=once)


def normalize_batch(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  *,
  epsilon: float,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises a batch by its own mean and variance (Ioffe and Szegedy, 2015).

  Its gradient is written by hand: from the array as it came, in one pass for
  the sums over the batch and one for the result. It cannot be differentiated
  forwards (`jax.jvp`).

  Args:
    x: [..., C], of any float type.
    scale: [C] float32.
    bias: [C] float32.
    epsilon: added to the variance.
    axis_name: mapped axis whose devices share their statistics, or None.

  Returns:
    float32 [..., C], and the mean and the (biased) variance [C], which have no
    gradient.
  """

  def forward(x, scale, bias):
    mean, var = collectives.axis_moments(
      *moments(x.astype(jnp.float32)), axis_name
    )
    inverse = jax.lax.rsqrt(var + epsilon)
    y = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
    return (y, mean, var), (x, scale, mean, inverse)

  def backward(kept, gradients):
    x, scale, mean, inverse = kept
    g = gradients[0]
    count = x.size // x.shape[-1] * collectives.axis_size(axis_name)
    distance = x.astype(jnp.float32) - mean
    # What each device's loss depends on is the others' batches too, but its
    # own parameters, whose gradients are averaged later.
    mine = channel_sums(g, g * distance)
    of_bias, of_distance = collectives.axis_sum(mine, axis_name) / count
    slope = jnp.square(inverse) * of_distance
    dx = inverse * scale * (g - of_bias - distance * slope)
    return dx.astype(x.dtype), mine[1] * inverse, mine[0]

  @jax.custom_vjp
  def normalized(x, scale, bias):
    return forward(x, scale, bias)[0]

  normalized.defvjp(forward, backward)
  return normalized(x, *collectives.vary_like(x, scale, bias))


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, as PyTorch computes it.

  It differs from `flax.linen.BatchNorm` in one point: the running variance is
  the unbiased estimate, n / (n - 1) times the batch's. Statistics, parameters
  and arithmetic are float32; the result is `dtype`.

  Variables that `kd_jax.interop.fold` made have the parameter `offset`, and
  `multiplier` where no convolution could take it, instead of all others: what
  a frozen normalisation amounts to.

  Attributes:
    momentum: share of the old running statistics kept at each step.
    epsilon: added to the variance.
    axis_name: mapped axis whose devices share their statistics, or None.
    use_affine: whether there are a scale and a bias.
    dtype: of the result.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  axis_name: str | None = None
  use_affine: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if self.has_variable("params", "offset"):
      return self._folded(x, train)
    shape = (x.shape[-1],)
    f32 = jnp.float32
    ra_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, f32)
    ra_var = self.variable("batch_stats", "var", jnp.ones, shape, f32)
    scale, bias = jnp.ones(shape, f32), jnp.zeros(shape, f32)
    if self.use_affine:
      scale = self.param("scale", nn.initializers.ones, shape, f32)
      bias = self.param("bias", nn.initializers.zeros, shape, f32)
    if not train:
      multiplier = jax.lax.rsqrt(ra_var.value + self.epsilon) * scale
      y = (x.astype(f32) - ra_mean.value) * multiplier + bias
      return y.astype(self.dtype)
    # No axis is bound while the variables are being made.
    axis_name = None if self.is_initializing() else self.axis_name
    y, mean, var = normalize_batch(
      x, scale, bias, epsilon=self.epsilon, axis_name=axis_name
    )
    if not self.is_initializing():
      n = x.size // x.shape[-1] * collectives.axis_size(axis_name)
      unbiased = var * (n / max(n - 1, 1))
      keep = self.momentum
      ra_mean.value = keep * ra_mean.value + (1 - keep) * mean
      ra_var.value = keep * ra_var.value + (1 - keep) * unbiased
    return y.astype(self.dtype)

  def _folded(self, x: jax.Array, train: bool) -> jax.Array:
    if train:
      raise ValueError(
        "Expected a network with BatchNorm to train, got one whose BatchNorm"
        " is folded into its convolutions; take the weights from before."
      )
    offset: jax.Array = self.get_variable("params", "offset")
    if not self.has_variable("params", "multiplier"):
      # In the convolution's own type, so that it can be the bias of one of
      # cuDNN's, which knows the activation that follows, too.
      return (x + offset.astype(x.dtype)).astype(self.dtype)
    multiplier: jax.Array = self.get_variable("params", "multiplier")
    return (x.astype(jnp.float32) * multiplier + offset).astype(self.dtype)


def relu(x: jax.Array) -> jax.Array:
  """`nn.relu`; on a CPU, of bfloat16 by way of float32.

  XLA for the CPU, in JAX 0.11 and 0.12, gives NaN or worse where it fuses two
  bfloat16 maxima with one constant, as two ReLUs are, into a sum.
  """
  if x.dtype != jnp.bfloat16:
    return nn.relu(x)

  def in_float32(x):
    return nn.relu(x.astype(jnp.float32)).astype(x.dtype)

  return jax.lax.platform_dependent(x, cpu=in_float32, default=nn.relu)


def global_average_pool(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, C] in float32."""
  return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def max_pool(
  x: jax.Array, window: int, *, strides: int, padding: int = 0
) -> jax.Array:
  """Maximum over square windows; padded pixels never win.

  The gradient goes to the first of equal pixels, as in PyTorch. XLA's for the
  CPU takes 5 to 50 times as long as the one by shifted maps (docs/speed.md).
  """
  pad: Sequence[tuple[int, int]] = ((padding, padding), (padding, padding))
  size, steps = (window, window), (strides, strides)

  def by_xla(x):
    return nn.max_pool(x, size, steps, pad)

  def tangent_by_xla(x, dx):
    return jax.jvp(by_xla, (x,), (dx,))[1]

  def tangent_by_sum(x, dx):
    best, *others = _windows(x, size, steps, pad, -jnp.inf)
    which = jnp.zeros(best.shape, jnp.int8)
    for i, other in enumerate(others, 1):
      which = jnp.where(other > best, jnp.int8(i), which)
      best = jnp.maximum(best, other)
    terms = [
      jnp.where(which == i, of, 0)
      for i, of in enumerate(_windows(dx, size, steps, pad))
    ]
    return functools.reduce(jnp.add, terms)

  def tangent(primals, tangents):
    (x,), (dx,) = primals, tangents
    dy = jax.lax.platform_dependent(
      x, dx, cpu=tangent_by_sum, default=tangent_by_xla
    )
    return by_xla(x), dy

  function = jax.custom_jvp(by_xla)
  function.defjvp(tangent)
  return function(x)


def avg_pool(
  x: jax.Array, window: int, *, strides: int, padding: int = 0
) -> jax.Array:
  """Mean over square windows; padded zeros count, as in PyTorch."""
  pad: Sequence[tuple[int, int]] = ((padding, padding), (padding, padding))
  return nn.avg_pool(x, (window, window), (strides, strides), pad)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
  """Interleaves the channels of `groups` equal groups (ShuffleNet, 2018)."""
  *outer, channels = x.shape
  x = x.reshape(*outer, groups, channels // groups)
  return jnp.swapaxes(x, -1, -2).reshape(*outer, channels)
