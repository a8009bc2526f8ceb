"""FT: factor transfer."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial


def ft_loss(
  student_factor: jax.Array,
  teacher_factor: jax.Array,
  *,
  over_channels: bool = True,
) -> jax.Array:
  """Mean absolute distance between two normalised factors.

  mean |F_s - F_t|, F = f / ||f||_2; f is the factor's mean square over the
  channels [H * W] or, with `over_channels` false, the whole factor [H * W * C].
  The larger factor is first average-pooled to the size of the other.

  Args:
    student_factor: [B, H, W, C], of the translator.
    teacher_factor: [B, H', W', C], of the paraphraser.
    over_channels: see above. RepDistiller takes the mean square; the paper and
      torchdistill the whole factor.

  Returns:
    [B] float32, without a unit.

  Raises:
    ValueError: for other ranks, unequal batches, channels or aspect ratios.

  Source: Kim et al., "Paraphrasing Complex Network", NeurIPS 2018, section 3,
  with p = 1. Departure: the mean instead of the sum.

  >>> import jax.numpy as jnp
  >>> a = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
  >>> ft_loss(a, 5 * a).tolist()
  [0.0]
  """
  student = checks.float_array("student_factor", student_factor, rank=4)
  teacher = checks.float_array("teacher_factor", teacher_factor, rank=4)
  checks.same_width("student_factor", student, "teacher_factor", teacher)
  student, teacher = (
    _normalized(x, over_channels)
    for x in spatial.pool_to_smaller(student, teacher)
  )
  return jnp.mean(jnp.abs(student - teacher), axis=1)


def _normalized(x: jax.Array, over_channels: bool) -> jax.Array:
  """[B, H, W, C] -> [B, H * W] or [B, H * W * C], rows of length 1."""
  x = spatial.unit_range(x, (1, 2, 3))
  if over_channels:
    x = jnp.mean(jnp.square(x), axis=-1)
  return spatial.l2_normalize(x.reshape(x.shape[0], -1))


def paraphraser_loss(
  reconstructed_map: jax.Array, teacher_map: jax.Array
) -> jax.Array:
  """Reconstruction error of the paraphraser: mean squared difference.

  Args:
    reconstructed_map: [B, H, W, C], of the paraphraser's decoder.
    teacher_map: [B, H, W, C].

  Returns:
    [B] float32, in squared units of the map.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Kim et al., as `ft_loss`. Departure: the mean instead of the sum.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 2, 2, 3))
  >>> paraphraser_loss(a, 3 * a).tolist()
  [4.0]
  """
  ours = checks.float_array("reconstructed_map", reconstructed_map, rank=4)
  theirs = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_shape("reconstructed_map", ours, "teacher_map", theirs)
  return spatial.mean_square(ours, theirs)
