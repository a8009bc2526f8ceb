"""Reads foreign files of weights without executing anything in them.

`read` returns what a file holds, its tensors as numpy arrays. It raises
ValueError for a file that is damaged, of another kind, that would run code, or
that would take much more memory than its size. The bytes of a file decide its
format, not its name. What the content means is the business of `files`.
"""

import _compat_pickle
import contextlib
import io
import math
import mmap
import pathlib
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kd_jax.data import safe_pickle
from kd_jax.interop import digests
from kd_jax.interop.naming import CARD

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02"  # pickle's protocol 2, that of torch.save
_TORCH = "a file of torch.save"
_KINDS = f"{_TORCH}, safetensors or numpy.savez"


def memory_limit(size: int) -> int:
  """Bytes that a file of `size` bytes may take when it is read."""
  return (64 << 20) + 8 * size


def read(path: pathlib.Path) -> Any:
  """Read a file of torch.save, safetensors or numpy.savez.

  Raises:
    ValueError: see the module.
    ImportError: if it needs PyTorch, which is missing or too old to be safe.
  """
  with path.open("rb") as file:
    start = file.read(64)
  if start.startswith(_ZIP):
    names = _zip_names(path)
    if any(name.endswith(".npy") for name in names):
      return _read_npz(path)
    _check_torch_zip(path, names)
    content = _read_torch(path)
    with zipfile.ZipFile(path) as archive:
      digest = digests.from_comment(archive.comment)
    if digest is not None:  # else of another toolbox
      _check_digest(path, digest, *digests.parts(content))
    return content
  if start[8:9] == b"{":  # after the length of the JSON header
    return _read_safetensors(path)
  if start.startswith(b"\x80"):
    _check_legacy(path)
    return _read_torch(path)
  if tarfile.is_tarfile(path):
    raise ValueError(
      f"{path} is a tar archive, as PyTorch wrote before 2017: expected a file"
      " of torch.save from PyTorch 0.1.11 or newer. If you trust the file,"
      " load it with PyTorch (weights_only=False) and save it again"
    )
  raise _not_a_checkpoint(path, start)


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
  """The tensors; the card of the metadata stands under "card"."""
  import safetensors
  from safetensors import numpy as reader

  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
    tensors = reader.load_file(path)
  # numpy does not know every type of number.
  except (safetensors.SafetensorError, KeyError, TypeError) as error:
    raise _damaged(path, "a safetensors file", error) from error
  card = metadata.get(CARD)
  _check_digest(path, metadata.get(digests.KEY), tensors, card)
  return {**tensors, **({CARD: card} if card else {})}


def _read_npz(path: pathlib.Path) -> dict[str, Any]:
  try:
    with zipfile.ZipFile(path) as archive:
      digest = digests.from_comment(archive.comment)
      for info in archive.infolist():
        with archive.open(info) as member:
          _check_npy(member, info.file_size)
    # numpy leaves a file open that it opened itself and cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
      content = {name: loaded[name] for name in loaded.files}
  # Damage surfaces as whatever the first misread byte leads to.
  except Exception as error:
    if "allow_pickle" in str(error):
      raise ValueError(
        f"{path} is refused: it holds a pickled object, expected numbers."
        " Nothing of it was executed"
      ) from None
    raise _damaged(path, "a .npz archive of numpy", error) from error
  _check_digest(path, digest, content, None)
  return content


def _check_npy(member: Any, size: int) -> None:
  """Raise ValueError if an array would be larger than its bytes."""
  version = np.lib.format.read_magic(member)
  read_header = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if read_header is None:
    raise ValueError(f"an array of format {version}, not 1.0 or 2.0")
  shape, _, dtype = read_header(member)
  if math.prod(shape) * dtype.itemsize > size and not dtype.hasobject:
    raise ValueError(f"an array of shape {list(shape)} in {size} bytes")


def _check_digest(
  path: pathlib.Path,
  expected: str | None,
  tensors: Mapping[str, np.ndarray],
  card: str | None,
) -> None:
  if expected not in (None, digests.of_tensors(tensors, card)):
    raise ValueError(
      f"{path}: expected the tensors as they were written, got others (their"
      " sha256 differs): the file is damaged. Export or copy it again"
    )


