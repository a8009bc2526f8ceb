"""Layers that every family shares, with PyTorch's semantics.

The reference toolboxes are written in PyTorch. Its paddings, initialisers and
running variance decide the accuracy and make weights interchangeable.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.models.batch_norm import BatchNorm
from kd_jax.models.convolution import convolve, max_pool

__all__ = [
  "BatchNorm",
  "Conv",
  "Initializer",
  "ModelOutputs",
  "Norm",
  "avg_pool",
  "channel_shuffle",
  "conv",
  "dense",
  "global_average_pool",
  "kaiming_normal_fan_out",
  "max_pool",
  "norm_parameters",
  "relu",
  "torch_default_init",
  "uniform_bias_init",
]

Initializer = Callable[..., jax.Array]
# How blocks receive their layers: `conv(x, features, kernel_size, name=...)`
# and `norm(name=...)(x, train=...)`.
Conv = Callable[..., jax.Array]
Norm = Callable[..., Callable[..., jax.Array]]

# kaiming_uniform(a=sqrt(5)), PyTorch's default for convolutions and linear
# layers: uniform within +-1/sqrt(fan_in).
torch_default_init = nn.initializers.variance_scaling(
  1.0 / 3.0, "fan_in", "uniform"
)
# kaiming_normal(mode="fan_out", nonlinearity="relu").
kaiming_normal_fan_out = nn.initializers.variance_scaling(
  2.0, "fan_out", "normal"
)


class ModelOutputs(NamedTuple):
  """What every model returns.

  Attributes:
    logits: [B, num_classes] float32.
    features: named maps in forward order, all [B, H, W, C]: `stem`,
      `stage1`..`stageN` (after the activation), `stem_preact`,
      `stage1_preact`.. (before it) where the family has them, `last` (the map
      that `Classifier.pool` turns into `pooled`), and `pooled` [B, C], which
      feeds the classifier. A transformer has its patches' tokens as maps, after
      every block too (`block1`..), and may have `class_token1`.. [B, C], its
      class token after each stage.
  """

  logits: jax.Array
  features: dict[str, jax.Array]

  def stages(self, *, stem: bool = False) -> list[jax.Array]:
    """The maps stage1..stageN, with `stem` before them if asked for."""
    maps = [self.features["stem"]] if stem else []
    index = 1
    while f"stage{index}" in self.features:
      maps.append(self.features[f"stage{index}"])
      index += 1
    return maps

  def checked(self) -> "ModelOutputs":
    """Checks the ranks, so that no map is broadcast by mistake.

    Returns:
      Itself.

    Raises:
      ValueError: if a map is not [B, H, W, C], or `pooled` or the logits are
        not [B, C].
    """
    for name, array in {**self.features, "logits": self.logits}.items():
      is_map = name == "last" or name.startswith(("stem", "stage", "block"))
      rank = 4 if is_map else 2 if name in ("pooled", "logits") else None
      if rank is not None and len(array.shape) != rank:
        axes = "batch, height, width, channels" if is_map else "batch, channels"
        raise ValueError(
          f"a network's {name}: expected [{axes}], got shape {array.shape}"
        )
    return self


def uniform_bias_init(fan_in: int) -> Initializer:
  """PyTorch's default bias: uniform within +-1/sqrt(fan_in)."""
  bound = 1.0 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def conv(
  x: jax.Array,
  features: int,
  kernel_size: int,
  *,
  name: str,
  strides: int = 1,
  padding: int = 0,
  groups: int = 1,
  use_bias: bool = False,
  kernel_init: Initializer = torch_default_init,
  bias_init: Initializer | None = None,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Convolves `x` [B, H, W, C]; call it inside a compact method.

  Padding is explicit because "SAME" shifts by one pixel at stride 2.
  """
  fan_in = kernel_size * kernel_size * x.shape[-1] // groups
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=(strides, strides),
    padding=((padding, padding), (padding, padding)),
    feature_group_count=groups,
    use_bias=use_bias,
    kernel_init=kernel_init,
    bias_init=bias_init or uniform_bias_init(fan_in),
    dtype=dtype,
    conv_general_dilated=convolve,
    name=name,
  )(x)


def dense(
  x: jax.Array,
  features: int,
  *,
  name: str,
  kernel_init: Initializer = torch_default_init,
  bias_init: Initializer | None = None,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Linear layer on the last axis of `x`; call it inside a compact method."""
  return nn.Dense(
    features,
    kernel_init=kernel_init,
    bias_init=bias_init or uniform_bias_init(x.shape[-1]),
    dtype=dtype,
    name=name,
  )(x)


def norm_parameters(
  params: Mapping[str, Any], *path: str
) -> tuple[jax.Array, jax.Array]:
  """Scale and bias [C] of the BatchNorm at a path.

  Raises:
    ValueError: if it is folded.
  """
  for name in path:
    params = params[name]
  if "scale" not in params:
    raise ValueError(
      f"{'/'.join(path)}: expected a BatchNorm's scale and bias, got one folded"
      " into its convolution, which has lost them; take the weights from before"
      " folding"
    )
  return params["scale"], params["bias"]


def relu(x: jax.Array) -> jax.Array:
  """`nn.relu`; on CPUs in float32 where `x` is bfloat16.

  XLA for CPUs (JAX 0.11, 0.12) gives NaN where it fuses two bfloat16 maxima
  with one constant into a sum.
  """
  if x.dtype != jnp.bfloat16:
    return nn.relu(x)

  def in_float32(x):
    return nn.relu(x.astype(jnp.float32)).astype(x.dtype)

  return jax.lax.platform_dependent(x, cpu=in_float32, default=nn.relu)


def global_average_pool(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, C] in float32.

  Raises:
    ValueError: if `x` has another rank.
  """
  if x.ndim != 4:
    raise ValueError(
      f"expected a map [batch, height, width, channels], got shape {x.shape}"
    )
  return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def avg_pool(
  x: jax.Array, window: int, *, strides: int, padding: int = 0
) -> jax.Array:
  """Mean over square windows; padded zeros count, as in PyTorch."""
  pad: Sequence[tuple[int, int]] = ((padding, padding), (padding, padding))
  return nn.avg_pool(x, (window, window), (strides, strides), pad)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
  """Interleaves the channels of `groups` equal groups (ShuffleNet, 2018)."""
  *outer, channels = x.shape
  x = x.reshape(*outer, groups, channels // groups)
  return jnp.swapaxes(x, -1, -2).reshape(*outer, channels)
