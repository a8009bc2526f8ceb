"""What every image classifier has in common."""

import abc
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.models import layers


class Classifier(nn.Module, abc.ABC):
  """A network that maps images to logits and named features.

  A family implements `__call__` as a compact method that begins with
  `self.prepare(images)`, ends in `self.finish(features, last)`, and names its
  classifier in `head`. Modules carry the reference checkpoints' names with "."
  written as "_", so that `kd_jax.interop` can exchange weights; an `Entry` has
  the names that differ.

  Attributes:
    num_classes: width of the logits.
    dtype: of the computation and of the feature maps. Parameters, BatchNorm's
      statistics, `pooled` and logits are always float32.
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
  def pool(self, last: jax.Array) -> jax.Array:
    """Turns the map `last` into the feature that the classifier reads.

    A plain function of arrays: the module need not be bound. By default the
    mean over height and width.

    Args:
      last: [B, H, W, C], any float type.

    Returns:
      [B, C] float32.

    Raises:
      ValueError: if `last` has another rank.
    """
    return layers.global_average_pool(last)

  @nn.nowrap
  def classify(self, params: Mapping[str, Any], pooled: jax.Array) -> jax.Array:
    """Applies the model's classifier to any pooled feature.

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
        f"the classifier takes {kernel.shape[0]} pooled channels, got features"
        f" of shape {pooled.shape}; project them to {kernel.shape[0]} channels"
        " first"
      )
    logits = jnp.dot(pooled.astype(jnp.float32), kernel)
    return logits + jnp.expand_dims(bias, range(pooled.ndim - 1))

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """Reads the BatchNorm just before the ReLU of each stage.

    Its scale and bias are each channel's deviation and mean before the ReLU,
    but for what a shortcut adds. OFD reads the teacher's. A plain function of
    arrays, which each family has for itself.

    Args:
      params: the model's parameters, not folded.

    Returns:
      (scale [C], bias [C]) of stage1..stageN. Both are 0 for a channel that no
      BatchNorm but an earlier ReLU made.

    Raises:
      ValueError: if the family does not have it, or BatchNorm is folded.
    """
    raise ValueError(
      f"{type(self).__name__}: expected a network that tells which BatchNorm"
      " comes before the ReLU of its stages, it has no method stage_norms; add"
      " it, or choose another teacher or method"
    )

  @nn.nowrap
  def make_conv(self, **defaults: Any) -> layers.Conv:
    """`layers.conv` in this model's dtype."""
    return functools.partial(layers.conv, dtype=self.dtype, **defaults)

  @nn.nowrap
  def make_norm(self) -> layers.Norm:
    """`layers.BatchNorm` in this model's dtype, over its axis."""
    return functools.partial(
      layers.BatchNorm, axis_name=self.bn_axis_name, dtype=self.dtype
    )

  @nn.nowrap
  def prepare(self, images: jax.Array) -> jax.Array:
    """Checks the images and casts them to the computation's dtype."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] != 3:
      raise ValueError(
        f"expected images [batch, height, width, 3], got shape {shape}; move"
        " the channels last and add the batch axis"
      )
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f"expected normalised float images, got {images.dtype}; compute"
        " (x / 255 - mean) / std first"
      )
    return images.astype(self.dtype)

  def finish(
    self,
    features: dict[str, jax.Array],
    last: jax.Array,
    *,
    kernel_init: layers.Initializer = layers.torch_default_init,
    bias_init: layers.Initializer | None = None,
    dropout_rate: float = 0.0,
  ) -> layers.ModelOutputs:
    """Pools `last` and classifies; call it in a compact method.

    Args:
      features: the maps before `last`, in forward order.
      last: [B, H, W, C].
      kernel_init: of the classifier.
      bias_init: of the classifier; None: PyTorch's default.
      dropout_rate: of what the classifier reads, `pooled` itself has none; give
        a rate in training only.
    """
    if 0 in last.shape[1:3]:
      raise ValueError(
        f"the images are too small: the last map has shape {last.shape}; use"
        " larger images (32x32)"
      )
    pooled = self.pool(last)
    logits = layers.dense(
      self._drop(pooled, dropout_rate),
      self.num_classes,
      name=self.head,
      kernel_init=kernel_init,
      bias_init=bias_init,
    )
    return layers.ModelOutputs(
      logits, {**features, "last": last, "pooled": pooled}
    ).checked()

  def _drop(self, x: jax.Array, rate: float) -> jax.Array:
    """Zeroes each value with this probability and scales the others up."""
    if rate == 0 or self.is_initializing():
      return x
    if not self.has_rng("dropout"):
      raise ValueError(
        f'{type(self).__name__} needs the random stream "dropout" to train, got'
        ' none; pass rngs={"dropout": key} to apply'
      )
    drop = nn.Dropout(rate, deterministic=False, name="dropout")
    devices = collectives.axis_size(self.bn_axis_name)
    if devices == 1:
      return drop(x)
    # Drawn for the batch of all devices, of which this one takes its rows: the
    # result does not depend on their number.
    scale = drop(jnp.ones((devices * len(x), *x.shape[1:]), x.dtype))
    first = collectives.axis_index(self.bn_axis_name) * len(x)
    return x * jax.lax.dynamic_slice_in_dim(scale, first, len(x))


def count_parameters(params: Any) -> int:
  """Counts the scalars of a tree of arrays."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
