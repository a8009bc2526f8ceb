"""Digests that the files we write carry, so that no changed bit goes unseen.

A safetensors file has it in its metadata. A .npz archive and a file of PyTorch,
which is an archive too, have it in their comment, which `torch.load` and numpy
ignore. A StableHLO program has it behind its end, where `jax.export` does not
look.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_jax.interop.naming import CARD

KEY = "sha256"
_END = b"\nkd_jax sha256 "


def of_tensors(tensors: Mapping[str, np.ndarray], card: str | None) -> str:
  """Hash names, types, shapes and values, and the card beside them."""
  digest = hashlib.sha256((card or "").encode())
  for name in sorted(tensors):
    array = np.asarray(tensors[name], order="C")
    digest.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def parts(content: Any) -> tuple[dict[str, np.ndarray], str | None]:
  """Tensors and card of a file of PyTorch, as `of_tensors` takes them.

  Args:
    content: a state dict, or a dict of state dicts and the card. Floats may be
      of any type: they are read as float32.
  """
  tensors: dict[str, np.ndarray] = {}
  items = content if isinstance(content, Mapping) else {}
  for name, value in items.items():
    if isinstance(value, Mapping):
      inner, _ = parts(value)
      tensors.update({f"{name}.{key}": array for key, array in inner.items()})
    elif isinstance(value, np.ndarray):
      floats = value.dtype.kind in "fV"  # V: bfloat16
      tensors[name] = value.astype(np.float32) if floats else value
  card = items.get(CARD)
  return tensors, card if isinstance(card, str) else None


def comment(digest: str) -> bytes:
  """A digest as the comment of an archive, or the end of a program."""
  return _END + digest.encode()


def from_comment(text: bytes) -> str | None:
  """The digest of a `comment`, None if it is none."""
  found = re.fullmatch(re.escape(_END) + rb"([^\n]{64})", text)
  return found[1].decode(errors="replace") if found else None


def append(content: bytes) -> bytes:
  """A program with its digest behind it."""
  return content + comment(hashlib.sha256(content).hexdigest())


def check_appended(content: bytes, where: object) -> None:
  """Raise ValueError if a program is not the one that `append` was given."""
  length = len(comment(64 * "0"))
  expected = from_comment(content[-length:])
  got = hashlib.sha256(memoryview(content)[:-length]).hexdigest()
  if expected not in (None, got):
    raise ValueError(
      f"{where}: expected the program as it was written, got another (its"
      " sha256 differs): the file is damaged. Export or copy it again"
    )
