"""Weight files of other toolboxes: .pth of every age, .safetensors, .npz.

A file is data and nothing of it is executed: one that would run code is
refused, with the name of what it asks for. PyTorch is imported for .pth alone.
"""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import pickletools
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kd_jax.interop import guess, pytorch

_TORCH = (".pth", ".pt", ".tar", ".bin")
# What a path to weights ends in.
SUFFIXES = (*_TORCH, ".safetensors", ".npz")
# Where training loops put the network's state dict.
CONTAINERS = ("model", "state_dict", "net", "model_state_dict")
# Where SimKD's training loop puts its student's projector; the classifier of
# its teacher, which that loop leaves out, and the model card stand beside it.
PROJECTOR, CLASSIFIER, CARD = "proj", "classifier", "card"


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a file holds.

  Attributes:
    tensors: the network's, by their names without wrappers' prefixes; floats
      are float32 and finite.
    projector: those of the projector, if the file is of a SimKD student.
    classifier: its teacher's weight and bias, if the file has them.
    card: the model card, if the file has one.
    facts: the numbers and strings beside them, such as the epoch.
  """

  tensors: dict[str, np.ndarray]
  projector: dict[str, np.ndarray] | None
  classifier: dict[str, np.ndarray] | None
  card: dict[str, Any] | None
  facts: dict[str, float | int | str]


def is_weights_file(path: str | os.PathLike[str]) -> bool:
  """Whether a path is to be read here: a file, or named like one."""
  path = pathlib.Path(path)
  named_so = path.suffix.lower() in SUFFIXES and not path.is_dir()
  return named_so or path.is_file()


def read(path: str | os.PathLike[str]) -> Weights:
  """Reads a file of weights.

  A state dict may be the whole file, or stand under "model", "state_dict",
  "net" or "model_state_dict".

  Args:
    path: ends in one of `SUFFIXES`.

  Returns:
    Its content.

  Raises:
    ValueError: if there is no such file, if it would run code, is cut short,
      is no checkpoint, or holds a value that is not finite.
    ImportError: if it takes PyTorch and there is none.
  """
  path = pathlib.Path(path)
  _check_is_file(path)
  reader: Callable[[pathlib.Path], Any] = _read_torch
  if path.suffix.lower() == ".safetensors":
    reader = _read_safetensors
  elif path.suffix.lower() == ".npz":
    reader = _read_npz
  content = reader(path)
  if not isinstance(content, Mapping):
    raise ValueError(
      f"{path}: expected a dict of tensors, got {type(content).__name__}."
      " Save model.state_dict()"
    )
  try:
    content = _nested(content)
    tensors = _check_tensors(_network(content))
    projector, classifier = (
      _check_tensors(content[name])
      if _is_state_dict(content.get(name))
      else None
      for name in (PROJECTOR, CLASSIFIER)
    )
    return Weights(
      tensors=tensors,
      projector=projector,
      classifier=classifier,
      card=_card(content),
      facts=_facts(content),
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def network_alone(
  path: str | os.PathLike[str], weights: Weights
) -> dict[str, np.ndarray]:
  """The tensors of a network that needs no other part.

  Args:
    path: of the file, for what the error says.
    weights: what `read` found in it.

  Returns:
    See `Weights.tensors`.

  Raises:
    ValueError: if it is a student of SimKD's training loop.
  """
  if weights.projector is not None:
    raise ValueError(
      f"{path}: expected a network with a classifier of its own, got a SimKD"
      " student, which predicts through its teacher's. Make one model of both"
      f" with python -m kd_jax convert --simkd_student {path} --teacher FILE"
      " --to DIR"
    )
  return weights.tensors


def load_variables(
  path: str | os.PathLike[str], *, model_name: str, num_classes: int
) -> dict[str, Any]:
  """A model's variables from a file of weights.

  Args:
    path: ends in one of `SUFFIXES`.
    model_name: one of `kd_jax.models.names()`.
    num_classes: of its classifier.

  Returns:
    See `variables`.

  Raises:
    ValueError: see `read`, `network_alone` and `variables`.
    ImportError: if it takes PyTorch and there is none.
  """
  tensors = network_alone(path, read(path))
  return variables(
    path, tensors, model_name=model_name, num_classes=num_classes
  )


def variables(
  path: str | os.PathLike[str],
  tensors: Mapping[str, np.ndarray],
  *,
  model_name: str,
  num_classes: int,
) -> dict[str, Any]:
  """A model's variables from tensors that were read.

  Args:
    path: of the file, for what the error says.
    tensors: see `Weights`.
    model_name: one of `kd_jax.models.names()`.
    num_classes: of its classifier.

  Returns:
    `{"params": ..., "batch_stats": ...}` of numpy float32 arrays.

  Raises:
    ValueError: if they do not fit: lists the tensors missing, unexpected and
      misshapen, and says what it looks like.
  """
  try:
    return pytorch.from_state_dict(model_name, num_classes, tensors)
  except ValueError as error:
    found = guess.guess_model(tensors)
    hint = f" It looks like {found}." if found else ""
    raise ValueError(f"{path}: {error}{hint}") from error


def write(
  path: str | os.PathLike[str],
  parts: Mapping[str, Mapping[str, np.ndarray]],
  *,
  card: Mapping[str, Any] | None = None,
) -> None:
  """Writes state dicts; the file appears whole or not at all.

  A network alone is a bare state dict, for `load_state_dict` of what
  `torch.load` or safetensors' `load_file` return. Several parts are a dict of
  state dicts in a file of PyTorch, and elsewhere one whose names begin with
  the part's.

  Args:
    path: which must not exist; ends in .pth, .pt, .safetensors or .npz.
    parts: state dicts by part, the network's under "model".
    card: written where the format has a place beside a bare state dict.

  Raises:
    ValueError: if the file exists, or ends in something else.
    ImportError: if it takes PyTorch and there is none.
  """
  path = pathlib.Path(path)
  check_new(path)
  # safetensors writes the memory as it lies.
  arrays: dict[str, dict[str, Any]] = {
    part: {name: np.asarray(a, order="C") for name, a in tensors.items()}
    for part, tensors in parts.items()
  }
  alone = arrays["model"] if len(arrays) == 1 else None
  flat: dict[str, Any] = alone or {
    f"{part}.{name}": array
    for part, tensors in arrays.items()
    for name, array in tensors.items()
  }
  extra = {} if card is None else {CARD: json.dumps(card)}
  suffix = path.suffix.lower()
  if suffix == ".npz" and any(a.dtype.kind == "V" for a in flat.values()):
    raise ValueError(
      f"{path}: expected float32, got bfloat16, which .npz cannot hold. Write"
      " a .safetensors or .pth file"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix=f".{path.name}.", dir=path.parent
  ) as folder:
    temporary = pathlib.Path(folder) / path.name
    if suffix == ".npz":
      with temporary.open("wb") as file:
        content = flat if alone else {**flat, **extra}
        np.savez(file, **content)
    elif suffix == ".safetensors":
      from safetensors import numpy as safetensors

      metadata = {"format": "pt", **extra}
      safetensors.save_file(flat, temporary, metadata=metadata)
      temporary.chmod(0o644)  # made for its owner alone
    else:
      _torch(path).save(temporary, alone or {**arrays, **extra})
    temporary.rename(path)


def check_new(path: pathlib.Path) -> None:
  """Refuses to write where something is, or in no known format.

  Raises:
    ValueError: says so.
  """
  writable = (".pth", ".pt", ".safetensors", ".npz")
  if path.suffix.lower() not in writable:
    raise ValueError(
      f"{path}: expected a file that ends in {', '.join(writable)}, got"
      f" {path.suffix or 'no ending'!r}"
    )
  if path.exists() or path.is_symlink():
    raise ValueError(
      f"{path}: expected a file that does not exist yet. It was not changed;"
      " give another"
    )


def _check_is_file(path: pathlib.Path) -> None:
  if not path.exists():
    raise ValueError(f"{path} does not exist: expected a file of weights")
  if not path.is_file():
    raise ValueError(f"{path}: expected a file of weights, got a folder")
  if path.suffix.lower() not in SUFFIXES:
    raise ValueError(
      f"{path}: expected a file of weights, which ends in"
      f" {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}. Rename it"
      " if it is one"
    )
  if not path.stat().st_size:
    raise ValueError(f"{path} is empty: expected a file of weights")


# What a file means.


def _is_state_dict(value: Any) -> bool:
  return isinstance(value, Mapping) and any(
    isinstance(item, np.ndarray) and item.ndim for item in value.values()
  )


def _nested(content: Mapping[str, Any]) -> Mapping[str, Any]:
  """Parts that a flat file tells apart by how names begin, as dicts."""
  names = [name for name in content if isinstance(name, str)]
  if not any(name.startswith(f"{PROJECTOR}.") for name in names):
    return content
  nested: dict[str, Any] = {}
  for name, value in content.items():
    part, _, rest = str(name).partition(".")
    if part in ("model", PROJECTOR, CLASSIFIER) and rest:
      nested.setdefault(part, {})[rest] = value
    else:
      nested[str(name)] = value
  return nested


def _card(content: Mapping[str, Any]) -> dict[str, Any] | None:
  text = content.get(CARD)
  if isinstance(text, np.ndarray):  # of an .npz
    text = text.item() if not text.ndim else None
  if not isinstance(text, str):
    return None
  try:
    card = json.loads(text)
  except json.JSONDecodeError:
    card = None
  if not isinstance(card, dict):
    raise ValueError(
      f"expected a model card, JSON, under {CARD!r}, got {text[:40]!r}. Write"
      " the file again with python -m kd_jax export"
    )
  return card


def _network(content: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The state dict of the network, wherever a training loop put it."""
  found = [name for name in CONTAINERS if _is_state_dict(content.get(name))]
  if len(found) > 1:
    raise ValueError(
      f"expected one state dict, got {len(found)}: {' and '.join(found)}. Save"
      " the one that is meant alone"
    )
  state_dict: Mapping[str, Any] = content[found[0]] if found else content
  if not _is_state_dict(state_dict):
    keys = ", ".join(map(str, list(content)[:10])) or "nothing"
    raise ValueError(
      f"expected tensors, alone or under {', '.join(CONTAINERS)}, got {keys}."
      " Save the network's state dict alone"
    )
  return {
    str(name): value
    for name, value in state_dict.items()
    if isinstance(value, np.ndarray) and name != CARD
  }


