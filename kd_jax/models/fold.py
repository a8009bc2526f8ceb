"""Frozen networks: BatchNorm folded into convolutions, weights cast once.

In evaluation BatchNorm multiplies and adds per channel, which the convolution
before it can do as well (Jacob et al., Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section
3.2). A folded network computes the same outputs, features included, but cannot
be trained. Where something else reads the convolution too, as in
pre-activation networks, BatchNorm stays as a multiplier and an offset.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kd_jax.models.batch_norm import BatchNorm

Path = tuple[str, ...]


def pairs(
  network: nn.Module, variables: Any, image_shape: Sequence[int]
) -> dict[Path, Path]:
  """Finds which BatchNorm can be folded into which convolution.

  Args:
    network: of the variables.
    variables: arrays or their shapes, not folded.
    image_shape: (height, width, channels).

  Returns:
    Paths of BatchNorms to those of the convolutions before them, where only the
    BatchNorm reads the convolution's output.
  """
  found: dict[Path, Path] = {}

  def run(marks, variables, images):
    """Adds a mark to every convolution, and cuts off at their BatchNorms.

    A mark that still reaches the output got there by another way.
    """
    outputs: dict[int, tuple[Path, Any]] = {}

    def intercept(next_function, args, kwargs, context):
      module = context.module
      if context.method_name == "__call__":
        if isinstance(module, nn.Conv) and module.path in marks:
          output = next_function(*args, **kwargs)
          output += marks[module.path].astype(output.dtype)
          # Holding the array keeps its id from being reused.
          outputs[id(output)] = (module.path, output)
          return output
        if isinstance(module, BatchNorm) and id(args[0]) in outputs:
          found[module.path] = outputs[id(args[0])][0]
          return jnp.zeros(args[0].shape, module.dtype)
      return next_function(*args, **kwargs)

    with nn.intercept_methods(intercept):
      return network.apply(variables, images, train=False)

  marks = {
    path[:-1]: jax.ShapeDtypeStruct((), jnp.float32)
    for path, leaf in flatten_dict(variables["params"]).items()
    if path[-1] == "kernel" and len(leaf.shape) == 4
  }
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  jaxpr = jax.make_jaxpr(run)(marks, variables, images).jaxpr
  convolutions = sorted(marks)  # as JAX orders a dictionary
  read = _inputs_of_outputs(jaxpr, len(convolutions))
  leaking = {convolutions[i] for i in read}
  readers = Counter(found.values())
  return {
    bn: conv
    for bn, conv in found.items()
    if conv not in leaking and readers[conv] == 1
  }


def _inputs_of_outputs(jaxpr, count: int) -> set[int]:
  """Finds which of the first `count` inputs any output depends on."""
  depends = {v: {i} for i, v in enumerate(jaxpr.invars[:count])}

  def of(variables):
    known = [v for v in variables if not hasattr(v, "val")]  # no literals
    return set().union(*(depends.get(v, set()) for v in known))

  for equation in jaxpr.eqns:
    read = of(equation.invars)
    for variable in equation.outvars:
      depends[variable] = read
  return of(jaxpr.outvars)


def fold(
  network: nn.Module, variables: Mapping[str, Any], image_shape: Sequence[int]
) -> dict[str, Any]:
  """Folds every BatchNorm that `pairs` finds.

  Args:
    network: of the variables.
    variables: `{"params": ..., "batch_stats": ...}`; unchanged.
    image_shape: (height, width, channels).

  Returns:
    Variables without `batch_stats` for the same network: its BatchNorms have an
    `offset`, and those that could not be folded a `multiplier`.

  Raises:
    ValueError: if they are folded already.
  """
  if not variables.get("batch_stats"):
    raise ValueError(
      "expected variables with the statistics of BatchNorm, got none: they are"
      " folded already, or the network has no BatchNorm"
    )
  folded = pairs(network, variables, image_shape)
  params = _flat_arrays(variables["params"])
  stats = _flat_arrays(variables["batch_stats"])
  for bn in {path[:-1] for path in stats}:
    # In float64, so that folding adds no error of its own.
    mean, var = (stats[*bn, name].astype(float) for name in ("mean", "var"))
    # No network here changes the epsilon, PyTorch's.
    multiplier = params.pop((*bn, "scale")) / np.sqrt(var + BatchNorm.epsilon)
    offset = params.pop((*bn, "bias")) - mean * multiplier
    params[*bn, "offset"] = offset.astype(np.float32)
    if bn not in folded:
      params[*bn, "multiplier"] = multiplier.astype(np.float32)
      continue
    for name in ("kernel", "bias"):  # a bias passes through BatchNorm too
      key = (*folded[bn], name)
      if key in params:
        params[key] = (params[key] * multiplier).astype(np.float32)
  return {"params": unflatten_dict(params)}


def freeze(
  network: nn.Module, variables: Mapping[str, Any], image_shape: Sequence[int]
) -> dict[str, Any]:
  """Prepares a network that is not trained, so that no step has to.

  Args:
    network: of the variables, with the dtype of its arithmetic.
    variables: `{"params": ..., "batch_stats": ...}`, folded or not; unchanged.
    image_shape: (height, width, channels).

  Returns:
    Variables for the same network: BatchNorm folded, convolutions cast to the
    network's dtype.
  """
  if variables.get("batch_stats"):
    variables = fold(network, variables, image_shape)
  params = _flat_arrays(variables["params"])
  for path in params:
    *layer, name = path
    kernel = params.get((*layer, "kernel"))
    is_convolution = kernel is not None and kernel.ndim == 4
    is_folded = name == "offset" and (*layer, "multiplier") not in params
    if is_convolution or is_folded:
      params[path] = params[path].astype(network.dtype)
  return {"params": unflatten_dict(params)}


def unfold(
  params: Mapping[str, Any], folded: Mapping[Path, Path]
) -> dict[str, Any]:
  """Rewrites folded parameters for toolboxes that know no `offset`.

  Args:
    params: of `fold`'s variables.
    folded: the result of `pairs`.

  Returns:
    Variables whose convolutions have the offsets as biases. The BatchNorms that
    could not be folded have mean 0 and variance 1.
  """
  flat = _flat_arrays(params)
  stats: dict[Path, np.ndarray] = {}
  for bn, conv in folded.items():
    bias = flat.get((*conv, "bias"), np.float32(0))
    flat[*conv, "bias"] = bias + flat.pop((*bn, "offset"))
  for bn in [path[:-1] for path in flat if path[-1] == "offset"]:
    offset = flat[*bn, "bias"] = flat.pop((*bn, "offset"))
    flat[*bn, "scale"] = flat.pop((*bn, "multiplier"))
    stats[*bn, "mean"] = np.zeros_like(offset)
    stats[*bn, "var"] = np.full_like(offset, 1 - BatchNorm.epsilon)
  return {"params": unflatten_dict(flat), "batch_stats": unflatten_dict(stats)}


def _flat_arrays(tree: Mapping[str, Any]) -> dict[Path, np.ndarray]:
  return {path: np.asarray(x) for path, x in flatten_dict(tree).items()}
