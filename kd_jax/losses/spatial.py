"""Pooling and resizing of maps [B, H, W, C], as in PyTorch.

The reference toolboxes align a student's and a teacher's maps with PyTorch's
adaptive average pool and nearest resize. `jax.image.resize` follows other
rules.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from kd_jax.losses import checks

HIGHEST = jax.lax.Precision.HIGHEST


def _pool_matrix(size: int, target: int) -> npt.NDArray[np.float32]:
  """[target, size]: row i averages the window of output pixel i."""
  matrix = np.zeros((target, size), np.float32)
  for i in range(target):
    start = i * size // target
    end = -(-(i + 1) * size // target)
    matrix[i, start:end] = 1.0 / (end - start)
  return matrix


def adaptive_average_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Average-pools a map to any size.

  Output pixel i of n averages the input pixels from floor(i * N / n) up to,
  but not including, ceil((i + 1) * N / n). Windows overlap if n does not divide
  N.

  Args:
    x: [B, H, W, C].
    size: (height, width) of the result.

  Returns:
    [B, height, width, C] in float32.
  """
  batch, height, width, channels = checks.map_shape("x", x)
  size = (checks.count("size", size[0]), checks.count("size", size[1]))
  x = x.astype(jnp.float32)
  if (height, width) == size:
    return x
  if height % size[0] == 0 and width % size[1] == 0:
    windows = (batch, size[0], height // size[0], size[1], width // size[1])
    return jnp.mean(x.reshape((*windows, channels)), axis=(2, 4))
  rows = jnp.asarray(_pool_matrix(height, size[0]))
  columns = jnp.asarray(_pool_matrix(width, size[1]))
  # TF32 would lose half of the map's digits.
  return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision=HIGHEST)


def nearest_resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes a map: output pixel i of n is input pixel floor(i * N / n).

  Args:
    x: [B, H, W, C].
    size: (height, width) of the result.

  Returns:
    [B, height, width, C] in the dtype of `x`.
  """
  checks.map_shape("x", x)
  for axis, target in ((1, size[0]), (2, size[1])):
    current, target = x.shape[axis], checks.count("size", target)
    if target == current:
      continue
    if target % current == 0:
      x = jnp.repeat(x, target // current, axis=axis)
    elif current % target == 0:
      x = jax.lax.slice_in_dim(x, 0, None, current // target, axis)
    else:
      x = jnp.take(x, np.arange(target) * current // target, axis=axis)
  return x


def pool_to_smaller(
  student_map: jax.Array, teacher_map: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Average-pools two maps to the smaller height and width of both.

  Args:
    student_map: [B, H, W, C].
    teacher_map: [B, H', W', C'].

  Returns:
    Both maps in float32, of one height and width.

  Raises:
    ValueError: for other ranks, unequal batches or aspect ratios.
  """
  _, height, width, _ = checks.map_shape("student_map", student_map)
  _, height_t, width_t, _ = checks.map_shape("teacher_map", teacher_map)
  checks.same_batch("student_map", student_map, "teacher_map", teacher_map)
  # Maps of one image have one aspect ratio, but for the rounding of strides.
  if not 0.5 <= (height * width_t) / (width * height_t) <= 2:
    raise ValueError(
      "student_map and teacher_map: expected maps [B, H, W, C] of one aspect "
      f"ratio, got {student_map.shape} and {teacher_map.shape}"
    )
  target = (min(height, height_t), min(width, width_t))
  return (
    adaptive_average_pool(student_map, target),
    adaptive_average_pool(teacher_map, target),
  )


def l2_normalize(x: jax.Array) -> jax.Array:
  """Divides each vector along the last axis by its L2 norm.

  A vector shorter than 1e-12 becomes zero, with a zero gradient: dividing would
  give NaN or a gradient of 1e12. A long one does not overflow.
  """
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  x /= jax.lax.stop_gradient(jnp.maximum(largest, 1.0))
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  visible = squares > 1e-24
  inverse = jax.lax.rsqrt(jnp.where(visible, squares, 1.0))
  return jnp.where(visible, x * inverse, 0.0)


def unit_range(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Divides by the largest absolute value along `axes`, held constant.

  For what does not depend on the scale of `x`: then the gradient is right, and
  squares of squares neither overflow nor vanish.
  """
  largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  largest = jax.lax.stop_gradient(largest)
  return x / jnp.where(largest > 1e-30, largest, 1.0)


def mean_square(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean squared difference of each example: [B, ...] and [B, ...] -> [B]."""
  return jnp.mean(jnp.square(a - b), axis=tuple(range(1, a.ndim)))
