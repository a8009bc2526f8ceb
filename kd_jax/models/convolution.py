"""Convolutions and max-pools, with faster algorithms for CPUs.

Everything here computes what XLA's own operation computes.
`results/notes/speed_history.md` has the times that each special case saves.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Function = Callable[..., jax.Array]
Padding = Sequence[tuple[int, int]]

# A kernel's gradient on a CPU is a sum over at most so many parts of the batch,
# each of at least so many examples and output pixels.
_PARTS, _MIN_EXAMPLES, _MIN_PIXELS = 8, 4, 1024


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Padding,
  *,
  feature_group_count: int = 1,
  dimension_numbers: Any = ("NHWC", "HWIO", "NHWC"),
  **options: Any,
) -> jax.Array:
  """Computes `lax.conv_general_dilated`, in another way where XLA is slow.

  XLA's CPU backend is slow in four cases:

  - Maps smaller than the kernel: a product of gathered windows, everywhere.
  - Depthwise kernels: a sum of shifted and scaled maps.
  - 1x1 kernels: a matrix product.
  - The gradient of other kernels, which is a convolution with the examples as
    channels: a sum over parts of the batch.

  Args:
    x: [B, H, W, C], float.
    kernel: [height, width, C / groups, features].
    strides: of rows and columns.
    padding: zeros before and after the rows, and the columns.
    feature_group_count: groups of channels.
    dimension_numbers: the layouts above; `nn.Conv` passes them.
    **options: for `lax.conv_general_dilated`; no dilation.

  Returns:
    [B, rows, columns, features].
  """
  height, width, inputs, outputs = kernel.shape
  groups = feature_group_count
  rows, columns = (
    (x.shape[1 + i] + sum(padding[i]) - kernel.shape[i]) // strides[i] + 1
    for i in (0, 1)
  )
  by_xla: Function = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    feature_group_count=groups,
    dimension_numbers=dimension_numbers,
    **options,
  )
  by_product = functools.partial(
    _product_of_windows, strides=strides, padding=padding, groups=groups
  )

  def on_cpu(function: Function) -> Function:
    return functools.partial(
      jax.lax.platform_dependent, cpu=function, default=by_xla
    )

  if inputs == 1 and groups == outputs > 1:
    depthwise = on_cpu(
      functools.partial(_sum_of_windows, strides=strides, padding=padding)
    )
    is_dense = tuple(strides) == (1, 1) and all(
      max(pad) < n for pad, n in zip(padding, (height, width))
    )
    if not is_dense:
      return depthwise(x, kernel)
    shifts = on_cpu(functools.partial(_sum_of_shifts, padding=padding))
    return _with_tangents(depthwise, shifts, depthwise)(x, kernel)
  if height == width == 1:
    return on_cpu(by_product)(x, kernel)
  is_small = 0 < min(rows, columns) < max(height, width)
  if is_small and groups == 1:
    return by_product(x, kernel)
  # The batch has no size in an exported program, which needs no gradient.
  is_fixed = isinstance(x.shape[0], int)
  if groups > 1 or not is_fixed or x.shape[0] <= _MIN_EXAMPLES:
    return by_xla(x, kernel)
  parts = on_cpu(functools.partial(_in_parts, by_xla, pixels=rows * columns))
  return _with_tangents(by_xla, by_xla, parts)(x, kernel)


def _windows(
  x: jax.Array,
  size: Sequence[int],
  strides: Sequence[int],
  padding: Padding,
  fill: float = 0.0,
) -> list[jax.Array]:
  """Gathers, for each pixel of a window, the map that it sees of `x`."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
  last = [
    (x.shape[1 + i] - size[i]) // strides[i] * strides[i] + 1 for i in (0, 1)
  ]
  return [
    x[:, i : i + last[0] : strides[0], j : j + last[1] : strides[1]]
    for i in range(size[0])
    for j in range(size[1])
  ]


