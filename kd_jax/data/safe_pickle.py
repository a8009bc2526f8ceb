"""Reads the CIFAR pickles without running any code that they name.

A pickle is a program: it may call any function of any installed package. The
publisher's files need only numbers, strings, lists, dicts and uint8 arrays, so
this reader builds nothing else.

numpy's `ndarray` and `dtype` are not called either: a file could choose their
arguments so that numpy takes its bytes for object pointers. Stand-ins collect
the description of an array, and the array is made from it with checks.
"""

import pickle
import re
from typing import Any, BinaryIO

import numpy as np

# The module's name before and since numpy 2.
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")


class UnsafePickleError(ValueError):
  """A pickle names something that is not plain data."""


def _text(value: Any) -> str:
  """Python 2's strings arrive as bytes, Python 3's as str."""
  return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _DType:
  """Stands in for `numpy.dtype(code, align, copy)` and its state."""

  def __init__(self, code: Any, *_: Any):
    self.code = _text(code)
    self.order = "|"

  def __setstate__(self, state: Any):
    self.order = _text(state[1])

  def numpy(self) -> np.dtype:
    if not re.fullmatch("[biuf][1248]", self.code):
      raise TypeError(f"an array of dtype {self.code!r}, not of plain numbers")
    return np.dtype(self.order + self.code)


class _Array:
  """Stands in for `numpy.core.multiarray._reconstruct` and its result."""

  def __init__(self, subtype: Any, shape: Any, code: Any):
    del subtype, shape, code  # of the empty array that the state replaces
    self.array = np.zeros((0,), np.uint8)

  def __setstate__(self, state: Any):
    _, shape, dtype, fortran, raw = state
    flat = np.frombuffer(raw, dtype.numpy())
    self.array = flat.reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
  """Resolves globals to the stand-ins, and refuses all others."""

  def __init__(self, file: BinaryIO, name: str):
    super().__init__(file, encoding="bytes")
    self._name = name

  def _encode(self, text: str, encoding: Any) -> bytes:
    # How Python 3 writes bytes into a pickle of protocol 2. Only this codec:
    # others decompress, or transform at the file's will.
    if _text(encoding) != "latin1":
      raise TypeError(f"_codecs.encode with {encoding!r}, not 'latin1'")
    return text.encode("latin1")

  def find_class(self, module: str, name: str) -> Any:
    """Resolves a global, or raises `UnsafePickleError`."""
    if module in _MULTIARRAY and name == "_reconstruct":
      return _Array
    if (module, name) == ("numpy", "ndarray"):
      return "numpy.ndarray"  # only ever passed to `_reconstruct`
    if (module, name) == ("numpy", "dtype"):
      return _DType
    if (module, name) == ("_codecs", "encode"):
      return self._encode
    raise UnsafePickleError(
      f"{self._name} is refused: it asks for the global {module}.{name},"
      " expected arrays, lists, dicts, strings and numbers only. Nothing of"
      " it was executed. It is not the publisher's file (or was pickled"
      " again with a newer protocol): download the archive again."
    )


def load(file: BinaryIO, name: str) -> dict[str, Any]:
  """Reads one file of the CIFAR python version.

  Args:
    file: opened for reading bytes.
    name: of the file, for error messages.

  Returns:
    The file's dict. Its keys are str, its arrays read-only numpy arrays, its
    strings bytes if Python 2 wrote them.

  Raises:
    UnsafePickleError: (a ValueError) the file names a global that is not
      needed to build plain data. Nothing is executed.
    ValueError: the file is cut short, damaged, or no pickled dict.
  """
  try:
    content = _Unpickler(file, name).load()
  except UnsafePickleError:
    raise
  # A misread instruction raises nearly any exception.
  except Exception as error:
    raise ValueError(
      f"{name} is cut short or damaged: expected a pickled dict of the"
      f" publisher's python version, got {type(error).__name__}: {error}."
      " Delete it and unpack or download the archive again."
    ) from error
  if not isinstance(content, dict):
    raise ValueError(
      f"{name} must hold a dict, got {type(content).__name__}: it is not a"
      " file of the publisher's python version. Download the archive again."
    )
  return {
    _text(key): value.array if isinstance(value, _Array) else value
    for key, value in content.items()
  }
