"""Files of weights: .pth, .safetensors and .npz, read and written.

A file is data and nothing in it is executed: one that would run code is
refused, with the name of what it asks for. Only .pth needs PyTorch.
"""

import dataclasses
import io
import json
import logging
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kd_jax import storage
from kd_jax.interop import card as card_lib
from kd_jax.interop import digests, naming, readers
from kd_jax.interop.naming import CARD, CLASSIFIER, CONTAINERS, PROJECTOR

_log = logging.getLogger(__name__)

# Usual endings of files of weights, and those that are written.
SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".npz")
WRITABLE = (".pth", ".pt", ".safetensors", ".npz")


@dataclasses.dataclass(frozen=True)
class Weights:
  """The content of a file of weights.

  Attributes:
    tensors: of the network, by names without wrappers' prefixes; floats are
      float32 and finite.
    projector: of a SimKD student's projector, else None.
    classifier: weight and bias of its teacher's classifier, if in the file.
    card: the model card, if in the file.
    metadata: numbers and strings besides, such as the epoch.
  """

  tensors: dict[str, np.ndarray]
  projector: dict[str, np.ndarray] | None
  classifier: dict[str, np.ndarray] | None
  card: dict[str, Any] | None
  metadata: dict[str, float | int | str]


def is_weights_file(path: str | os.PathLike[str]) -> bool:
  """Tell whether a path is a file, or is named like a file of weights."""
  path = pathlib.Path(path)
  named_so = path.suffix.lower() in SUFFIXES
  return not path.is_dir() and (named_so or path.exists())


