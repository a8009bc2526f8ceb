"""CAT-KD: class attention transfer."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial


def catkd_loss(
  student_map: jax.Array,
  teacher_map: jax.Array,
  *,
  resolution: int,
  normalize: bool = False,
) -> jax.Array:
  """Mean squared error between pooled class activation maps.

  mean over regions and classes of (m_s - m_t)^2, m the activation map of each
  class, average-pooled to `resolution` x `resolution` regions.

  Args:
    student_map: [B, H, W, C], one map per class: the classifier's weights,
      without its bias, applied to every position of the last map.
    teacher_map: [B, H', W', C], likewise.
    resolution: regions along a side.
    normalize: whether each class's pooled map is divided by its L2 norm.

  Returns:
    [B] float32, in squared units of the logits, or without one if `normalize`.

  Raises:
    ValueError: for other ranks, unequal batches or numbers of classes.

  Source: Guo et al., "Class Attention Transfer Based Knowledge Distillation",
  CVPR 2023.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 4, 4, 3))
  >>> catkd_loss(a, 3 * a, resolution=2).tolist()
  [4.0]
  """
  student = checks.float_array("student_map", student_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_batch("student_map", student, "teacher_map", teacher)
  checks.same_width("student_map", student, "teacher_map", teacher)
  side = checks.count("resolution", resolution)

  def regions(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, C, regions]."""
    x = spatial.adaptive_average_pool(x, (side, side))
    x = jnp.swapaxes(x.reshape(x.shape[0], side * side, -1), 1, 2)
    return spatial.l2_normalize(x) if normalize else x

  return spatial.mean_square(regions(student), regions(teacher))
