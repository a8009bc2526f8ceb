"""Batch normalisation with PyTorch's statistics and a hand-written gradient.

`results/notes/speed_history.md` has the times that the hand-written parts save.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives

# A GPU sums fewer rows than this at once. Chosen by counting kernels.
_MIN_ROWS = 256


def _like(v: jax.Array, x: jax.Array) -> jax.Array:
  """[C] -> [1, .., 1, C], for arithmetic with x [..., C]."""
  return jax.lax.expand_dims(v, range(x.ndim - 1))


def channel_sums(*maps: jax.Array) -> jax.Array:
  """Sums n maps [..., C] float32 over all axes but the last: [n, C].

  XLA for GPUs sums the columns of a few thousand rows in a handful of blocks,
  which leaves most of the GPU idle. There, groups of rows are summed first.
  """
  rows, channels = maps[0].size // maps[0].shape[-1], maps[0].shape[-1]
  groups = 2 ** (max(rows - 1, 1).bit_length() // 2)

  def at_once(*maps):
    axes = tuple(range(maps[0].ndim - 1))
    return jnp.stack([jnp.sum(x, axes) for x in maps])

  def by_groups(*maps):
    sums = [jnp.sum(x.reshape(groups, -1, channels), 1) for x in maps]
    # Without a barrier XLA merges the two sums.
    return jnp.sum(jnp.stack(jax.lax.optimization_barrier(sums)), 1)

  if rows < _MIN_ROWS or rows % groups:
    return at_once(*maps)
  return jax.lax.platform_dependent(*maps, cpu=at_once, default=by_groups)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes mean and biased variance over all axes but the last.

  On CPUs the variance is the mean squared distance from the mean. Elsewhere,
  to read the array once, both come from the distances to its first value
  (shifted data: Chan et al., "Algorithms for Computing the Sample Variance",
  The American Statistician 37, 1983). The rounding error grows with the number
  of standard deviations between that value and the mean, not with the mean.

  Args:
    x: [..., C] float32.

  Returns:
    Mean and variance, [C] each.
  """
  count = x.size // x.shape[-1]

  def in_two_passes(x):
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - _like(mean, x)), axes)

  def in_one_pass(x):
    first = x[(0,) * (x.ndim - 1)]
    x = x - _like(first, x)
    mean, square = channel_sums(x, jnp.square(x)) / count
    return mean + first, jnp.maximum(square - jnp.square(mean), 0)

  return jax.lax.platform_dependent(x, cpu=in_two_passes, default=in_one_pass)


def normalize_batch(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  *,
  epsilon: float,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises a batch by its own mean and variance (Ioffe and Szegedy, 2015).

  The gradient reads the array in its own dtype, once for the sums over the
  batch and once for the result. Forward-mode differentiation (`jax.jvp`) is
  not supported.

  Args:
    x: [..., C], of any float type.
    scale: [C] float32.
    bias: [C] float32.
    epsilon: added to the variance.
    axis_name: mapped axis whose devices share their statistics, or None.

  Returns:
    float32 [..., C], and the mean and the biased variance [C], which have no
    gradient.
  """

  def forward(x, scale, bias):
    mean, var = collectives.axis_moments(
      *moments(x.astype(jnp.float32)), axis_name
    )
    inverse = jax.lax.rsqrt(var + epsilon)
    y = (x.astype(jnp.float32) - _like(mean, x)) * _like(inverse * scale, x)
    y += _like(bias, x)
    return (y, mean, var), (x, scale, mean, inverse)

  def backward(residuals, gradients):
    x, scale, mean, inverse = residuals
    g = gradients[0]
    count = x.size // x.shape[-1] * collectives.axis_size(axis_name)
    distance = x.astype(jnp.float32) - _like(mean, x)
    # The input's gradient needs the sums over all devices. The parameters'
    # gradients stay local, because the step averages them later.
    local = channel_sums(g, g * distance)
    of_bias, of_distance = collectives.axis_sum(local, axis_name) / count
    slope = _like(jnp.square(inverse) * of_distance, x)
    dx = _like(inverse * scale, x) * (g - _like(of_bias, x) - distance * slope)
    return dx.astype(x.dtype), local[1] * inverse, local[0]

  @jax.custom_vjp
  def normalized(x, scale, bias):
    return forward(x, scale, bias)[0]

  normalized.defvjp(forward, backward)
  return normalized(x, *collectives.vary_like(x, scale, bias))


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, as PyTorch computes it.

  Unlike `flax.linen.BatchNorm`, it keeps the unbiased running variance,
  n / (n - 1) times the batch's. Statistics, parameters and arithmetic are
  float32; the result is `dtype`.

  Variables from `kd_jax.models.fold` have the parameter `offset` instead of all
  others, and `multiplier` where no convolution could take the scale.

  Attributes:
    momentum: share of the old running statistics kept at each step.
    epsilon: added to the variance.
    affine: whether it learns a scale and a bias.
    axis_name: mapped axis whose devices share their statistics, or None.
    dtype: of the result.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  affine: bool = True
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if self.has_variable("params", "offset"):
      return self._folded(x, train)
    shape = (x.shape[-1],)
    f32 = jnp.float32
    ra_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, f32)
    ra_var = self.variable("batch_stats", "var", jnp.ones, shape, f32)
    scale, bias = jnp.ones(shape), jnp.zeros(shape)
    if self.affine:
      scale = self.param("scale", nn.initializers.ones, shape, f32)
      bias = self.param("bias", nn.initializers.zeros, shape, f32)
    if not train:
      multiplier = jax.lax.rsqrt(ra_var.value + self.epsilon) * scale
      y = (x.astype(f32) - _like(ra_mean.value, x)) * _like(multiplier, x)
      y += _like(bias, x)
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
        "this network is frozen: its BatchNorm is folded into its convolutions."
        " Train with the variables from before folding"
      )
    offset: jax.Array = self.get_variable("params", "offset")
    if not self.has_variable("params", "multiplier"):
      # In the convolution's dtype cuDNN can fuse the offset as its bias.
      return (x + _like(offset, x).astype(x.dtype)).astype(self.dtype)
    multiplier: jax.Array = self.get_variable("params", "multiplier")
    y = x.astype(jnp.float32) * _like(multiplier, x) + _like(offset, x)
    return y.astype(self.dtype)
