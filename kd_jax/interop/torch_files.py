"""PyTorch's files, by PyTorch: the only module that imports it.

`kd_jax.interop.readers` imports this module when a file needs it.
"""

import argparse
import io
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Older versions can be made to run code, or to write to other places, even with
# weights_only: CVE-2025-32434 (before 2.6), CVE-2026-24747 (before 2.10).
OLDEST = (2, 10)


class _Placeholder:
  """Stands for what is beside the weights, which nobody needs."""

  def __init__(self, *args: Any):
    pass

  def __setstate__(self, state: Any):
    pass


def _plain_dict(*args: Any) -> dict[Any, Any]:
  """Stands for `collections.defaultdict`."""
  return {}


# RepDistiller saves the options of its command line.
_SAFE: Any = [
  argparse.Namespace,
  (_plain_dict, "collections.defaultdict"),
]


def _check_version() -> None:
  found = tuple(int(n) for n in torch.__version__.split(".")[:2])
  if found < OLDEST:
    raise ImportError(
      f"PyTorch {torch.__version__} can be made to run a file's code: expected"
      f" {'.'.join(map(str, OLDEST))} or newer. Install it with pip install"
      ' --upgrade "kd_jax[torch]"'
    )


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
  if tensor.layout is not torch.strided or tensor.is_quantized:
    kind = "quantized" if tensor.is_quantized else str(tensor.layout)
    raise ValueError(f"{name}: expected a dense tensor of floats, got {kind}")
  if tensor.is_floating_point():
    tensor = tensor.to(torch.float32)  # numpy has no bfloat16
  return tensor.detach().numpy()


def load(path: pathlib.Path, limit: int, ignored: Sequence[str]) -> Any:
  """Read a file of `torch.save` without executing anything in it.

  Args:
    path: of a zip archive, or of the pickles that PyTorch before 1.6 wrote.
    limit: bytes that all its tensors may take together: a stride of 0 makes
      any number of elements out of one.
    ignored: globals "module.name" in whose place a placeholder is put.

  Returns:
    The saved object; its tensors, and those in its dicts, are numpy arrays,
    floats as float32.

  Raises:
    ImportError: if PyTorch is too old to be safe.
    ValueError: if a tensor is sparse or quantized, or for the limit.
    pickle.UnpicklingError: if the file names anything but tensors, numbers,
      strings, containers and options.
    Exception: of whatever type the first misread byte leads to, if the file
      is cut short or damaged.
  """
  _check_version()
  safe = [*_SAFE, *((_Placeholder, name) for name in ignored)]
  with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
    # Of unusual pickle protocols, which are read or refused.
    warnings.simplefilter("ignore")
    content = torch.load(path, map_location="cpu", weights_only=True)

  left = limit

  def arrays(name: str, value: Any, depth: int) -> Any:
    nonlocal left
    if isinstance(value, torch.Tensor):
      left -= value.numel() * max(4, value.element_size())
      if left < 0:
        raise ValueError(
          f"{name}: with this tensor of shape {list(value.shape)} the tensors"
          f" take more than {limit:,} bytes, eight times their file; that fits"
          " no network. Save the state dict alone"
        )
      return _array(name, value)
    if isinstance(value, dict) and depth:
      return {
        key: arrays(str(key), item, depth - 1) for key, item in value.items()
      }
    return value

  return arrays("the tensor", content, 2)


def _tensor(array: np.ndarray) -> torch.Tensor:
  if array.dtype.kind == "V":  # bfloat16, which numpy has not
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)


def to_bytes(content: dict[str, Any]) -> bytes:
  """Make a file of `torch.save`.

  Args:
    content: a state dict of arrays; or a dict of state dicts and strings.
  """

  def tensors(value: Any) -> Any:
    if isinstance(value, dict):
      return {name: tensors(item) for name, item in value.items()}
    return _tensor(value) if isinstance(value, np.ndarray) else value

  file = io.BytesIO()
  with warnings.catch_warnings():
    # Of arrays that are read-only, as these tensors are to what reads them.
    warnings.simplefilter("ignore")
    torch.save(tensors(content), file)
  return file.getvalue()
