"""Models as StableHLO programs, which run without this package.

A program takes uint8 images [B, H, W, 3] of any B, normalises them itself and
returns float32 logits [B, K]. It is a file of `jax.export`:

    jax.export.deserialize(file.read_bytes()).call(images)

with the weights inside, or `.call(weights, images)` with the weights beside,
a flat dict of arrays. Its digest stands behind its end.
"""

import pathlib
from typing import Any

import jax
import jax.export
import numpy as np
from flax import traverse_util

from kd_jax.interop import digests
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
  return digests.append(bytes(exported(*arguments).serialize()))


def read(path: pathlib.Path) -> jax.export.Exported:
  """Read a program, after a check of its digest if it has one.

  Raises:
    ValueError: if it is damaged.
  """
  content = path.read_bytes()
  digests.check_appended(content, path)
  try:
    return jax.export.deserialize(bytearray(content))
  # Damage surfaces as whatever the first misread byte leads to.
  except Exception as error:
    raise ValueError(
      f"{path}: expected a StableHLO program of jax.export, got a file that is"
      f" cut short or damaged ({type(error).__name__}). Export or copy it again"
    ) from error
