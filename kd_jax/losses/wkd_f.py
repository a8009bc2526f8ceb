"""WKD-F: Wasserstein distance between Gaussians of features."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks

# Added to the variance, as in the authors' code: a constant channel has a
# gradient then.
_EPSILON = 1e-5


def wkd_f_loss(
  student_map: jax.Array,
  teacher_map: jax.Array,
  *,
  mean_weight: float | jax.Array,
  grid: int,
) -> jax.Array:
  """Distance between the Gaussians that two maps' positions are drawn from.

  mean over regions of sum_c [mean_weight (mu_s - mu_t)^2 +
  (sigma_s - sigma_t)^2], with each channel's mean and unbiased standard
  deviation over the positions of a region: the squared Wasserstein distance of
  Gaussians with diagonal covariances, if `mean_weight` is 1.

  Args:
    student_map: [B, H, W, C], projected onto the teacher's channels.
    teacher_map: [B, H', W', C].
    mean_weight: at least 0.
    grid: regions along a side; cut as those of `adaptive_average_pool`.

  Returns:
    [B] float32, in squared units of the maps.

  Raises:
    ValueError: for other ranks, unequal batches or numbers of channels, or a
      grid that is finer than a map.

  Source: Lv, Yang and Li, "Wasserstein Distance Rivals Kullback-Leibler
  Divergence for Knowledge Distillation", NeurIPS 2024.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 4, 4, 3))
  >>> wkd_f_loss(a, 3 * a, mean_weight=2.0, grid=1).tolist()
  [24.0]
  """
  student = checks.float_array("student_map", student_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_batch("student_map", student, "teacher_map", teacher)
  checks.same_width("student_map", student, "teacher_map", teacher)
  mean_weight = checks.number("mean_weight", mean_weight, least=0)
  grid = checks.count("grid", grid)
  means, deviations = (
    jnp.square(s - t)
    for s, t in zip(_moments(student, grid), _moments(teacher, grid))
  )
  return jnp.mean(jnp.sum(mean_weight * means + deviations, axis=2), axis=1)


def _moments(x: jax.Array, grid: int) -> tuple[jax.Array, jax.Array]:
  """Means and standard deviations of each region: [B, grid^2, C] twice."""
  height, width = x.shape[1:3]
  if grid > min(height, width):
    raise ValueError(
      f"grid: expected at most the {min(height, width)} pixels of the map's "
      f"side, got {grid}"
    )
  means, deviations = [], []
  for i in range(grid):
    rows = slice(i * height // grid, -(-(i + 1) * height // grid))
    for j in range(grid):
      columns = slice(j * width // grid, -(-(j + 1) * width // grid))
      region = x[:, rows, columns]
      mean = jnp.mean(region, axis=(1, 2), keepdims=True)
      squares = jnp.sum(jnp.square(region - mean), axis=(1, 2))
      # A single position does not vary.
      variance = squares / max(region.shape[1] * region.shape[2] - 1, 1)
      means.append(mean[:, 0, 0])
      deviations.append(jnp.sqrt(variance + _EPSILON))
  return jnp.stack(means, axis=1), jnp.stack(deviations, axis=1)
