"""Reads the CIFAR pickles without running any code that they name.

A pickle is a program: it may call any function of any installed package. The
publisher's files need only numbers, strings, lists, dicts and uint8 arrays, so
this reader builds nothing else.

numpy's `ndarray` and `dtype` are not called either: a file could choose their
arguments so that numpy takes its bytes for object pointers. Stand-ins collect
the description of an array, and the array is made from it with checks.
"""

import io
import pickle
import pickletools
import re
from typing import Any, NamedTuple

import numpy as np

from kd_jax.data.common import one_line

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

  def __init__(self, content: bytes | memoryview, name: str):
    super().__init__(io.BytesIO(content), encoding="bytes")
    self._name = name
    # One string may be encoded again and again.
    self._left = len(content)

  def _encode(self, text: str, encoding: Any) -> bytes:
    # How Python 3 writes bytes into a pickle of protocol 2. Only this codec:
    # others decompress, or transform at the file's will.
    if _text(encoding) != "latin1":
      raise TypeError(f"_codecs.encode with {encoding!r}, not 'latin1'")
    self._left -= len(text)
    if self._left < 0:
      raise ValueError("_codecs.encode of more text than the file has")
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
    asked = ascii(f"{module}.{name}")[1:-1][:100]
    raise UnsafePickleError(
      f"{self._name} is refused: it asks for the global {asked},"
      " expected arrays, lists, dicts, strings and numbers only. Nothing of"
      " it was executed. It is not the publisher's file (or was pickled"
      " again with a newer protocol): download the archive again."
    )


# Far more than any checkpoint or CIFAR file has, and soon counted.
_MAX_INSTRUCTIONS = 2_000_000
_MAX_DEPTH = 64
_MAX_OBJECTS = 10_000_000  # those that are shared counted each time

_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GET = frozenset(("GET", "BINGET", "LONG_BINGET"))
_GROW = frozenset(
  ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
)


class Summary(NamedTuple):
  """What a pickle would build.

  Attributes:
    globals: "module.name" of what it asks for.
    persistent_ids: of the objects that are stored elsewhere; constants and
      tuples of them, None for anything else.
  """

  globals: frozenset[str]
  persistent_ids: tuple[Any, ...]


class _Item:
  """An object on the scanner's stack: its nesting and its size in objects."""

  __slots__ = ("depth", "is_shared", "size", "value")

  def __init__(
    self, depth: int, size: int, value: Any = None, is_shared: bool = False
  ):
    self.depth, self.size = depth, size
    self.value, self.is_shared = value, is_shared


def scan(file: Any) -> Summary:
  """Check a pickle's instructions before an unpickler follows them.

  A short pickle can nest so deep that the process crashes, name a place of the
  memo that takes gigabytes, or share dicts so that walking them takes years.

  Args:
    file: an `io.BytesIO` or `mmap.mmap` at the start of a pickle; left behind
      its end. (A file's own `read` may allocate more than the file has.)

  Raises:
    ValueError: if it is no pickle, is cut short, or passes a limit.
  """
  stack: list[_Item] = []
  marks: list[int] = []
  memo: dict[int, _Item] = {}
  names: set[str] = set()
  ids: list[Any] = []
  arg: Any
  for count, (op, arg, _) in enumerate(pickletools.genops(file)):
    if count > _MAX_INSTRUCTIONS:
      raise ValueError(f"a pickle of more than {_MAX_INSTRUCTIONS:,} steps")
    name, before, after = op.name, op.stack_before, op.stack_after
    if name == "MARK":
      marks.append(len(stack))
    elif name in _PUT or name == "MEMOIZE":
      place = len(memo) if arg is None else arg
      # Picklers number what they put; the C unpickler allocates up to there.
      if not stack or not 0 <= place <= count:
        raise ValueError(f"a pickle that puts to place {place:,} of its memo")
      memo[place] = stack[-1]
    elif name in _GET:
      if arg not in memo:
        raise ValueError(f"a pickle that gets from place {arg:,} of its memo")
      kept = memo[arg]
      # A text may be encoded each time.
      more = len(kept.value) // 16 if isinstance(kept.value, str) else 0
      stack.append(_Item(kept.depth, kept.size + more, kept.value, True))
    elif not before:
      if name == "GLOBAL":
        arg = arg.replace(" ", ".", 1)
        names.add(arg)
      if after:
        stack.append(_Item(1, 1, arg))
    elif name == "POP" and marks and marks[-1] == len(stack):
      marks.pop()
    else:
      fixed, taken = len(before), []
      if pickletools.markobject in before:
        fixed = before.index(pickletools.markobject)
        if not marks:
          raise ValueError("a pickle without the mark that it goes back to")
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
      if len(stack) - (marks[-1] if marks else 0) < fixed:
        raise ValueError("a pickle that takes from an empty stack")
      if fixed:
        taken = stack[-fixed:] + taken
        del stack[-fixed:]
      if not after:  # dropped
        continue
      if name in _GROW:
        item, *parts = taken
        if item.is_shared and parts:
          raise ValueError("a pickle that changes an object that is shared")
        if parts:
          item.depth = max(item.depth, 1 + max(p.depth for p in parts))
          item.size += sum(p.size for p in parts)
      else:
        item = _Item(
          1 + max((p.depth for p in taken), default=0),
          1 + sum(p.size for p in taken),
        )
        if name.startswith("TUPLE") and len(taken) < 10:
          item.value = tuple(p.value for p in taken)
        elif name == "BINPERSID":
          ids.append(taken[0].value)
        elif name == "STACK_GLOBAL":
          item.value = f"{taken[0].value}.{taken[1].value}"
          names.add(item.value)
        elif name == "INST":
          names.add(arg.replace(" ", ".", 1))
        elif name == "DUP":
          item = _Item(taken[0].depth, taken[0].size, taken[0].value, True)
      if item.depth > _MAX_DEPTH:
        raise ValueError(f"a pickle of more than {_MAX_DEPTH} levels")
      if item.size > _MAX_OBJECTS:
        raise ValueError(f"a pickle of more than {_MAX_OBJECTS:,} objects")
      stack.extend([item] * len(after))
  return Summary(frozenset(names), tuple(ids))


def load(
  content: bytes | memoryview, name: str, *, trusted: bool = False
) -> dict[str, Any]:
  """Reads one file of the CIFAR python version.

  Args:
    content: the whole file.
    name: of the file, for error messages.
    trusted: do without `scan`.

  Returns:
    The file's dict. Its keys are str, its arrays read-only numpy arrays, its
    strings bytes if Python 2 wrote them.

  Raises:
    UnsafePickleError: (a ValueError) the file names a global that is not
      needed to build plain data. Nothing is executed.
    ValueError: the file is cut short, damaged, or no pickled dict.
  """
  try:
    if not trusted:
      scan(io.BytesIO(content))
    tree = _Unpickler(content, name).load()
  except UnsafePickleError:
    raise
  # A misread instruction raises nearly any exception.
  except Exception as error:
    raise ValueError(
      f"{name} is cut short or damaged: expected a pickled dict of the"
      f" publisher's python version, got {one_line(error)}."
      " Delete it and unpack or download the archive again."
    ) from error
  if not isinstance(tree, dict):
    raise ValueError(
      f"{name} must hold a dict, got {type(tree).__name__}: it is not a"
      " file of the publisher's python version. Download the archive again."
    )
  return {
    _text(key): value.array if isinstance(value, _Array) else value
    for key, value in tree.items()
  }
