"""PyTorch's first checkpoint format, a tar archive, without PyTorch.

`torch.save` wrote it until version 0.1.10 (2017), and torchvision's first
ImageNet weights are such files (resnet18-5c106cde.pth and its siblings).
`torch.load` refuses them with `weights_only`: its reader for them unpickles
whatever they hold. Here a pickle may name what a state dict is made of, for
which stand-ins are built, and nothing else.

The archive has three files of use. `storages`: how many, and for each the
pickled (key, device, type), its length as int64, its values; then a list of
views (key, root, offset, length). `tensors`: how many, and for each the
pickled (key, storage, type), then int32 rank, four bytes of nothing, and int64
shape, strides and offset. `pickle`: the content, tensors by their keys.
"""

import collections
import math
import pathlib
import pickle
import re
import struct
import tarfile
from typing import IO, Any

import numpy as np

_DTYPES = {
  "Double": np.dtype("<f8"),
  "Float": np.dtype("<f4"),
  "Half": np.dtype("<f2"),
  "Long": np.dtype("<i8"),
  "Int": np.dtype("<i4"),
  "Short": np.dtype("<i2"),
  "Char": np.dtype("i1"),
  "Byte": np.dtype("u1"),
}


# Elements of a tensor, ten times those of the largest in any network here: a
# stride of 0 makes any number of them out of one.
LARGEST = 2**28


class RefusedGlobalError(Exception):
  """A pickle names something that is not a part of a state dict."""


class _Parameter:
  """Stands in for a parameter, which is as good as its tensor."""

  def __new__(cls, *args: Any) -> "_Parameter":
    self = super().__new__(cls)
    self.data = args[0] if args else None
    return self

  def __init__(self, *args: Any):
    del args  # `__new__` has them

  def __setstate__(self, state: Any):
    if len(state) == 5:  # the oldest, with the tensor inside
      self.data = state[0]


def _new_object(cls: type, *args: Any) -> Any:
  if cls not in (_Parameter, collections.OrderedDict):
    raise RefusedGlobalError(getattr(cls, "__name__", str(cls)))
  return cls(*args)


class _Unpickler(pickle.Unpickler):
  def __init__(self, file: IO[bytes], objects: dict[str, np.ndarray]):
    super().__init__(file)
    self._objects = objects

  def find_class(self, module: str, name: str) -> Any:
    kind = re.fullmatch(r"(\w+?)(?:Storage|Tensor)", name)
    if module in ("torch", "torch.cuda") and kind and kind[1] in _DTYPES:
      return _DTYPES[kind[1]]
    known = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch.nn.parameter", "Parameter"): _Parameter,
      ("copy_reg", "__newobj__"): _new_object,
      ("copyreg", "__newobj__"): _new_object,
    }
    if (module, name) not in known:
      raise RefusedGlobalError(f"{module}.{name}")
    return known[module, name]

  def persistent_load(self, pid: Any) -> Any:
    if isinstance(pid, tuple):  # (class, file, source) of a whole module
      raise RefusedGlobalError(f"module with its source, {pid[1:2]}")
    return self._objects[str(pid)]


def _unpickle(file: IO[bytes], objects: dict[str, np.ndarray]) -> Any:
  return _Unpickler(file, objects).load()


def _numbers(file: IO[bytes], count: int) -> tuple[int, ...]:
  return struct.unpack(f"<{count}q", file.read(8 * count))


def _storages(file: IO[bytes]) -> dict[str, np.ndarray]:
  storages: dict[str, np.ndarray] = {}
  for _ in range(_unpickle(file, {})):
    key, _, dtype = _unpickle(file, {})
    (length,) = _numbers(file, 1)
    raw = file.read(length * dtype.itemsize)
    storages[str(key)] = np.frombuffer(raw, dtype, length)
  for key, root, offset, length in _unpickle(file, {}):
    storages[str(key)] = storages[str(root)][offset : offset + length]
  return storages


def _tensors(
  file: IO[bytes], storages: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  tensors: dict[str, np.ndarray] = {}
  for _ in range(_unpickle(file, {})):
    key, storage_key, _ = _unpickle(file, {})
    rank, _ = struct.unpack("<ii", file.read(8))
    shape, strides = _numbers(file, rank), _numbers(file, rank)
    (offset,) = _numbers(file, 1)
    storage = storages[str(storage_key)]
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if min((offset, *shape, *strides)) < 0 or (
      0 not in shape and last >= storage.size
    ):
      raise ValueError(f"a tensor of shape {shape} that leaves its storage")
    if math.prod(shape) > LARGEST:
      raise ValueError(f"a tensor of shape {shape}, which no network has")
    size = storage.itemsize
    tensors[str(key)] = np.lib.stride_tricks.as_strided(
      storage[offset:], shape, [s * size for s in strides], writeable=False
    )
  return tensors


def _plain(value: Any) -> Any:
  if isinstance(value, _Parameter):
    return value.data
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  return value


def load(path: pathlib.Path) -> Any:
  """Reads a file of that format.

  Args:
    path: of a tar archive.

  Returns:
    What was saved, its tensors as (read-only) numpy arrays.

  Raises:
    ValueError: if it is another archive.
    RefusedGlobalError: if it names anything but tensors and dicts; nothing of
      it is executed.
    Exception: of whatever type the first misread byte leads to, if the file
      is cut short or damaged.
  """
  with tarfile.open(path, "r:") as tar:
    names = tar.getnames()
    if not {"storages", "tensors", "pickle"} <= set(names):
      raise ValueError(
        "no checkpoint: expected a file of torch.save, got a tar archive of"
        f" {', '.join(names[:5]) or 'nothing'}"
      )

    def member(name: str) -> IO[bytes]:
      file = tar.extractfile(name)
      if file is None:
        raise ValueError(f"{name} is not a file")
      return file

    storages = _storages(member("storages"))
    objects = {**storages, **_tensors(member("tensors"), storages)}
    return _plain(_unpickle(member("pickle"), objects))
