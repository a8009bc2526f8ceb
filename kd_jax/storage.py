"""Files written whole and verified when read: JSON, metrics, arrays."""

import functools
import gzip
import json
import logging
import math
import os
import pathlib
import socket
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kd_jax.distributed import collectives

_log = logging.getLogger(__name__)


def fingerprint(tree: Any) -> list[int]:
  """A 64-bit sum over each array's bits, weighted by their position.

  It is computed on the host, because compiling it for every tree of arrays
  would take longer than all the checkpoints of a short run. In many processes,
  all have to call it.

  Args:
    tree: arrays.

  Returns:
    One number per leaf, in the order of `jax.tree.leaves`. It does not depend
    on the devices, on how they share the array, or on rows of zeros after it.
  """
  leaves = [_as_bits(x) for x in jax.tree.leaves(tree)]
  own, shared = [0] * len(leaves), []
  for i, leaf in enumerate(leaves):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
      own[i] = _weighted_sum(np.asarray(leaf))
    elif leaf.is_fully_replicated:
      own[i] = _weighted_sum(np.asarray(leaf.addressable_data(0)))
    else:
      shared.append(i)
      own[i] = sum(
        _weighted_sum(np.asarray(s.data), s.index[0].start or 0)
        for s in leaf.addressable_shards
        if s.replica_id == 0
      )
  if shared:
    # As halves: JAX has no 64 bits.
    parts = np.array([divmod(own[i] & _MASK, 2**32) for i in shared], np.uint32)
    gathered = collectives.gather_processes(parts)
    for i, column in zip(shared, gathered.swapaxes(0, 1)):
      own[i] = sum(int(high) * 2**32 + int(low) for high, low in column)
  return [value & _MASK for value in own]


_MASK = 2**64 - 1


_BLOCK = 1 << 16


def _weighted_sum(x: np.ndarray, first_row: int = 0) -> int:
  """Sum of words times odd weights; `x` begins at that row of its array."""
  start = first_row * math.prod(x.shape[1:])
  flat = np.ascontiguousarray(x).reshape(-1)
  words = flat.view(f"u{x.dtype.itemsize}")
  weights, total, done = _weights(), 0, 0
  while done < words.size:
    number, place = divmod(start + done, _BLOCK)
    block = words[done : done + _BLOCK - place].astype(np.uint64)
    part = int(block.dot(weights[place : place + block.size]))
    total += part * int(_scramble(np.array([number], np.uint64))[0])
    done += block.size
  return total & _MASK


@functools.cache
def _weights() -> np.ndarray:
  """Of the places in a block."""
  return _scramble(np.arange(_BLOCK, 2 * _BLOCK, dtype=np.uint64))


def _scramble(x: np.ndarray) -> np.ndarray:
  """Odd numbers, so that no change is lost; and no two changes cancel out."""
  x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
  x ^= x >> np.uint64(29)
  x *= np.uint64(0xBF58476D1CE4E5B9)
  x ^= x >> np.uint64(32)
  return x | np.uint64(1)


def _as_bits(x):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(x)
  return x


def _alone() -> ocp.options.MultiprocessingOptions:
  """Makes Orbax wait for no other process."""
  own = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
  )


def save_tree(directory: pathlib.Path, tree: Any) -> None:
  """Writes a nested dict of arrays, alone, as a plain Orbax checkpoint."""
  with ocp.StandardCheckpointer(
    multiprocessing_options=_alone()
  ) as checkpointer:
    checkpointer.save(directory.resolve(), tree)


def restore_tree(directory: pathlib.Path) -> Any:
  """Reads what `save_tree` wrote, alone, as numpy arrays.

  Raises:
    ValueError: if it cannot be read.
  """
  directory = directory.resolve()
  try:
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(
      handler, multiprocessing_options=_alone()
    ) as checkpointer:
      metadata = checkpointer.metadata(directory).item_metadata
      arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
      )
      return checkpointer.restore(directory, restore_args=arguments)
  except Exception as error:
    raise ValueError(
      f"{directory}: expected an Orbax checkpoint, got one that cannot be"
      f" read ({type(error).__name__}: {error}). It may have been cut short"
      " while it was written or copied: export or copy it again"
    ) from error


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new, never half."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
  temporary.replace(path)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a `metrics.jsonl`; a last line cut short by a crash is left out.

  Args:
    path: of the file, or of one compressed by gzip, whose name ends in .gz.
  """
  raw = path.read_bytes()
  if path.suffix == ".gz":
    raw = gzip.decompress(raw)
  records = []
  for line in raw.decode("utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      _log.warning("%s: left out a line that was cut short", path)
  return records


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Nested dicts, and lists of dicts, as {"a.b": value, "c.0.d": value}.

  What is empty is a value.
  """
  if isinstance(tree, list) and all(isinstance(x, dict) for x in tree):
    tree = {str(i): x for i, x in enumerate(tree)} or tree
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
  return flat


def read_json(path: pathlib.Path) -> Any:
  """The content of a JSON file, None if there is no file.

  Raises:
    ValueError: if it is not JSON.
  """
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}: expected JSON, got a file that ends or breaks at"
      f" character {error.pos}. Restore it, or give another --workdir"
    ) from error


def draft(path: pathlib.Path) -> pathlib.Path:
  """A hidden file beside a path, of this process alone, to write it whole."""
  # Containers on two machines may have the same process id.
  return path.with_name(f".{socket.gethostname()}-{os.getpid()}-{path.name}")
