"""What every image classifier of the package has in common."""

import abc
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.models import layers

# How blocks receive their layers: `conv(x, features, kernel_size, name=...)`
# and `norm(name=...)(x, train=...)`.
Conv = Callable[..., jax.Array]
Norm = Callable[..., Callable[..., jax.Array]]


class Classifier(nn.Module, abc.ABC):
  """A network that maps images to logits and named features.

  A family implements `__call__` as a compact method that ends in
  `self._finish(features, last)`, and names its classifier in `head`. Modules
  carry the reference checkpoints' names with "." written as "_", which is all
  that `kd_jax.interop.pytorch` needs to exchange weights with them; where a
  family shares its blocks with another, `kd_jax.interop.dialects` has the rule.

  Attributes:
    num_classes: width of the logits.
    dtype: of the computation and of the feature maps. Parameters, BatchNorm's
      statistics, `pooled` and logits are float32 whatever it is.
    bn_axis_name: mapped axis over which BatchNorm shares its statistics.
  """

  num_classes: int
  dtype: Any = jnp.float32
  bn_axis_name: str | None = None

  head: ClassVar[str]

  @abc.abstractmethod
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """Classifies `images` [B, H, W, 3], float and already normalised.

    Args:
      images: the batch.
      train: whether BatchNorm uses (and updates) the batch's statistics; then
        pass `mutable=["batch_stats"]` to `apply`, and to a model that has
        dropout also `rngs={"dropout": key}`.

    Returns:
      Logits [B, num_classes] and the features that `ModelOutputs` describes.

    Raises:
      ValueError: if the images are not such an array, or too small, or if the
        stream "dropout" is missing.
    """

  @nn.nowrap
  def classify(self, params: Mapping[str, Any], pooled: jax.Array) -> jax.Array:
    """The model's own classifier on anybody's pooled features.

    A plain function of arrays, logits = pooled W + b: the module need not be
    bound. SRRL and SimKD apply the teacher's classifier to the student.

    Args:
      params: the model's parameters, `variables["params"]`.
      pooled: [..., C], any float type.

    Returns:
      [..., num_classes] float32.

    Raises:
      ValueError: if C is not what the classifier takes.
    """
    kernel, bias = params[self.head]["kernel"], params[self.head]["bias"]
    if pooled.shape[-1] != kernel.shape[0]:
      raise ValueError(
        f"The classifier takes {kernel.shape[0]} pooled channels, got"
        f" features of shape {pooled.shape}; project them to"
        f" {kernel.shape[0]} channels first."
      )
    return jnp.dot(pooled.astype(jnp.float32), kernel) + bias

  @nn.nowrap
  def _conv(self, **defaults: Any) -> Conv:
    """`layers.conv` in this model's dtype."""
    return functools.partial(layers.conv, dtype=self.dtype, **defaults)

  @nn.nowrap
  def _norm(self) -> Norm:
    """`layers.BatchNorm` in this model's dtype, over its axis."""
    return functools.partial(
      layers.BatchNorm, axis_name=self.bn_axis_name, dtype=self.dtype
    )

  @nn.nowrap
  def _prepare(self, images: jax.Array) -> jax.Array:
    """Checks the images and casts them to the computation's dtype."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] != 3:
      raise ValueError(
        f"Models take images [batch, height, width, 3], got {shape};"
        " move the channels last and add the batch axis."
      )
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f"Models take normalised float images, got {images.dtype}; compute"
        " (x / 255 - mean) / std first."
      )
    return images.astype(self.dtype)

  def _finish(
    self,
    features: dict[str, jax.Array],
    last: jax.Array,
    *,
    kernel_init: layers.Initializer = layers.torch_default_init,
    bias_init: layers.Initializer | None = None,
    dropout_rate: float = 0.0,
  ) -> layers.ModelOutputs:
    """Pools `last` globally and classifies; call it in a compact method.

    With a `dropout_rate`, the classifier (and nothing else) sees the pooled
    features after dropout: give a rate in training only.
    """
    if 0 in last.shape[1:3]:
      raise ValueError(
        "The images are too small: nothing is left of them at the last"
        f" stage, of shape {last.shape}; use larger images (32x32)."
      )
    pooled = layers.global_average_pool(last)
    logits = layers.dense(
      self._drop(pooled, dropout_rate),
      self.num_classes,
      name=self.head,
      kernel_init=kernel_init,
      bias_init=bias_init,
    )
    return layers.ModelOutputs(
      logits, {**features, "last": last, "pooled": pooled}
    )

  def _drop(self, x: jax.Array, rate: float) -> jax.Array:
    """Zeroes each value with this probability and scales the others up."""
    if rate == 0 or self.is_initializing():
      return x
    if not self.has_rng("dropout"):
      raise ValueError(
        f"{type(self).__name__} has dropout and trains with the random stream"
        ' "dropout", got none; pass rngs={"dropout": key} to apply.'
      )
    return nn.Dropout(rate, deterministic=False, name="dropout")(x)


def count_parameters(params: Any) -> int:
  """Count the scalars of a tree of arrays."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
