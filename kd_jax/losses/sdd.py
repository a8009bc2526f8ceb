"""SDD: scaled decoupled distillation."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax, spatial
from kd_jax.losses.dkd import dkd_loss
from kd_jax.losses.kd import kd_loss
from kd_jax.losses.nkd import nkd_loss


def sdd_loss(
  student_map: jax.Array,
  teacher_map: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array,
  scales: tuple[int, ...] = (1, 2, 4),
  alpha: float | jax.Array | None = None,
  beta: float | jax.Array | None = None,
  gamma: float | jax.Array | None = None,
  standardize: bool = False,
) -> jax.Array:
  """KD, DKD or NKD of the predictions from each region of an image.

  The mean over all regions of w * loss(region): each map of logits is
  average-pooled to n x n regions for every n of `scales`, from the largest.
  w is 2 where the teacher is right about the region and wrong about the image,
  or the reverse, else 1.

  Args:
    student_map: [B, H, W, C], logits of each position: the classifier applied
      to every position of the last map.
    teacher_map: [B, H', W', C], likewise.
    labels: [B], integers in [0, C); under jit, others give NaN.
    temperature: T, above 0.
    scales: numbers of regions along a side; each divides the largest.
    alpha: with `beta`, the weights of DKD's parts, see `dkd_loss`.
    beta: see `alpha`.
    gamma: weight of NKD's second part, see `nkd_loss`. Without these: KD.
    standardize: whether a region's logits are standardised.

  Returns:
    [B] float32, in nats times T^2.

  Raises:
    ValueError: for other ranks, unequal batches or numbers of classes, or for
      weights of both DKD and NKD.

  Source: Wei, Luo and Luo, "Scaled Decoupled Distillation", CVPR 2024.

  >>> import jax.numpy as jnp
  >>> z = jnp.arange(48.0).reshape(1, 4, 4, 3)
  >>> sdd_loss(z, z, jnp.array([0]), temperature=4.0).tolist()
  [0.0]
  """
  student = checks.float_array("student_map", student_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_batch("student_map", student, "teacher_map", teacher)
  checks.same_width("student_map", student, "teacher_map", teacher)
  classes = student.shape[-1]
  labels = checks.labels_of(labels, student[:, 0, 0])
  z_s, z_t = (_regions(x, scales) for x in (student, teacher))
  image = jnp.mean(teacher, axis=(1, 2))
  right_locally = jnp.argmax(z_t, axis=-1) == labels[:, None]
  right = jnp.argmax(image, axis=-1) == labels
  weight = jnp.where(right_locally == right[:, None], 1.0, 2.0)
  count = z_s.shape[1]
  flat_s, flat_t = (z.reshape(-1, classes) for z in (z_s, z_t))
  if standardize:
    flat_s, flat_t = map(softmax.standardize_logits, (flat_s, flat_t))
  flat_labels = jnp.repeat(labels, count)
  if gamma is not None:
    if alpha is not None or beta is not None:
      raise ValueError(
        "sdd: expected gamma (NKD) or alpha and beta (DKD), got"
        f" gamma {gamma}, alpha {alpha} and beta {beta}"
      )
    value = nkd_loss(
      flat_s, flat_t, flat_labels, temperature=temperature, gamma=gamma
    )
  elif alpha is None or beta is None:
    value = kd_loss(flat_s, flat_t, temperature=temperature)
    exists = jnp.where(labels < classes, 1.0, jnp.nan)
    weight *= exists[:, None]
  else:
    value = dkd_loss(
      flat_s,
      flat_t,
      flat_labels,
      temperature=temperature,
      alpha=alpha,
      beta=beta,
    )
  return jnp.mean(weight * value.reshape(-1, count), axis=1)


def _regions(x: jax.Array, scales: tuple[int, ...]) -> jax.Array:
  """Average-pools [B, H, W, C] to [B, regions, C], all scales together."""
  finest = max(scales)
  x = spatial.adaptive_average_pool(x, (finest, finest))
  pooled = []
  for n in scales:
    if finest % checks.count("scales", n):
      raise ValueError(
        f"scales: expected divisors of the largest, {finest}, got {n}"
      )
    pooled.append(spatial.adaptive_average_pool(x, (n, n)))
  batch, classes = x.shape[0], x.shape[-1]
  return jnp.concatenate([p.reshape(batch, -1, classes) for p in pooled], 1)
