"""PyTorch state dicts (names to numpy arrays) to linen variables and back.

Nothing here needs PyTorch: `{k: v.numpy() for k, v in sd.items()}` turns a
loaded state dict into what these functions take. The mapping is mechanical.
A linen module's path, joined and with "_" read as ".", is the module's path in
PyTorch (`layer1_0/downsample_0` is `layer1.0.downsample.0`), and a leaf's name
and rank say which layout it has:

  kernel, rank 4  HWIO      weight OIHW     convolution
  kernel, rank 2  [in, out] weight [out, in] linear
  scale           [C]       weight [C]      BatchNorm
  mean, var       [C]       running_mean, running_var

and any other leaf (bias, a learned scalar) keeps its name and shape. So a new
network needs no table, as long as its modules carry the reference's names;
where they differ (a distiller's `embed_s`, say), pass `rename`. Torchvision,
timm, SimKD and mdistiller agree on the ResNets for ImageNet; RepDistiller,
SimKD and mdistiller on the networks for 32x32 images. The registry of
`kd_jax.models` has the names of the other networks.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kd_jax import models
from kd_jax.interop import naming
from kd_jax.models.entry import module_name

Convert = Callable[[np.ndarray], np.ndarray]
Path = tuple[str, ...]
Rename = Callable[[Path], str]

# Names in an error's list.
_LISTED = 10


def conv_kernel(weight: np.ndarray) -> np.ndarray:
  """Convert a convolution, PyTorch [O, I, *window] to linen [*window, I, O].

  Grouped ones too: I is the inputs per group in both.
  """
  return np.moveaxis(weight, (0, 1), (-1, -2))


def conv_weight(kernel: np.ndarray) -> np.ndarray:
  """Invert `conv_kernel`."""
  return np.moveaxis(kernel, (-1, -2), (0, 1))


def conv_transpose_kernel(weight: np.ndarray) -> np.ndarray:
  """Convert a transposed convolution, [I, O, *window] to [*window, I, O].

  The window is reversed: `nn.ConvTranspose` with its default
  `transpose_kernel=False` slides its kernel over the dilated input, where
  PyTorch takes the gradient of a convolution. PyTorch's `padding=p` at window
  k is linen's `padding=((k - 1 - p, k - 1 - p), ...)`.
  """
  window = tuple(range(2, weight.ndim))
  return np.moveaxis(np.flip(weight, window), (0, 1), (-2, -1))


def conv_transpose_weight(kernel: np.ndarray) -> np.ndarray:
  """Invert `conv_transpose_kernel`."""
  weight = np.moveaxis(kernel, (-2, -1), (0, 1))
  return np.flip(weight, tuple(range(2, weight.ndim)))


def linear_kernel(weight: np.ndarray) -> np.ndarray:
  """Convert a linear layer, PyTorch [out, in] to linen [in, out]."""
  return weight.T


def linear_weight(kernel: np.ndarray) -> np.ndarray:
  """Invert `linear_kernel`."""
  return kernel.T


def batch_norm(
  tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Convert one BatchNorm's tensors to linen parameters and statistics.

  Args:
    tensors: `running_mean` and `running_var`, with `weight` and `bias` if
      there are such, each [C].

  Returns:
    Its `params` (scale, bias) and its `batch_stats` (mean, var).
  """
  renamed = {"weight": "scale", "bias": "bias"}
  params = {new: tensors[old] for old, new in renamed.items() if old in tensors}
  stats = {"mean": tensors["running_mean"], "var": tensors["running_var"]}
  return params, stats


class _Tensor(NamedTuple):
  """One leaf of the variables, and the tensor that it corresponds to."""

  path: Path
  name: str
  to_linen: Convert
  to_torch: Convert


def _same(array: np.ndarray) -> np.ndarray:
  return array


_LEAF_NAMES = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