def _product_of_windows(x, kernel, *, strides, padding, groups):
  """A convolution as a matrix product."""
  *size, inputs, outputs = kernel.shape
  windows = jnp.concatenate(_windows(x, size, strides, padding), -1)
  if groups == 1:
    # The CPU transposes the maps for the kernel's gradient unless they are
    # rows of a matrix.
    flat = windows.reshape(-1, windows.shape[-1])
    y = jnp.dot(flat, kernel.reshape(-1, outputs))
    return y.reshape(*windows.shape[:-1], outputs)
  windows = windows.reshape(*windows.shape[:-1], groups, inputs)
  kernel = kernel.reshape(inputs, groups, -1)
  y = jnp.einsum("bhwgi,igo->bhwgo", windows, kernel)
  return y.reshape(*y.shape[:-2], outputs)


def _sum_of_windows(x, kernel, *, strides, padding):
  """A depthwise convolution, accumulated in float32."""
  *size, _, outputs = kernel.shape
  weights = kernel.reshape(-1, 1, 1, 1, outputs).astype(jnp.float32)
  windows = _windows(x, size, strides, padding)
  terms = [window * weight for window, weight in zip(windows, weights)]
  return functools.reduce(jnp.add, terms).astype(x.dtype)


def _sum_of_shifts(x, kernel, *, padding):
  """`_sum_of_windows` at stride 1, whose transpose is a sum of windows too."""
  height, width, _, outputs = kernel.shape
  rows = x.shape[1] + sum(padding[0]) - height + 1
  columns = x.shape[2] + sum(padding[1]) - width + 1
  weights = kernel.reshape(-1, 1, 1, 1, outputs).astype(jnp.float32)
  places = [(i, j) for i in range(height) for j in range(width)]
  shifted = [
    jnp.pad(
      x * weight, ((0, 0), (height - 1 - i, i), (width - 1 - j, j), (0, 0))
    )
    for weight, (i, j) in zip(weights, places)
  ]
  top, left = height - 1 - padding[0][0], width - 1 - padding[1][0]
  y = functools.reduce(jnp.add, shifted)
  return y[:, top : top + rows, left : left + columns].astype(x.dtype)


def _in_parts(function, x, kernel, *, pixels):
  """`function` of parts of the batch; the kernel's gradient adds them up."""
  examples = max(
    -(-x.shape[0] // _PARTS), _MIN_EXAMPLES, -(-_MIN_PIXELS // pixels)
  )
  cuts = list(range(examples, x.shape[0], examples))
  return jnp.concatenate([function(x, kernel) for x in jnp.split(x, cuts)])


def _with_tangents(
  function: Function, of_input: Function, of_kernel: Function
) -> Function:
  """`function`, whose gradients are the transposes of the other two.

  All three compute the same bilinear function of the input and the kernel.
  """

  def tangent(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
      terms.append(of_input(dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
      terms.append(of_kernel(x, dkernel))
    return function(x, kernel), functools.reduce(jnp.add, terms)

  wrapped = jax.custom_jvp(function)
  wrapped.defjvp(tangent, symbolic_zeros=True)
  return wrapped


def max_pool(
  x: jax.Array, window: int, *, strides: int, padding: int = 0
) -> jax.Array:
  """Computes the maximum over square windows; padded pixels never win.

  The gradient goes to the first of equal pixels, as in PyTorch. On CPUs it is
  a sum of shifted maps, because XLA's select-and-scatter is slow there.
  """
  pad: Padding = ((padding, padding), (padding, padding))
  size, steps = (window, window), (strides, strides)

  def by_xla(x):
    return nn.max_pool(x, size, steps, pad)

  def tangent_by_xla(x, dx):
    return jax.jvp(by_xla, (x,), (dx,))[1]

  def tangent_by_sum(x, dx):
    best, *others = _windows(x, size, steps, pad, -jnp.inf)
    winner = jnp.zeros(best.shape, jnp.int8)
    for i, other in enumerate(others, 1):
      winner = jnp.where(other > best, jnp.int8(i), winner)
      best = jnp.maximum(best, other)
    terms = [
      jnp.where(winner == i, dwindow, 0)
      for i, dwindow in enumerate(_windows(dx, size, steps, pad))
    ]
    return functools.reduce(jnp.add, terms)

  def tangent(primals, tangents):
    (x,), (dx,) = primals, tangents
    dy = jax.lax.platform_dependent(
      x, dx, cpu=tangent_by_sum, default=tangent_by_xla
    )
    return by_xla(x), dy

  pool = jax.custom_jvp(by_xla)
  pool.defjvp(tangent)
  return pool(x)
