"""Digests that the files we write carry, so that no changed bit goes unseen.

A safetensors file has it in its metadata, a .npz archive in its comment, and a
StableHLO program behind its end, where `jax.export` does not look.
"""

import hashlib
import re
from collections.abc import Mapping

import numpy as np

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
