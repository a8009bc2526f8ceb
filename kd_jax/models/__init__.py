"""Networks by name: `create("resnet8x4", 100)`, and `names()`.

One family a file. To add one: a file with a `Classifier` and its `ENTRIES`, and
its line in `MODELS` below. A network from elsewhere needs neither: name it
"package.module:attribute", an `Entry` or a builder of a `Classifier`. The names
here are those of the reference toolboxes, SimKD and RepDistiller.

`layers`, `blocks`, `batch_norm` and `convolution` are what families are made
of; `fold` prepares frozen networks. The package imports only jax, numpy, flax,
`kd_jax.distributed.collectives` and `kd_jax.registry`.
"""

import numbers
from typing import Any

import jax.numpy as jnp

from kd_jax import registry
from kd_jax.models import (
  mobilenetv2,
  resnet,
  resnet_cifar,
  shufflenetv1,
  shufflenetv2,
  vgg,
  wrn,
)
from kd_jax.models.base import Classifier
from kd_jax.models.entry import Entry, WeightNames
from kd_jax.models.layers import ModelOutputs

__all__ = [
  "MODELS",
  "Classifier",
  "Entry",
  "ModelOutputs",
  "WeightNames",
  "create",
  "entry",
  "names",
]

# Networks whose names begin with an underscore are for tests.
MODELS: dict[str, Entry] = {
  **resnet_cifar.ENTRIES,
  **wrn.ENTRIES,
  **vgg.ENTRIES,
  **mobilenetv2.ENTRIES,
  **shufflenetv1.ENTRIES,
  **shufflenetv2.ENTRIES,
  **resnet.ENTRIES,
}


def names() -> list[str]:
  """Lists the networks of the table, in its order."""
  return [name for name in MODELS if not name.startswith("_")]


def entry(name: str) -> Entry:
  """Looks up what belongs to a network.

  Args:
    name: one of `names()`, or "package.module:attribute", an `Entry` or a
      builder for one with the default facts.

  Raises:
    ValueError: if the name is unknown or cannot be imported.
  """
  found = registry.resolve(name, MODELS, what="model")
  return found if isinstance(found, Entry) else Entry(found)


def create(
  name: str,
  num_classes: int,
  *,
  dtype: Any = jnp.float32,
  bn_axis_name: str | None = None,
) -> Classifier:
  """Builds a network.

  Args:
    name: one of `names()`, or "package.module:attribute", see `entry`.
    num_classes: width of the logits.
    dtype: of the computation, float32 or bfloat16 (an object or its name);
      parameters, statistics and logits are always float32.
    bn_axis_name: mapped axis over which BatchNorm shares its statistics.

  Returns:
    A linen module: `model.init(key, images, train=False)`,
    `model.apply(variables, images, train=False) -> ModelOutputs`,
    `model.pool(last) -> pooled` and `model.classify(params, pooled) -> logits`.

  Raises:
    ValueError: if the name is unknown, another argument makes no sense, or the
      builder returns something else than a `Classifier`.
  """
  builder = entry(name).builder
  is_count = isinstance(num_classes, numbers.Integral) and num_classes >= 1
  if not is_count or isinstance(num_classes, bool):
    raise ValueError(
      f"num_classes must be an integer of at least 1, got {num_classes!r};"
      " pass the data set's number of labels, such as 100"
    )
  compute = jnp.dtype(dtype)
  if not jnp.issubdtype(compute, jnp.floating):
    raise ValueError(
      f"dtype must be a float type, got {compute}; use float32 or bfloat16"
    )
  try:
    model = builder(
      num_classes=int(num_classes), dtype=compute, bn_axis_name=bn_axis_name
    )
  except TypeError as error:
    raise ValueError(
      f"model {name!r}: expected a builder that takes num_classes, dtype and"
      f" bn_axis_name, got an error: {error}"
    ) from error
  if not isinstance(model, Classifier):
    raise ValueError(
      f"model {name!r}: expected a builder of a kd_jax.models.Classifier, it"
      f" returned {type(model).__name__}"
    )
  return model
