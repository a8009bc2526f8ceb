"""Models as StableHLO programs, which run without this package.

A program takes uint8 images [B, H, W, 3] of any B, normalises them itself and
returns float32 logits [B, K]. It is a file of `jax.export`:

    jax.export.deserialize(file.read_bytes()).call(images)

with the weights inside, or `.call(weights, images)` with the weights beside,
a flat dict of arrays.
"""

from typing import Any

import jax
import jax.export
import numpy as np
from flax import traverse_util

from kd_jax.interop import model as model_lib

# Every program holds code for both: models train on one and serve on either.
PLATFORMS = ("cpu", "cuda")


def flat_weights(variables: Any) -> dict[str, np.ndarray]:
  """Flatten variables to {"params/conv1/kernel": array}."""
  flat = traverse_util.flatten_dict(variables, sep="/")
  return {name: np.asarray(leaf) for name, leaf in flat.items()}


def serialize(model: model_lib.Model, *, weights_inside: bool) -> bytes:
  """Make the program of a model.

  Args:
    model: to export.
    weights_inside: whether the weights are constants of the program; else it
      takes `flat_weights(model.variables)` as its first argument.

  Returns:
    The content of the file.
  """
  (batch,) = jax.export.symbolic_shape("batch")
  shape = (batch, *model.card["image_shape"])
  images = jax.ShapeDtypeStruct(shape, np.uint8)
  program: Any
  arguments: list[Any] = [images]
  if weights_inside:
    variables = jax.tree.map(np.asarray, model.variables)

    def program(images):
      return model.apply(variables, images)

  else:

    def program(weights, images):
      nested = traverse_util.unflatten_dict(weights, sep="/")
      return model.apply(nested, images)

    flat = flat_weights(model.variables)
    arguments.insert(
      0, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flat.items()}
    )
  exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)
  return bytes(exported(*arguments).serialize())