def _facts(content: Mapping[str, Any]) -> dict[str, float | int | str]:
  facts: dict[str, float | int | str] = {}
  for name, value in content.items():
    if isinstance(value, np.ndarray) and not value.ndim:
      value = value.item()
    if isinstance(value, (int, float, str)):
      facts[str(name)] = value
  return facts


def _check_tensors(
  tensors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Strips prefixes and makes floats float32, which have to be finite."""
  checked = {}
  for name, array in pytorch.strip_prefixes(tensors).items():
    # numpy's own check does not know bfloat16.
    if jnp.issubdtype(array.dtype, jnp.floating):
      with np.errstate(over="ignore"):  # found below
        array = array.astype(np.float32, copy=False)
      wrong = array.size - np.count_nonzero(np.isfinite(array))
      if wrong:
        raise ValueError(
          f"expected finite weights, got {wrong} NaN or infinite of"
          f" {array.size} values in {name}. The training that wrote it"
          " diverged, or the file is damaged"
        )
    checked[name] = array
  return checked


# How a file is read.


def _damaged(path: pathlib.Path, kind: str, error: Exception) -> ValueError:
  # Of PyTorch's many words, the reason.
  text = str(error).strip().partition("WeightsUnpickler error: ")
  line = (text[2] or text[0]).partition("\n")[0] or "no more data"
  return ValueError(
    f"{path}: expected {kind}, got a file that is cut short or damaged"
    f" ({type(error).__name__}: {line.strip()}). Copy or download it again"
  )


def _no_checkpoint(path: pathlib.Path, kind: str) -> ValueError:
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


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
  import safetensors
  from safetensors import numpy as reader

  kind = "a safetensors file"
  with path.open("rb") as file:
    header = file.read(9)
  if header[8:] != b"{":  # after the length of the JSON header
    raise _no_checkpoint(path, kind)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      card = (file.metadata() or {}).get(CARD)
    return {**reader.load_file(path), **({CARD: card} if card else {})}
  except (safetensors.SafetensorError, KeyError) as error:
    raise _damaged(path, kind, error) from error


def _read_npz(path: pathlib.Path) -> dict[str, Any]:
  kind = "a .npz archive of numpy"
  if not _starts_as_zip(path):
    raise _no_checkpoint(path, kind)
  try:
    # numpy would leave open a file of its own that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      arrays = {}
      for name in archive.files:
        try:
          arrays[name] = archive[name]
        except ValueError as error:
          if "allow_pickle" not in str(error):
            raise
          raise ValueError(
            f"{path} is refused: {name} is a pickled object, expected numbers."
            " Nothing of it was executed"
          ) from None
      return arrays
  except ValueError as error:
    if "is refused" in str(error):
      raise
    raise _damaged(path, kind, error) from error
  # Damage surfaces as whatever the first misread byte leads to.
  except Exception as error:
    raise _damaged(path, kind, error) from error


def _starts_as_zip(path: pathlib.Path) -> bool:
  with path.open("rb") as file:
    return file.read(4) == b"PK\x03\x04"


def _torch(path: pathlib.Path) -> Any:
  try:
    from kd_jax.interop import torch_files
  except ModuleNotFoundError as error:
    if error.name != "torch":
      raise
    raise ImportError(
      f"{path}: this format takes PyTorch, which is not installed. Install it"
      ' with pip install "kd_jax[torch]" (the CPU build will do), or name a'
      " .safetensors or .npz file"
    ) from error
  return torch_files


def _read_torch(path: pathlib.Path) -> Any:
  kind = "a file of torch.save"
  with path.open("rb") as file:
    start = file.read(1)
  is_zip = _starts_as_zip(path)
  try:
    if is_zip:
      _check_torch_zip(path)
    elif tarfile.is_tarfile(path):
      raise ValueError(
        f"{path} is a tar archive, as PyTorch wrote before 2017: expected a"
        " file of torch.save from PyTorch 0.1.11 or newer. If you trust the"
        " file, load it with PyTorch (weights_only=False) and save it again"
      )
    elif start != b"\x80":
      raise _no_checkpoint(path, kind)
    return _torch(path).load(path)
  except (ImportError, MemoryError):
    raise
  except pickle.UnpicklingError as error:
    wanted = _wanted_global(path, str(error), is_zip)
    if wanted is None and "Unsupported operand" in str(error):
      raise ValueError(
        f"{path} is refused: it is pickled with another protocol than"
        " torch.save's own, 2, which is the one that can be read without"
        " running what it holds. Save it again with PyTorch"
      ) from error
    if wanted is None:
      raise _damaged(path, kind, error) from error
    raise _refused(path, wanted) from None
  except ValueError as error:
    if str(error).startswith(str(path)):
      raise
    raise ValueError(f"{path}: {error}") from error
  # Damage surfaces as whatever the first misread byte leads to.
  except Exception as error:
    raise _damaged(path, kind, error) from error


def _check_torch_zip(path: pathlib.Path) -> None:
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    damaged = archive.testzip()
  inner = {name.partition("/")[2] for name in names}
  if "constants.pkl" in inner:
    raise ValueError(
      f"{path} is a TorchScript program: expected a state dict. Load it with"
      " torch.jit.load and save its state_dict()"
    )
  if "data.pkl" not in inner:
    raise ValueError(
      f"{path} is no checkpoint: expected a file of torch.save, got a zip"
      f" archive of {', '.join(names[:5]) or 'nothing'}"
    )
  if damaged is not None:  # PyTorch does not look at the checksums
    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _refused(path: pathlib.Path, wanted: str) -> ValueError:
  return ValueError(
    f"{path} is refused: it asks for the global {wanted}, expected tensors,"
    " numbers, strings and dicts of them only. Nothing of it was executed. If"
    " you trust the file and it holds a whole network, load it with PyTorch"
    " and save its state_dict()"
  )


def _wanted_global(
  path: pathlib.Path, message: str, is_zip: bool
) -> str | None:
  """What a refused file asked for: from PyTorch's words, else its pickles."""
  match = re.search(r"GLOBAL (\S+) (?:was not|whose module)", message)
  if match:
    return match[1]
  if is_zip:
    with zipfile.ZipFile(path) as archive:
      (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
      pickled = archive.read(name)
  else:
    pickled = path.read_bytes()
  found = (g for g in _globals(pickled) if not _HARMLESS.fullmatch(g))
  return next(found, None)


# What state dicts are made of.
_HARMLESS = re.compile(
  r"collections\.OrderedDict|torch\.nn\.parameter\.Parameter"
  r"|torch\._utils\._rebuild_\w+|torch\.(cuda\.)?\w+(Storage|Tensor)"
)


def _globals(pickled: bytes) -> Iterator[str]:
  """The globals that pickles name, up to where they end or break."""
  file, strings = io.BytesIO(pickled), list[str]()
  try:
    while True:
      memo: dict[Any, str | None] = {}
      pushed: str | None = None
      for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
          yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
          yield ".".join(strings[-2:])
        if opcode.name == "MEMOIZE":
          memo[len(memo)] = pushed
        elif "PUT" in opcode.name:
          memo[argument] = pushed
        else:
          is_get = "GET" in opcode.name
          value = memo.get(argument) if is_get else argument
          pushed = value if isinstance(value, str) else None
          if pushed is not None:
            strings.append(pushed)
  except Exception:
    return
