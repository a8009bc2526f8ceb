"""NST: neuron selectivity transfer."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial

_einsum = functools.partial(jnp.einsum, precision=spatial.HIGHEST)


def nst_loss(
  student_maps: jax.Array | Sequence[jax.Array],
  teacher_maps: jax.Array | Sequence[jax.Array],
) -> jax.Array:
  """Squared maximum mean discrepancy of the channels of two maps.

  The sum over layers of k(s, s) + k(t, t) - 2 k(s, t), where k(x, y) is the
  mean over channels i and j of <x_i, y_j>^2, and x_i a channel's map divided by
  its L2 norm. The larger map of a pair is first average-pooled to the size of
  the other.

  Args:
    student_maps: [B, H, W, C], or a sequence of such maps.
    teacher_maps: as many maps; sizes and channels may differ.

  Returns:
    [B] float32, without a unit.

  Raises:
    ValueError: for other ranks, unequal batches or numbers of maps.

  Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron
  Selectivity Transfer", 2017, with the polynomial kernel of d = 2 and c = 0.

  >>> import jax.numpy as jnp
  >>> a = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
  >>> nst_loss(a, 5 * a).tolist()
  [0.0]
  """
  students = checks.maps("student_maps", student_maps)
  teachers = checks.maps("teacher_maps", teacher_maps)
  checks.same_number("student_maps", students, "teacher_maps", teachers)
  loss = jnp.zeros(students[0].shape[0], jnp.float32)
  for student, teacher in zip(students, teachers):
    checks.same_batch("student_maps", student, "teacher_maps", teacher)
    s, t = map(_unit_channels, spatial.pool_to_smaller(student, teacher))
    loss += _kernel(s, s) + _kernel(t, t) - 2 * _kernel(s, t)
  return loss


@jax.jit
def _unit_channels(x: jax.Array) -> jax.Array:
  """Each channel over its norm: [B, H, W, C] -> [B, C, H * W]."""
  x = spatial.unit_range(x, (1, 2)).reshape(x.shape[0], -1, x.shape[-1])
  return spatial.l2_normalize(jnp.swapaxes(x, 1, 2))


@jax.jit
def _kernel(x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean of all <x_i, y_j>^2: [B, C, P] and [B, C', P] -> [B]."""

  pairs = x.shape[1] * y.shape[1]
  if pairs <= x.shape[2] ** 2:
    products = jnp.square(_einsum("bip,bjp->bij", x, y))
  else:  # the same sum, tr(X^T X Y^T Y), in less memory
    products = _einsum("bip,biq->bpq", x, x) * _einsum("bip,biq->bpq", y, y)
  return jnp.sum(products, axis=(1, 2)) / pairs