def _zip_names(path: pathlib.Path) -> list[str]:
  """Names of an archive whose parts are whole and of a sound size.

  PyTorch ignores the checksums.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      infos = archive.infolist()
      total = sum(info.file_size for info in infos)
      if total > memory_limit(path.stat().st_size):
        raise ValueError(f"it unpacks to {total:,} bytes")
      if len({info.filename for info in infos}) < len(infos):
        raise ValueError("two parts have the same name")
      damaged = archive.testzip()
    if damaged is not None:
      raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
  except Exception as error:
    raise _damaged(path, "a zip archive of weights", error) from error
  return [info.filename for info in infos]


def _check_torch_zip(path: pathlib.Path, names: list[str]) -> None:
  inner = {name.partition("/")[2] for name in names}
  if "constants.pkl" in inner:
    raise ValueError(
      f"{path} is a TorchScript program: expected a state dict. Load it with"
      " torch.jit.load and save its state_dict()"
    )
  if "data.pkl" not in inner:
    raise ValueError(
      f"{path} is no checkpoint: expected {_KINDS}, got a zip archive of"
      f" {', '.join(names[:5]) or 'nothing'}"
    )
  with _damage_named(path), zipfile.ZipFile(path) as archive:
    folder = names[0].partition("/")[0]  # PyTorch ignores the others
    summary = safe_pickle.scan(io.BytesIO(archive.read(f"{folder}/data.pkl")))
    _check_globals(path, summary.globals)
    for key, size in _storages(summary):
      if archive.getinfo(f"{folder}/data/{key}").file_size < size:
        raise ValueError(f"storage {key} has less than its {size:,} bytes")


def _check_legacy(path: pathlib.Path) -> None:
  """Check what PyTorch before 1.6 wrote: five pickles, then the storages."""
  with (
    _damage_named(path),
    path.open("rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
  ):
    wanted: dict[str, int] = {}
    for _ in range(4):  # magic number, protocol, system, object
      summary = safe_pickle.scan(content)
      _check_globals(path, summary.globals)
      wanted.update(_storages(summary))
    start = content.tell()
    _check_globals(path, safe_pickle.scan(content).globals)
    keys = _Plain(io.BytesIO(content[start : content.tell()])).load()
    # The others would be left as whatever the memory held.
    if not isinstance(keys, list) or wanted.keys() - set(map(str, keys)):
      raise ValueError("it lists storages that it does not hold")
    if sum(wanted.values()) > len(content) - content.tell():
      raise ValueError("it has less bytes than its storages")


class _Plain(pickle.Unpickler):
  """Reads constants and containers of them."""

  def find_class(self, module: str, name: str) -> Any:
    """Refuse every global."""
    raise ValueError(f"a list of storages that asks for {module}.{name}")


@contextlib.contextmanager
def _damage_named(path: pathlib.Path) -> Iterator[None]:
  """Name the file in errors of its first look, whatever they are."""
  try:
    yield
  except _RefusedError as error:
    raise ValueError(str(error)) from None
  except Exception as error:
    raise _damaged(path, _TORCH, error) from error


_ITEM_BYTES = {
  **dict.fromkeys(("Byte", "Char", "Bool", "QInt8", "QUInt8"), 1),
  **dict.fromkeys(("Half", "BFloat16", "Short", "QUInt4x2", "QUInt2x4"), 2),
  **dict.fromkeys(("Float", "Int", "QInt32"), 4),
  **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
  "ComplexDouble": 16,
}


def _storages(summary: safe_pickle.Summary) -> Iterator[tuple[str, int]]:
  """Key and bytes of each storage that a pickle names."""
  for item in summary.persistent_ids:
    kind, key, count = item[1], item[2], item[4]
    name = kind.removeprefix("torch.").removesuffix("Storage")
    if name not in _ITEM_BYTES or not isinstance(count, int) or count < 0:
      raise ValueError(f"a storage of {count} numbers of kind {kind}")
    yield str(key), count * _ITEM_BYTES[name]


# What weights are made of.
_NEEDED = re.compile(
  r"collections\.(OrderedDict|Counter|defaultdict)|torch\.nn\.parameter\.Parameter"
  r"|torch\._utils\._rebuild_(tensor|tensor_v2|sparse_tensor)"
  r"|torch\._utils\._rebuild_(parameter|parameter_with_state)"
  r"|torch\.serialization\._get_layout|torch\.(Size|device|\w+Storage)"
  r"|torch\.(u?int|b?float|double|half|long|short|bool|complex)\w*"
  r"|_codecs\.encode|builtins\.(set|complex)|argparse\.Namespace"
)
# What stands beside them in many files. Nothing reads it, so none of it is
# built: a placeholder takes its place.
_HARMLESS = (
  "numpy.dtype",
  "numpy.ndarray",
  *(
    f"numpy.{core}.multiarray.{name}"
    for core in ("core", "_core")
    for name in ("scalar", "_reconstruct")
  ),
  *(
    f"pathlib.{module}{flavour}Path"
    for module in ("", "_local.")
    for flavour in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")
  ),
  *(
    f"datetime.{name}"
    for name in ("datetime", "date", "time", "timedelta", "timezone")
  ),
  *(
    f"builtins.{name}"
    for name in ("list", "dict", "int", "float", "str", "bool", "tuple")
  ),
  "types.SimpleNamespace",
)


class _RefusedError(ValueError):
  """A file that asks for more than weights."""


def _check_globals(path: pathlib.Path, names: frozenset[str]) -> None:
  refused = []
  for name in sorted(names):
    module, _, last = name.rpartition(".")
    # Python 3 writes protocol 2 with Python 2's names.
    module, last = _compat_pickle.NAME_MAPPING.get(
      (module, last), (module, last)
    )
    name = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{last}"
    if not _NEEDED.fullmatch(name) and name not in _HARMLESS:
      refused.append(name)
  if refused:
    more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
    raise _RefusedError(
      f"{path} is refused: it asks for the global {', '.join(refused[:3])}"
      f"{more}, expected only tensors, numbers, strings and dicts. Nothing of"
      " it was executed. If you trust the file, save its weights alone, where"
      " its code is installed: c = torch.load(FILE, weights_only=False), then"
      ' torch.save(c.state_dict(), "weights.pth") if c is a network, or'
      ' torch.save(c["model"], "weights.pth") if it is a dict that holds them'
    )


def _read_torch(path: pathlib.Path) -> Any:
  torch_files = import_torch_files(path)
  try:
    limit = memory_limit(path.stat().st_size)
    return torch_files.load(path, limit, _HARMLESS)
  except (ImportError, MemoryError):
    raise
  except pickle.UnpicklingError as error:
    if "Unsupported operand" in str(error):
      raise ValueError(
        f"{path} is refused: it is damaged, or pickled with another protocol"
        " than torch.save's own (2), the only one that can be read without"
        " running its code. Copy it again, or save it again with PyTorch"
      ) from error
    raise _damaged(path, _TORCH, error) from error
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


def _damaged(path: pathlib.Path, kind: str, error: Exception) -> ValueError:
  # The reason stands at the end of PyTorch's long text.
  text = str(error).strip().partition("WeightsUnpickler error: ")
  line = (text[2] or text[0]).partition("\n")[0].strip() or "no more data"
  return ValueError(
    f"{path}: expected {kind}, got a file that is cut short or damaged"
    f" ({type(error).__name__}: {line[:200]}). Copy or download it again"
  )


def _not_a_checkpoint(path: pathlib.Path, start: bytes) -> ValueError:
  hint = ""
  if path.suffix == ".stablehlo":
    hint = " It is a program: give the export that it was made of"
  elif path.suffix == ".onnx" or (start[:1] == b"\b" and b"pytorch" in start):
    hint = " ONNX is not supported yet: give the state dict of the network"
  elif start.startswith(b"\x89HDF"):
    hint = " It is a file of HDF5: save the tensors with numpy.savez"
  elif start.startswith(b"version https://git-lfs"):
    hint = " It is a pointer of Git LFS: fetch the file itself (git lfs pull)"
  elif start.lstrip().startswith(b"<"):
    hint = " It is a web page: download the file itself"
  return ValueError(
    f"{path} is no checkpoint: expected {_KINDS}, got a file that begins with"
    f" {start[:40]!r}.{hint}"
  )
