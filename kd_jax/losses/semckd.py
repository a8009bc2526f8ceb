"""SemCKD: cross-layer distillation with semantic calibration."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial


def semckd_attention(
  queries: jax.Array, keys: jax.Array, *, soft: float | jax.Array
) -> jax.Array:
  """Weight of each pair of a student and a teacher layer.

  softmax over teacher layers j of <q_bi, k_bj> / soft, per example.

  Args:
    queries: [B, S, D], one vector per student layer.
    keys: [B, T, D], one vector per teacher layer.
    soft: temperature of the softmax, above 0.

  Returns:
    [B, S, T] float32; every row over T sums to 1.

  Raises:
    ValueError: for other ranks, unequal B or D, or soft of 0 or less.

  Source: Chen et al., "Cross-Layer Distillation with Semantic Calibration",
  AAAI 2021, equation 7.
  """
  soft = checks.number("soft", soft, above=0)
  queries = checks.float_array("queries", queries, rank=3)
  keys = checks.float_array("keys", keys, rank=3)
  checks.same_batch("queries", queries, "keys", keys)
  checks.same_width("queries", queries, "keys", keys)
  energy = jnp.einsum("bsd,btd->bst", queries, keys, precision=spatial.HIGHEST)
  return jax.nn.softmax(energy / soft, axis=-1)


def semckd_loss(
  projections: Sequence[Sequence[jax.Array]],
  targets: Sequence[Sequence[jax.Array]],
  attention: jax.Array,
) -> jax.Array:
  """Attention-weighted squared errors over all pairs of layers.

  (1 / S) * sum_ij attention_ij * mean over H, W, C of (P_ij - t_ij)^2.

  Args:
    projections: P, S rows of T maps [B, H_ij, W_ij, C_j]: student layer i
      projected for teacher layer j.
    targets: t, the teacher maps of the same shapes.
    attention: [B, S, T], see `semckd_attention`.

  Returns:
    [B] float32, in squared units of the maps.

  Raises:
    ValueError: for other ranks, unequal shapes, or an attention that does not
      fit the numbers of layers.

  Source: Chen et al., "Cross-Layer Distillation with Semantic Calibration",
  AAAI 2021, equation 8. Departure: divided by S, as in the authors' code.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 2, 2, 3))
  >>> weights = jnp.array([[[0.25, 0.75]]])
  >>> semckd_loss([[a, a]], [[a, 3 * a]], weights).tolist()
  [3.0]
  """
  attention = checks.float_array("attention", attention, rank=3)
  layers = (len(projections), len(projections[0]) if projections else 0)
  if attention.shape[1:] != layers:
    raise ValueError(
      f"attention: expected [B, {layers[0]}, {layers[1]}] for {layers[0]} "
      f"student and {layers[1]} teacher layers, got {attention.shape}"
    )
  checks.same_number("projections", projections, "targets", targets)
  rows = []
  for row_p, row_t in zip(projections, targets):
    checks.same_number("projections", row_p, "targets", row_t)
    checks.same_number("projections[0]", projections[0], "projections", row_p)
    errors = []
    for p, t in zip(row_p, row_t):
      p = checks.float_array("projections", p, rank=4)
      t = checks.float_array("targets", t, rank=4)
      checks.same_shape("projections", p, "targets", t)
      errors.append(spatial.mean_square(p, t))
    rows.append(jnp.stack(errors, axis=-1))
  errors_bst = jnp.stack(rows, axis=1)
  checks.same_batch("projections", errors_bst, "attention", attention)
  return jnp.sum(attention * errors_bst, axis=(1, 2)) / layers[0]
