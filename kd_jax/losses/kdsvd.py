"""KDSVD: knowledge distillation by singular value decomposition."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial

# The student's singular vectors among which the teacher's is looked for.
_CANDIDATES = 4
# Of the largest squared singular value: a smaller one, or a smaller difference
# of two, is rounding.
_ROUNDING = 1e-6

_einsum = functools.partial(jnp.einsum, precision=spatial.HIGHEST)


def kdsvd_loss(
  student_maps: Sequence[jax.Array], teacher_maps: Sequence[jax.Array]
) -> jax.Array:
  """Difference of how the singular vectors of consecutive maps are related.

  sum_l sum_ij (g(v_i^l - v_j^(l-1)) - g(w_i^l - w_j^(l-1)))^2 with
  g(x) = exp(-x^2 / 8). w is the teacher's first right singular vector of the
  map as a matrix [H * W, C], its sign such that its entries sum to more than 0.
  v is the one of the student's first four that is most parallel to w, its sign
  such that they point alike. A map of zeros has the vector 0. The gradient
  leaves out directions whose singular values rounding cannot tell apart.

  Args:
    student_maps: at least two maps [B, H, W, C].
    teacher_maps: as many maps of equal channels; sizes may differ.

  Returns:
    [B] float32, without a unit.

  Raises:
    ValueError: for other ranks, unequal batches, channels or numbers of maps,
      or a single map.

  Source: Lee et al., "Self-supervised Knowledge Distillation Using Singular
  Value Decomposition", ECCV 2018, with one vector for each map as in
  RepDistiller. Departure: signs are fixed; there, they are LAPACK's.

  >>> import jax.numpy as jnp
  >>> a = jnp.arange(1.0, 9.0).reshape(1, 2, 2, 2)
  >>> kdsvd_loss([a, a], [3 * a, -a]).round(4).tolist()
  [0.0]
  """
  students = checks.maps("student_maps", student_maps)
  teachers = checks.maps("teacher_maps", teacher_maps)
  checks.same_number("student_maps", students, "teacher_maps", teachers)
  if len(students) < 2:
    raise ValueError(
      "student_maps: expected at least two maps, got one; pass the maps of"
      " consecutive layers"
    )
  loss = jnp.zeros(students[0].shape[0], jnp.float32)
  before: tuple[jax.Array, ...] = ()
  for i, (student, teacher) in enumerate(zip(students, teachers)):
    checks.same_batch("student_maps", student, "teacher_maps", teacher)
    if student.shape[-1] != teacher.shape[-1]:
      raise ValueError(
        f"student_maps[{i}] and teacher_maps[{i}]: expected equal channels, got"
        f" {student.shape[-1]} and {teacher.shape[-1]}; choose two networks of"
        " equal channels, or compare image columns (KDSVD's over='width')"
      )
    target = _vector(teacher, jnp.ones_like(teacher[:, 0, 0]), candidates=1)
    vector = _vector(student, target, candidates=_CANDIDATES)
    if before:
      s, t = (
        jnp.expm1(-jnp.square(x[:, :, None] - y[:, None]) / 8)
        for x, y in zip((vector, target), before)
      )
      loss += jnp.sum(jnp.square(s - t), axis=(1, 2))
    before = vector, target
  return loss


@functools.partial(jax.jit, static_argnames="candidates")
def _vector(x: jax.Array, target: jax.Array, *, candidates: int) -> jax.Array:
  """The right singular vector most parallel to a target.

  Its derivative is (s^2 - X^T X)^+ d(X^T X) v for the singular value s. The
  decomposition's own divides by zero where two singular values are equal.

  Args:
    x: [B, H, W, C].
    target: [B, C], which also gives the sign.
    candidates: how many of the first vectors to choose from.

  Returns:
    [B, C]; 0 for a map of zeros.
  """
  x = spatial.unit_range(x, (1, 2, 3))
  x = x.reshape(x.shape[0], -1, x.shape[-1])
  squares, vectors = _decompose(jax.lax.stop_gradient(x))
  visible = squares > _ROUNDING * squares[:, :1]
  cosines = _einsum("brc,bc->br", vectors, jax.lax.stop_gradient(target))
  numbers = jnp.arange(squares.shape[1])[None]
  fitness = jnp.where(visible & (numbers < candidates), jnp.abs(cosines), -1.0)
  chosen = numbers == jnp.argmax(fitness, axis=1, keepdims=True)
  chosen &= visible
  signs = jnp.where(cosines < 0, -1.0, 1.0)
  vector = _einsum("brc,br->bc", vectors, jnp.where(chosen, signs, 0.0))
  square = jnp.sum(jnp.where(chosen, squares, 0.0), axis=1, keepdims=True)
  # What (s^2 - X^T X)^+ takes from each vector, beside the division by s^2.
  gaps = square - squares
  apart = jnp.abs(gaps) > _ROUNDING * squares[:, :1]
  taken = jnp.where(apart, -squares / jnp.where(apart, gaps, 1.0), 1.0)
  # The vector times s^2, plus its error times the gap: a Newton step too.
  image = _einsum("bpc,bp->bc", x, _einsum("bpc,bc->bp", x, vector))
  parts = taken * _einsum("brc,bc->br", vectors, image)
  step = image - _einsum("brc,br->bc", vectors, parts)
  return vector + step / jnp.where(square > 0, square, 1.0)


def _decompose(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Squared singular values [B, R], largest first, and vectors [B, R, C].

  R is the smaller of P and C for `x` [B, P, C]: of the two products of `x` with
  itself, the smaller is decomposed.
  """
  if x.shape[1] >= x.shape[2]:
    squares, vectors = _eigh(_einsum("bpc,bpd->bcd", x, x))
    vectors = jnp.swapaxes(vectors, 1, 2)
  else:
    squares, left = _eigh(_einsum("bpc,bqc->bpq", x, x))
    vectors = spatial.l2_normalize(_einsum("bpc,bpr->brc", x, left))
  return jnp.maximum(squares[:, ::-1], 0.0), vectors[:, ::-1]


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues [B, N] and vectors [B, N, N] of symmetric [B, N, N].

  One matrix at a time on a CPU. Several batches at once can wait for each
  other's threads for ever there (JAX 0.10).
  """

  def batched(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(x)
    return values, vectors

  def single(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jax.lax.map(batched, x)
    return values, vectors

  values, vectors = jax.lax.platform_dependent(x, cpu=single, default=batched)
  return values, vectors
