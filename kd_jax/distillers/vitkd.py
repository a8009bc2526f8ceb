"""ViTKD: features of vision transformers (Yang et al., 2022)."""

from typing import final

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models import layers
from kd_jax.models.layers import ModelOutputs

# Blocks that are mimicked, from the first.
LOW = 2
# Standard deviation of the mask token at the start.
TOKEN_STD = 0.02


@final
class ViTKD(base.Distiller):
  """Mimics a transformer's first blocks, and generates its last.

  Both networks give their patches as grids `block1`.. of one size. The
  student's last block loses a random part of its tokens to a learned one; two
  convolutions then generate the teacher's.

  A step needs the random stream "distiller", unless the batch has
  `noise` [B, H, W], whose largest values are masked, as in a replay.

  Attributes:
    alpha: weight of the first blocks.
    beta: weight of the last.
    mask_ratio: share of masked tokens.
  """

  alpha: float = 3e-5
  beta: float = 3e-6
  mask_ratio: float = 0.5

  @nn.compact
  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: base.Batch,
    *,
    teacher_head: base.Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.__call__`; "vitkd" is a term of training alone."""
    terms = self.logit_terms(student, teacher, batch)
    blocks_s = _blocks(student, "student")
    blocks_t = _blocks(teacher, "teacher")
    width = blocks_t[-1].shape[-1]

    def align(x: jax.Array, target: jax.Array, name: str) -> jax.Array:
      x, channels = x.astype(self.dtype), target.shape[-1]
      return layers.dense(x, channels, name=name, dtype=self.dtype)

    low = [align(blocks_s[i], blocks_t[i], f"low{i}") for i in range(LOW)]
    high = align(blocks_s[-1], blocks_t[-1], "high")
    token = self.param(
      "mask_token", nn.initializers.normal(TOKEN_STD), (width,), jnp.float32
    )
    if not train:
      return base.DistillOutput(student.logits, terms)
    mask = self._mask(batch, high.shape[:3])
    x = jnp.where(mask[..., None], token.astype(self.dtype), high)
    for i in range(2):
      x = layers.relu(x) if i else x
      x = layers.conv(
        x,
        width,
        3,
        name=f"generate{i}",
        padding=1,
        use_bias=True,
        dtype=self.dtype,
      )
    terms["vitkd"] = losses.vitkd_loss(
      low,
      blocks_t[:LOW],
      x,
      blocks_t[-1],
      mask.astype(jnp.float32),
      alpha=self.alpha,
      beta=self.beta,
      mask_ratio=self.mask_ratio,
    )
    return base.DistillOutput(student.logits, terms)

  def _mask(self, batch: base.Batch, shape: tuple[int, ...]) -> jax.Array:
    """Whether each token [B, H, W] is masked; by an example's own draw."""
    noise = batch.get("noise")
    if noise is None:
      if "index" not in batch:
        raise ValueError(
          "vitkd: expected batch['index'], the positions of the examples in the"
          f" training set [B], got only {', '.join(sorted(batch))}"
        )
      key = self.make_rng("distiller")
      noise = jax.vmap(
        lambda i: jax.random.uniform(jax.random.fold_in(key, i), shape[1:])
      )(batch["index"])
    flat = noise.reshape(shape[0], -1)
    kept = int(flat.shape[1] * (1 - self.mask_ratio))
    rank = jnp.argsort(jnp.argsort(flat, axis=1), axis=1)
    return (rank >= kept).reshape(shape)


def _blocks(output: ModelOutputs, whose: str) -> list[jax.Array]:
  """The grids of all blocks; a ValueError for a network without."""
  found: list[jax.Array] = []
  while f"block{len(found) + 1}" in output.features:
    found.append(output.features[f"block{len(found) + 1}"])
  if len(found) < LOW:
    raise ValueError(
      f"vitkd: expected two transformers, with the features block1 to"
      f" block{LOW}, got a {whose} with {', '.join(output.features)}. Choose"
      " other networks, or another method"
    )
  return found
