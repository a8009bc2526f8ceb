"""mixup and CutMix of neighbours in a batch."""

import jax
import jax.numpy as jnp


def mix(
  key: jax.Array, images: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
  """Mixes every image with its neighbour: rows 2i and 2i + 1 of the batch.

  mixup (Zhang et al., ICLR 2018): x = lam x_a + (1 - lam) x_b with lam from
  Beta(alpha, alpha). CutMix (Yun et al., ICCV 2019): a box with 1 - lam of the
  area is copied from x_b to x_a; lam is then the area that is left of x_a. A
  batch has one lam and one box, as published; with both alphas, each method
  takes half of the batches. Batches are shuffled, so a neighbour is a random
  image, and it is on the same device.

  Args:
    key: the step's key, the same on every device.
    images: [B, H, W, C], float, B even.
    mixup: alpha; 0 leaves it out.
    cutmix: alpha; 0 leaves it out.

  Returns:
    The images [B, H, W, C], and lam, a float32 scalar: the weight of an image's
    own label.

  Raises:
    ValueError: if B is odd, or no alpha is above 0.
  """
  if len(images) % 2 or max(mixup, cutmix) <= 0:
    raise ValueError(
      "mix: expected an even number of images and an alpha above 0, got"
      f" {len(images)} images, mixup {mixup} and cutmix {cutmix}."
    )
  which_key, lam_key, box_key = jax.random.split(key, 3)
  neighbour = partner(images)
  height, width = images.shape[1:3]

  def blend():
    lam = jax.random.beta(lam_key, mixup, mixup)
    mixed = lam * images + (1 - lam) * neighbour
    return mixed.astype(images.dtype), lam

  def cut():
    lam = jax.random.beta(lam_key, cutmix, cutmix)
    sides = jnp.sqrt(1 - lam) * jnp.array([height, width], jnp.float32)
    centre = jax.random.uniform(box_key, (2,)) * jnp.array([height, width])
    low = jnp.clip(jnp.round(centre - sides / 2), 0, None)
    high = jnp.clip(
      jnp.round(centre + sides / 2), None, jnp.array([height, width])
    )
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= low[0]) & (rows < high[0]))[:, None] & (
      (columns >= low[1]) & (columns < high[1])
    )
    mixed = jnp.where(inside[:, :, None], neighbour, images)
    return mixed, 1 - jnp.mean(inside.astype(jnp.float32))

  if not cutmix:
    return blend()
  if not mixup:
    return cut()
  return jax.lax.cond(jax.random.bernoulli(which_key), blend, cut)


def partner(x: jax.Array) -> jax.Array:
  """Returns each row's neighbour: rows 2i and 2i + 1 of [B, ...] exchanged."""
  pairs = x.reshape(-1, 2, *x.shape[1:])
  return pairs[:, ::-1].reshape(x.shape)
