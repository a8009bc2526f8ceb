"""MGD: masked generative distillation."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks


def mgd_mask(
  x: jax.Array, noise: jax.Array, *, ratio: float | jax.Array
) -> jax.Array:
  """Hides channels of a map: those whose noise is below `ratio`.

  Args:
    x: [B, H, W, C].
    noise: [B, C], uniform in [0, 1).
    ratio: share of the channels that are hidden, in [0, 1).

  Returns:
    [B, H, W, C] float32, zero in hidden channels.

  Raises:
    ValueError: for other ranks or shapes, or a ratio out of range.
  """
  x = checks.float_array("x", x, rank=4)
  noise = checks.float_array("noise", noise, rank=2)
  checks.same_batch("x", x, "noise", noise)
  checks.same_width("x", x, "noise", noise)
  ratio = checks.number("ratio", ratio, least=0, below=1)
  return jnp.where(noise[:, None, None] < ratio, 0.0, x)


def mgd_loss(generated_map: jax.Array, teacher_map: jax.Array) -> jax.Array:
  """Squared error of a teacher's map made from the student's masked one.

  sum over H, W, C of (g(mask(f_s)) - f_t)^2; the generator g is the caller's.

  Args:
    generated_map: [B, H, W, C], what the generator makes of `mgd_mask`'s map.
    teacher_map: [B, H, W, C].

  Returns:
    [B] float32, in squared units of the map.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Yang et al., "Masked Generative Distillation", ECCV 2022;
  masked channels as in the authors' code for classification.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 2, 2, 3))
  >>> mgd_loss(a, 3 * a).tolist()
  [48.0]
  """
  generated = checks.float_array("generated_map", generated_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_shape("generated_map", generated, "teacher_map", teacher)
  return jnp.sum(jnp.square(generated - teacher), axis=(1, 2, 3))