def read(
  path: str | os.PathLike[str], names: naming.Names = naming.AS_THEY_ARE
) -> Weights:
  """Read a file of weights.

  A state dict may be the whole file, or stand under a key. Of weights and
  their average over the training, the average is taken.

  Args:
    path: of any name; its bytes decide the format.
    names: what to make of the names in the file.

  Raises:
    ValueError: if there is no such file, if it would run code, is cut short,
      is no checkpoint, or holds a value that is not finite.
    ImportError: if it needs PyTorch, which is missing.
  """
  path = pathlib.Path(path)
  _check_is_file(path)
  content = readers.read(path)
  if not isinstance(content, Mapping):
    raise ValueError(
      f"{path}: expected a dict of tensors, got {type(content).__name__}."
      " Save model.state_dict()"
    )
  content = _split_parts(content)
  card = _card(content, path)
  try:
    tensors, names = _network(content, names)
    tensors = _finite(naming.strip_prefixes(tensors, names))
    projector, classifier = (
      _finite(naming.strip_prefixes(content[name], shared=False))
      if _is_state_dict(content.get(name))
      else None
      for name in (PROJECTOR, CLASSIFIER)
    )
    return Weights(
      tensors=tensors,
      projector=projector,
      classifier=classifier,
      card=card,
      metadata=_metadata(content),
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def write(
  path: str | os.PathLike[str],
  parts: Mapping[str, Mapping[str, np.ndarray]],
  *,
  card: Mapping[str, Any] | None = None,
) -> None:
  """Write state dicts; the file appears whole or not at all.

  A network alone is a bare state dict, for `load_state_dict` of what
  `torch.load` or safetensors' `load_file` return. Several parts become a dict
  of state dicts in a file of PyTorch; in the other formats, the part's name
  goes before each tensor's.

  Args:
    path: a new file; ends in one of `WRITABLE`.
    parts: state dicts by part, the network's under "model".
    card: written where the format has a place beside a bare state dict.

  Raises:
    ValueError: if the file exists, or ends in something else.
    ImportError: if it needs PyTorch, which is missing.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() not in WRITABLE:
    raise ValueError(
      f"{path}: expected a file that ends in {', '.join(WRITABLE)}, got"
      f" {path.suffix or 'no ending'!r}"
    )
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
  extra = {} if card is None else {CARD: json.dumps(card_lib.seal(card))}
  suffix = path.suffix.lower()
  if suffix == ".npz" and any(a.dtype.kind == "V" for a in flat.values()):
    raise ValueError(
      f"{path}: expected float32, got bfloat16, which .npz cannot hold. Write"
      " a .safetensors or .pth file"
    )
  # In memory: the libraries' errors of a full disk are of many classes.
  if suffix == ".npz":
    file = io.BytesIO()
    content = flat if alone else {**flat, **extra}
    np.savez(file, **content)
    data = _with_comment(file.getvalue(), digests.of_tensors(content, None))
  elif suffix == ".safetensors":
    from safetensors import numpy as safetensors

    digest = digests.of_tensors(flat, extra.get(CARD))
    metadata = {"format": "pt", **extra, digests.KEY: digest}
    data = safetensors.save(flat, metadata=metadata)
  else:
    torch_files = readers.import_torch_files(path)
    content = alone or {**arrays, **extra}
    digest = digests.of_tensors(*digests.parts(content))
    data = _with_comment(torch_files.to_bytes(content), digest)
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_whole(path, data)


def _with_comment(data: bytes, digest: str) -> bytes:
  """A zip archive with a digest as its comment."""
  file = io.BytesIO(data)
  with zipfile.ZipFile(file, "a") as archive:
    archive.comment = digests.comment(digest)
  return file.getvalue()


def check_new(path: pathlib.Path) -> None:
  """Raise ValueError if a path is taken."""
  if path.exists() or path.is_symlink():
    raise ValueError(
      f"{path}: expected a file that does not exist yet. It was not changed;"
      " give another path"
    )


def _check_is_file(path: pathlib.Path) -> None:
  if not path.exists():
    raise ValueError(f"{path} does not exist: expected a file of weights")
  if path.is_dir():
    raise ValueError(f"{path}: expected a file of weights, got a folder")
  if not path.is_file():  # opening a pipe would wait for its writer
    raise ValueError(f"{path}: expected a file, got a pipe or a device")
  if re.search(r"-\d{5}-of-\d{5}\.", path.name):
    raise ValueError(
      f"{path}: expected all weights in one file, got one of several. Files in"
      " parts are not supported yet; load them with their toolbox and save one"
      " file"
    )
  if not path.stat().st_size:
    raise ValueError(f"{path} is empty: expected a file of weights")


def _is_state_dict(value: Any) -> bool:
  return isinstance(value, Mapping) and any(
    isinstance(item, np.ndarray) and item.ndim for item in value.values()
  )


def _split_parts(content: Mapping[str, Any]) -> Mapping[str, Any]:
  """Turn "proj.x" of a flat file into nested dicts, one a part."""
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


def _card(
  content: Mapping[str, Any], path: pathlib.Path
) -> dict[str, Any] | None:
  text = content.get(CARD)
  if isinstance(text, np.ndarray):  # of an .npz
    text = text.item() if not text.ndim else None
  if not isinstance(text, str):
    return None
  where = f"{path}: {CARD}"
  remedy = "Write the file again with python -m kd_jax export"
  return card_lib.check(storage.parse_json(text, where, remedy), where)


def _network(
  content: Mapping[str, Any], names: naming.Names
) -> tuple[dict[str, np.ndarray], naming.Names]:
  """Find the state dict of the network, and what is left to select of it."""
  parts = {
    str(key): value
    for key, value in content.items()
    if key not in (PROJECTOR, CLASSIFIER) and _is_state_dict(value)
  }
  if _is_state_dict(content):  # others are a part of it
    parts = {key: parts[key] for key in CONTAINERS if key in parts}
  chosen = _choose(parts, names.prefix)
  state_dict: Mapping[str, Any] = content if chosen is None else parts[chosen]
  if chosen is not None and chosen == names.prefix:
    names = names._replace(prefix=None)
  if not _is_state_dict(state_dict):
    keys = ", ".join(map(str, list(content)[:10])) or "nothing"
    raise ValueError(
      f"expected tensors, alone or under {', '.join(CONTAINERS)}, got {keys}."
      " Save the network's state dict alone"
    )
  tensors = {
    str(name): value
    for name, value in state_dict.items()
    if isinstance(value, np.ndarray) and name != CARD
  }
  return tensors, names


def _choose(parts: Mapping[str, Any], prefix: str | None) -> str | None:
  """Choose the state dict that is meant."""
  if prefix in parts:
    return prefix
  averaged = [key for key in parts if naming.is_averaged(key)]
  plain = [key for key in parts if key not in averaged]
  known = [key for key in plain if key in CONTAINERS]
  if len(averaged) == 1 and len(known or plain) <= 1:
    if plain:
      _log.info(
        "The file holds weights (%s) and their average over the training (%s);"
        " the average is taken. --prefix names the other",
        *((known or plain)[0], averaged[0]),
      )
    return averaged[0]
  found = known or plain or averaged
  if len(found) > 1:
    raise ValueError(
      f"expected one state dict, got {len(found)}: {' and '.join(found)}. Name"
      " the one that is meant: python -m kd_jax convert --prefix"
      f" {found[0]}, ..."
    )
  return found[0] if found else None


def _metadata(content: Mapping[str, Any]) -> dict[str, float | int | str]:
  metadata: dict[str, float | int | str] = {}
  for name, value in content.items():
    if isinstance(value, np.ndarray) and not value.ndim:
      value = value.item()
    if isinstance(value, int | float | str):
      metadata[str(name)] = value
  return metadata


def _finite(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Convert floats to float32, which must be finite."""
  checked = {}
  for name, array in tensors.items():
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
