"""Frozen BatchNorm folded into convolutions.

In evaluation BatchNorm multiplies and adds by channel, and so can the
convolution before it (Jacob et al., Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section
3.2). What a folded network computes is the same, features included; it cannot
be trained. A BatchNorm whose input something else reads too, as in
pre-activation networks, stays, as a multiplier and an offset.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models import layers

Path = tuple[str, ...]


def pairs(
  network: nn.Module, variables: Any, image_shape: Sequence[int]
) -> dict[Path, Path]:
  """Which BatchNorm can be folded into which convolution.

  Args:
    network: of the variables.
    variables: arrays or their shapes, not folded.
    image_shape: (height, width, channels).

  Returns:
    Paths of BatchNorms to those of the convolutions before them, where nothing
    but the BatchNorm reads what the convolution returns.
  """
  found: dict[Path, Path] = {}
  candidates = None

  def run(marks, variables, images):
    """Adds marks to the candidates' convolutions, cut off by BatchNorms."""
    made: dict[int, tuple[Path, Any]] = {}

    def intercept(next_function, args, kwargs, context):
      module, path = context.module, context.module.path
      if context.method_name == "__call__":
        if isinstance(module, nn.Conv):
          output = next_function(*args, **kwargs)
          if candidates is not None and path in candidates:
            output += marks[candidates.index(path)].astype(output.dtype)
          made[id(output)] = (path, output)  # kept, or its id is used again
          return output
        if isinstance(module, layers.BatchNorm) and id(args[0]) in made:
          conv = made[id(args[0])][0]
          if candidates is None:
            found[path] = conv
          elif conv in candidates:
            return jnp.zeros(args[0].shape, module.dtype)
      return next_function(*args, **kwargs)

    with nn.intercept_methods(intercept):
      return network.apply(variables, images, train=False)

  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  jax.eval_shape(run, [], variables, images)
  candidates = list(found.values())
  marks = [jax.ShapeDtypeStruct((), jnp.float32)] * len(candidates)
  jaxpr = jax.make_jaxpr(run)(marks, variables, images).jaxpr
  readers = _dependencies(jaxpr, len(candidates))
  leaking = {candidates[i] for i in readers}
  return {bn: conv for bn, conv in found.items() if conv not in leaking}


def _dependencies(jaxpr, count: int) -> set[int]:
  """Which of the first `count` inputs any output depends on."""
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
  """Folds what can be folded.

  Args:
    network: of the variables.
    variables: `{"params": ..., "batch_stats": ...}`; unchanged.
    image_shape: (height, width, channels).

  Returns:
    Variables without `batch_stats` for the same network: its BatchNorms find
    an `offset`, and where they could not be folded a `multiplier`.

  Raises:
    ValueError: if they are folded already.
  """
  if not variables.get("batch_stats"):
    raise ValueError(
      "expected variables with the statistics of BatchNorm, got none: they are"
      " folded already, or the network has no BatchNorm"
    )
  folded = pairs(network, variables, image_shape)
  params = _copy(variables["params"])
  for path, stats in _modules(variables["batch_stats"]):
    old = _at(params, path)
    multiplier, offset = _affine(old, stats)
    new = {"offset": offset.astype(np.float32)}
    if path in folded:
      conv = _at(params, folded[path])
      for name in conv:  # its bias, if it has one, passes BatchNorm too
        scaled = np.asarray(conv[name], np.float64) * multiplier
        conv[name] = scaled.astype(np.float32)
    else:
      new["multiplier"] = multiplier.astype(np.float32)
    old.clear()
    old.update(new)
  return {"params": params}


def freeze(
  network: nn.Module, variables: Mapping[str, Any], image_shape: Sequence[int]
) -> dict[str, Any]:
  """What a network that is not trained needs for its forward pass, made once.

  Args:
    network: of the variables, with the type of its arithmetic.
    variables: `{"params": ..., "batch_stats": ...}`, folded or not; unchanged.
    image_shape: (height, width, channels).

  Returns:
    Variables for the same network: BatchNorm folded, and the convolutions in
    the network's own type, which a step would turn them into each time.
  """
  params = variables["params"]
  if variables.get("batch_stats"):
    params = fold(network, variables, image_shape)["params"]
  params = _copy(params)
  for _, layer in _modules(params):
    is_convolution = np.ndim(layer.get("kernel")) == 4
    if is_convolution or set(layer) == {"offset"}:
      for name, value in layer.items():
        layer[name] = value.astype(network.dtype)
  return {"params": params}


def _affine(params: Mapping[str, Any], stats: Mapping[str, Any]) -> Any:
  mean, var = (np.asarray(stats[name], np.float64) for name in ("mean", "var"))
  # Every network of the package has PyTorch's epsilon.
  multiplier = 1 / np.sqrt(var + layers.BatchNorm.epsilon)
  if "scale" in params:
    multiplier = multiplier * np.asarray(params["scale"], np.float64)
  bias = np.asarray(params.get("bias", 0.0), np.float64)
  return multiplier, bias - mean * multiplier


def unfold(
  params: Mapping[str, Any], folded: Mapping[Path, Path]
) -> dict[str, Any]:
  """What a toolbox without this package's folded BatchNorm can hold.

  Args:
    params: of `fold`'s variables.
    folded: what `pairs` said.

  Returns:
    Variables whose convolutions have the offsets as biases, and whose
    BatchNorms are those that could not be folded, with the mean 0 and the
    variance 1.
  """
  params = _copy(params)
  stats: dict[str, Any] = {}
  for bn, conv in folded.items():
    offset = _at(params, bn)["offset"]
    layer = _at(params, conv)
    layer["bias"] = layer["bias"] + offset if "bias" in layer else offset
    _remove(params, bn)
  for path, layer in list(_modules(params)):
    if "offset" in layer:
      multiplier, offset = layer.pop("multiplier"), layer.pop("offset")
      layer.update(scale=multiplier, bias=offset)
      place = stats
      for key in path:
        place = place.setdefault(key, {})
      place["mean"] = np.zeros_like(offset)
      place["var"] = np.full_like(offset, 1 - layers.BatchNorm.epsilon)
  return {"params": params, "batch_stats": stats}


def _copy(tree: Any) -> Any:
  if isinstance(tree, Mapping):
    return {name: _copy(child) for name, child in tree.items()}
  return np.asarray(tree)


def _at(tree: Any, path: Path) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _remove(tree: Any, path: Path) -> None:
  """Removes a module, and those above it that this leaves empty."""
  for end in range(len(path), 0, -1):
    above = _at(tree, path[: end - 1])
    del above[path[end - 1]]
    if above:
      return


def _modules(tree: Any, path: Path = ()) -> Any:
  """The (path, parameters) of every module with parameters of its own."""
  if any(not isinstance(child, Mapping) for child in tree.values()):
    yield path, tree
    return
  for name, child in tree.items():
    yield from _modules(child, (*path, name))
