"""Reads foreign files of weights without executing anything in them.

Each function returns what a file holds, its tensors as numpy arrays, and
raises ValueError for a file that is damaged, of another kind, or that would
run code. What the content means is the business of `files`.
"""

import pathlib
import pickle
import re
import tarfile
import zipfile
from typing import Any

import numpy as np

from kd_jax.interop.naming import CARD

_ZIP = b"PK\x03\x04"
_TORCH = "a file of torch.save"


def read_safetensors(path: pathlib.Path) -> dict[str, Any]:
  """Read a safetensors file; the card of its metadata stands under "card"."""
  import safetensors
  from safetensors import numpy as reader

  kind = "a safetensors file"
  with path.open("rb") as file:
    header = file.read(9)
  if header[8:] != b"{":  # after the length of the JSON header
    raise _not_a_checkpoint(path, kind)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      card = (file.metadata() or {}).get(CARD)
    return {**reader.load_file(path), **({CARD: card} if card else {})}
  except (safetensors.SafetensorError, KeyError) as error:
    raise _damaged(path, kind, error) from error


def read_npz(path: pathlib.Path) -> dict[str, Any]:
  """Read an archive of `numpy.savez`."""
  kind = "a .npz archive of numpy"
  if not _starts_with(path, _ZIP):
    raise _not_a_checkpoint(path, kind)
  try:
    # numpy leaves a file open that it opened itself and cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  # Damage surfaces as whatever the first misread byte leads to.
  except Exception as error:
    if "allow_pickle" in str(error):
      raise ValueError(
        f"{path} is refused: it holds a pickled object, expected numbers."
        " Nothing of it was executed"
      ) from None
    raise _damaged(path, kind, error) from error


def read_torch(path: pathlib.Path) -> Any:
  """Read a file of `torch.save`.

  Raises:
    ValueError: see the module.
    ImportError: if PyTorch is missing, or too old to be safe.
  """
  if _starts_with(path, _ZIP):
    _check_torch_zip(path)
  elif tarfile.is_tarfile(path):
    raise ValueError(
      f"{path} is a tar archive, as PyTorch wrote before 2017: expected a file"
      " of torch.save from PyTorch 0.1.11 or newer. If you trust the file,"
      " load it with PyTorch (weights_only=False) and save it again"
    )
  elif not _starts_with(path, b"\x80"):  # a pickle's protocol
    raise _not_a_checkpoint(path, _TORCH)
  torch_files = import_torch_files(path)
  try:
    return torch_files.load(path)
  except (ImportError, MemoryError):
    raise
  except pickle.UnpicklingError as error:
    raise _refused(path, error) from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  except Exception as error:
    raise _damaged(path, _TORCH, error) from error


def import_torch_files(path: pathlib.Path) -> Any:
  """Import the module that uses PyTorch.

  Args:
    path: that needs it, for the error.

  Raises:
    ImportError: if PyTorch is not installed.
  """
  try:
    from kd_jax.interop import torch_files
  except ModuleNotFoundError as error:
    if error.name != "torch":
      raise
    raise ImportError(
      f"{path}: this format takes PyTorch, which is not installed. Install it"
      ' with pip install "kd_jax[torch]" (the CPU build will do), or use a'
      " .safetensors or .npz file"
    ) from error
  return torch_files


def _starts_with(path: pathlib.Path, magic: bytes) -> bool:
  with path.open("rb") as file:
    return file.read(len(magic)) == magic


def _check_torch_zip(path: pathlib.Path) -> None:
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
      damaged = archive.testzip()  # PyTorch ignores the checksums
    if damaged is not None:
      raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
  except Exception as error:
    raise _damaged(path, _TORCH, error) from error
  inner = {name.partition("/")[2] for name in names}
  if "constants.pkl" in inner:
    raise ValueError(
      f"{path} is a TorchScript program: expected a state dict. Load it with"
      " torch.jit.load and save its state_dict()"
    )
  if "data.pkl" not in inner:
    raise ValueError(
      f"{path} is no checkpoint: expected {_TORCH}, got a zip archive of"
      f" {', '.join(names[:5]) or 'nothing'}"
    )


def _refused(path: pathlib.Path, error: pickle.UnpicklingError) -> ValueError:
  """The error for what PyTorch's safe unpickler does not take."""
  wanted = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
  if wanted:
    return ValueError(
      f"{path} is refused: it asks for the global {wanted[1]}, expected only"
      " tensors, numbers, strings and dicts. Nothing of it was executed. If"
      " you trust the file and it holds a whole network, load it with PyTorch"
      " and save its state_dict()"
    )
  if "Unsupported operand" in str(error):
    return ValueError(
      f"{path} is refused: it is damaged, or pickled with another protocol"
      " than torch.save's own (2), the only one that can be read without"
      " running its code. Copy it again, or save it again with PyTorch"
    )
  return _damaged(path, _TORCH, error)


def _damaged(path: pathlib.Path, kind: str, error: Exception) -> ValueError:
  # The reason stands at the end of PyTorch's long text.
  text = str(error).strip().partition("WeightsUnpickler error: ")
  line = (text[2] or text[0]).partition("\n")[0].strip() or "no more data"
  return ValueError(
    f"{path}: expected {kind}, got a file that is cut short or damaged"
    f" ({type(error).__name__}: {line}). Copy or download it again"
  )


def _not_a_checkpoint(path: pathlib.Path, kind: str) -> ValueError:
  with path.open("rb") as file:
    start = file.read(40)
  hint = ""
  if start.startswith(b"version https://git-lfs"):
    hint = " It is a pointer of Git LFS: fetch the file itself (git lfs pull)"
  elif start.lstrip().startswith(b"<"):
    hint = " It is a web page: download the file itself"
  return ValueError(
    f"{path} is no checkpoint: expected {kind}, got a file that begins with"
    f" {start!r}.{hint}"
  )
