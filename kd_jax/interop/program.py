"""Models as StableHLO programs, which need nothing of this package to run.

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

from kd_jax.interop import model as model_lib

# Of one program: what a model is trained on, and what serves it.
PLATFORMS = ("cpu", "cuda")


def flatten(variables: Any) -> dict[str, np.ndarray]:
  """Variables as {"params/conv1/kernel": array}."""
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in leaves
  }


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
  nested: dict[str, Any] = {}
  for name, leaf in flat.items():
    *path, last = name.split("/")
    place = nested
    for key in path:
      place = place.setdefault(key, {})
    place[last] = leaf
  return nested


def serialize(model: model_lib.Model, *, weights_inside: bool) -> bytes:
  """The program of a model.

  Args:
    model: to export.
    weights_inside: whether the weights are constants of the program; else it
      takes `flatten(model.variables)` as its first argument.

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
      return model.apply(_nested(weights), images)

    flat = flatten(model.variables)
    arguments.insert(
      0, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flat.items()}
    )
  exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)
  return bytes(exported(*arguments).serialize())