def _tensors(
  variables: Mapping[str, Any], rename: Rename, transposed: Collection[str]
) -> Iterator[tuple[_Tensor, Any]]:
  """Each leaf of `variables`, with the tensor that it corresponds to."""
  for collection in ("params", "batch_stats"):
    flat = traverse_util.flatten_dict(variables.get(collection, {}))
    for path, leaf in flat.items():
      *modules, last = path
      module = rename(tuple(modules))
      convert: tuple[Convert, Convert] = (_same, _same)
      if last == "kernel" and module in transposed:
        convert = (conv_transpose_kernel, conv_transpose_weight)
      elif last == "kernel" and leaf.ndim == 2:
        convert = (linear_kernel, linear_weight)
      elif last == "kernel":
        convert = (conv_kernel, conv_weight)
      name = f"{module}.{_LEAF_NAMES.get(last, last)}".lstrip(".")
      yield _Tensor((collection, *path), name, *convert), leaf


def _counters(tensor_names: Collection[str]) -> set[str]:
  """The batch counters that belong to the BatchNorms among the names."""
  ending = ".running_mean"
  return {
    name.removesuffix(ending) + ".num_batches_tracked"
    for name in tensor_names
    if name.endswith(ending)
  }


def _shapes(
  variables: Mapping[str, Any], rename: Rename, transposed: Collection[str]
) -> dict[str, tuple[int, ...]]:
  """The shapes in PyTorch's layout of all tensors of `variables`."""
  return {
    tensor.name: tensor.to_torch(np.empty(leaf.shape, np.bool_)).shape
    for tensor, leaf in _tensors(variables, rename, transposed)
  }


def _listing(words: str, items: list[str]) -> str:
  more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
  return f" {words} ({len(items)}): {', '.join(items[:_LISTED])}{more}."


def _check(
  got: Mapping[str, tuple[int, ...]],
  expected: Mapping[str, tuple[int, ...]],
  what: str,
) -> None:
  """Raises if the tensors' names or shapes differ."""
  missing = sorted(expected.keys() - got.keys())
  unexpected = sorted(got.keys() - expected.keys())
  misshapen = [
    f"{name} (expected {list(shape)}, got {list(got[name])})"
    for name, shape in expected.items()
    if name in got and got[name] != shape
  ]
  if missing or unexpected or misshapen:
    message = f"The tensors do not fit {what}."
    if missing:
      message += _listing("Missing", missing)
    if unexpected:
      message += _listing("Unexpected", unexpected)
    if misshapen:
      message += _listing("Misshapen", misshapen)
    raise ValueError(
      message + " Check the model's name and its number of classes against"
      " the file's."
    )


def variables_from_tensors(
  template: Mapping[str, Any],
  tensors: Mapping[str, Any],
  *,
  rename: Rename = module_name,
  transposed: Collection[str] = (),
  what: str = "these variables",
) -> dict[str, Any]:
  """Fill linen variables with the tensors of a state dict.

  Args:
    template: variables, or their shapes (`jax.eval_shape` of `init`); of their
      collections `params` and `batch_stats` are filled, others left out.
    tensors: names to arrays in PyTorch's layout, without wrappers' prefixes.
      BatchNorm's `num_batches_tracked` may be there and is ignored.
    rename: a linen module's path to its name in PyTorch.
    transposed: PyTorch names of the transposed convolutions.
    what: the error message's word for the variables.

  Returns:
    Numpy float32 arrays in the template's structure.

  Raises:
    ValueError: if tensors are missing, unexpected, misshapen or not float; it
      lists them.
  """
  expected = _shapes(template, rename, transposed)
  arrays = {}
  ignored = _counters(expected)
  for name, value in tensors.items():
    if isinstance(value, Mapping):
      raise ValueError(
        f"Expected a flat dict of names to arrays, got a dict under {name!r};"
        f" a checkpoint holds more than weights: pass checkpoint[{name!r}]"
        " if that is the model."
      )
    if name not in ignored:
      arrays[name] = np.asarray(value)
  _check({name: a.shape for name, a in arrays.items()}, expected, what)
  wrong = [
    f"{name} ({array.dtype})"
    for name, array in arrays.items()
    if not jnp.issubdtype(array.dtype, jnp.floating)
  ]
  if wrong:
    raise ValueError(
      f"The tensors do not fit {what}." + _listing("Not float", wrong)
    )
  leaves = {
    tensor.path: np.array(
      tensor.to_linen(arrays[tensor.name]), np.float32, order="C"
    )
    for tensor, _ in _tensors(template, rename, transposed)
  }
  variables: dict[str, Any] = traverse_util.unflatten_dict(leaves)
  return variables


def tensors_from_variables(
  variables: Mapping[str, Any],
  *,
  rename: Rename = module_name,
  transposed: Collection[str] = (),
) -> dict[str, np.ndarray]:
  """Invert `variables_from_tensors`, to the bit.

  Args:
    variables: linen variables; `params` and `batch_stats` are written.
    rename: a linen module's path to its name in PyTorch.
    transposed: PyTorch names of the transposed convolutions.

  Returns:
    Names to contiguous arrays in PyTorch's layout, with a zero int64
    `num_batches_tracked` for each BatchNorm.
  """
  tensors = {
    tensor.name: np.ascontiguousarray(tensor.to_torch(np.asarray(leaf)))
    for tensor, leaf in _tensors(variables, rename, transposed)
  }
  for name in sorted(_counters(tensors)):
    tensors[name] = np.zeros((), np.int64)
  return tensors


@functools.lru_cache
def _template(model_name: str, num_classes: int) -> dict[str, Any]:
  """The shapes of a model's variables; they do not depend on the image size."""
  model = models.create(model_name, num_classes)
  init = functools.partial(model.init, train=False)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return jax.eval_shape(init, jax.random.key(0), image)


def tensor_shapes(
  model_name: str, num_classes: int, mapping: models.WeightNames
) -> dict[str, tuple[int, ...]]:
  """List the tensors of a model's state dict, without batch counters.

  Args:
    model_name: one of `kd_jax.models.names()`.
    num_classes: of the classifier.
    mapping: whose names to use.

  Returns:
    Names to shapes in PyTorch's layout.

  Raises:
    ValueError: if the model is unknown.
  """
  return _shapes(_template(model_name, num_classes), mapping.rename, ())


def from_state_dict(
  model_name: str, num_classes: int, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
  """Make a model's variables from a toolbox's state dict.

  Args:
    model_name: one of `kd_jax.models.names()`.
    num_classes: of the checkpoint's classifier.
    state_dict: names to arrays, as the reference toolbox, torchvision, timm
      or mdistiller saved them; wrappers' prefixes are removed, see
      `naming.strip_prefixes`.

  Returns:
    `{"params": ..., "batch_stats": ...}` of numpy float32 arrays.

  Raises:
    ValueError: if the model is unknown, or the tensors do not fit it; lists
      those missing, unexpected and misshapen.
  """
  template = _template(model_name, num_classes)
  tensors = naming.strip_prefixes(state_dict)

  def matches(mapping: models.WeightNames) -> int:
    return len(_shapes(template, mapping.rename, ()).keys() & tensors.keys())

  mapping = max(models.entry(model_name).weight_names, key=matches)
  # A network of one module has a prefix of its own.
  prefix = naming.shared_prefix(_shapes(template, mapping.rename, ()))
  return variables_from_tensors(
    template,
    {prefix + name: tensor for name, tensor in tensors.items()},
    rename=mapping.rename,
    what=f"{model_name} with {num_classes} classes",
  )


def to_state_dict(
  model_name: str, variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Make the reference toolbox's state dict from a model's variables.

  Args:
    model_name: one of `kd_jax.models.names()`.
    variables: `{"params": ..., "batch_stats": ...}`.

  Returns:
    Names to arrays in PyTorch's layout, ready for `load_state_dict` once
    turned into tensors. torchvision takes those of the networks for ImageNet.

  Raises:
    ValueError: if the model is unknown, or these are not its variables; lists
      the tensors missing, unexpected and misshapen.
  """
  head = models.create(model_name, 1).head
  bias = variables.get("params", {}).get(head, {}).get("bias")
  # Without a classifier any number will do: it is reported as missing.
  num_classes = 1 if bias is None else bias.shape[0]
  rename = models.entry(model_name).weight_names[0].rename
  _check(
    _shapes(variables, rename, ()),
    _shapes(_template(model_name, num_classes), rename, ()),
    f"{model_name} with {num_classes} classes",
  )
  return tensors_from_variables(variables, rename=rename)
