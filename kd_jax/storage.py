"""Files written whole and verified when read: JSON, metrics, arrays."""

import contextlib
import errno
import glob
import gzip
import json
import logging
import math
import os
import pathlib
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict, TypeVar

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import gpath

_log = logging.getLogger(__name__)
T = TypeVar("T")


# Of what a pathlib.Path leaves of a URL, too.
_URL = re.compile(r"[A-Za-z][\w+.-]*://|(gs|s3|az|hf|hdfs|abfss?|https?):/")


def user_path(text: str | os.PathLike[str], where: str) -> pathlib.Path:
  """Return a path that a user wrote; a leading `~` is the home folder.

  Args:
    text: what the user wrote.
    where: the flag or field, for the error.

  Raises:
    ValueError: for a bucket or another URL.
  """
  text = os.fspath(text)
  if _URL.match(text):
    raise ValueError(
      f"{where}: expected a path on a mounted file system, got the URL {text}."
      " Mount the bucket, as with gcsfuse or s3fs, and name that folder"
    )
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:  # ~nobody
    raise ValueError(f"{where}: no home folder for {text} ({error})") from error


def local_path(text: str | os.PathLike[str], where: str) -> pathlib.Path:
  """Return the absolute path of a folder that checkpoints may be below.

  Args:
    text: see `user_path`.
    where: see `user_path`.

  Raises:
    ValueError: see `user_path`, and for a backslash.
  """
  path = user_path(text, where).absolute()
  if "\\" in str(path):
    raise ValueError(
      f"{where}: expected a path without a backslash, which checkpoints cannot"
      f" be kept below, got {path}. Rename the folder"
    )
  return path


class _LiteralPath(gpath.PosixGPath):
  """A path whose own `[`, `*` and `?` are not wildcards.

  Orbax finds the files that it merges by a glob below the checkpoint.
  """

  def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
    return map(type(self), pathlib.Path(str(self)).glob(pattern))


def orbax_path(path: pathlib.Path) -> Any:
  """The path of a checkpoint as Orbax can take it; see `local_path`."""
  return _LiteralPath(local_path(path.resolve(), "checkpoint"))


def _alone() -> ocp.options.MultiprocessingOptions:
  """Makes Orbax wait for no other process."""
  own = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
  )


# Bytes that a checkpoint takes beside its arrays, at most.
_SPARE = 1 << 20


def save_tree(directory: pathlib.Path, tree: Any) -> None:
  """Writes a nested dict of arrays, alone, as a plain Orbax checkpoint.

  Raises:
    OSError: if it cannot be written.
  """
  directory.parent.mkdir(parents=True, exist_ok=True)
  size = sum(x.nbytes for x in jax.tree.leaves(tree))
  if shutil.disk_usage(directory.parent).free < size + _SPARE:
    # Orbax would find it in several threads, each with its traceback.
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
  try:
    with ocp.StandardCheckpointer(
      multiprocessing_options=_alone()
    ) as checkpointer:
      checkpointer.save(orbax_path(directory), tree)
  except Exception as error:  # of whatever class
    raise OSError(
      errno.EIO, f"cannot be written ({str(error)[:200]!r})", str(directory)
    ) from error


def restore_tree(directory: pathlib.Path) -> Any:
  """Reads what `save_tree` wrote, alone, as numpy arrays.

  Raises:
    ValueError: if it cannot be read.
  """
  try:
    folder = orbax_path(directory)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(
      handler, multiprocessing_options=_alone()
    ) as checkpointer:
      metadata = checkpointer.metadata(folder).item_metadata
      arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
      )
      return checkpointer.restore(folder, restore_args=arguments)
  except Exception as error:
    raise ValueError(
      f"{directory}: expected an Orbax checkpoint, got one that cannot be"
      f" read ({type(error).__name__}: {error}). It may have been cut short"
      " while it was written or copied: export or copy it again"
    ) from error


@contextlib.contextmanager
def drafted(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path to write to; what is there at the end takes the place of `path`.

  A reader sees the old file or folder, or the new one whole. A folder takes
  the place of none, or of an empty one.

  Raises:
    OSError: if it cannot be written, naming `path`. It is unchanged then, and
      nothing else is left.
  """
  written = draft(path)
  try:
    yield written
    written.replace(path)
  except OSError as error:  # names no file, or the draft
    raise OSError(
      error.errno or errno.EIO, error.strerror or str(error), str(path)
    ) from error
  finally:
    _remove(written)


def write_whole(path: pathlib.Path, content: bytes | str) -> None:
  """Write a file: see `drafted`.

  Args:
    path: of the file; its folder exists.
    content: text is written as UTF-8.

  Raises:
    OSError: see `drafted`.
  """
  data = content.encode() if isinstance(content, str) else content
  with drafted(path) as written, written.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def draft(path: pathlib.Path) -> pathlib.Path:
  """A hidden path beside `path`, of this process alone, to write it whole.

  Drafts of `path` that a killed process has left are removed.
  """
  host = socket.gethostname()
  for left in path.parent.glob(f".{glob.escape(path.name)}.*.draft"):
    theirs, _, pid = left.name.removesuffix(".draft").rpartition("-")
    alive = pid.isdigit() and pathlib.Path("/proc", pid).exists()
    here = theirs == f".{path.name}.{host}"
    if (here and not alive) or time.time() - left.stat().st_mtime > _ABANDONED:
      _remove(left)
  # Containers on two machines may have the same process id.
  return path.with_name(f".{path.name}.{host}-{os.getpid()}.draft")


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()


# Seconds after which another machine is taken to have given a draft up.
_ABANDONED = 24 * 3600


def to_json(content: Any, indent: int | None = None) -> str:
  """JSON of a tree; numbers that are not finite become null."""
  text = json.dumps(content)
  # NaN and Infinity are not JSON.
  plain = json.loads(text, parse_constant=lambda _: None)
  return json.dumps(plain, indent=indent) + "\n"


def write_json(path: pathlib.Path, content: Any) -> None:
  """Write a tree as JSON; see `write_whole` and `to_json`."""
  write_whole(path, to_json(content, indent=2))


# More than any file of a run, and less than fills a computer's memory.
_MAX_JSON = 16 << 20
_MAX_METRICS = 256 << 20
_MAX_DEPTH = 64


class Score(float):
  """A number in JSON, or null, which is read as NaN."""


def read_json(
  path: pathlib.Path, schema: Any = Any, remedy: str = ""
) -> T | None:
  """Read a JSON file; None if there is no file.

  Args:
    path: of the file.
    schema: what it holds, a type for `msgspec.convert`. Fields that a
      `TypedDict` does not have are left out.
    remedy: what to do about a wrong file, the end of the error.

  Raises:
    ValueError: if it is not JSON of this schema.
    OSError: if it cannot be read.
  """
  if not path.exists():
    return None
  content = parse_json(_read(path, _MAX_JSON, remedy), path, remedy)
  return convert(content, schema, path, remedy)


def _read(path: pathlib.Path, limit: int, remedy: str) -> bytes:
  """The bytes of a file, or of a file compressed by gzip (.gz)."""
  if not path.is_file():
    raise ValueError(f"{path}: expected a file, got something else. {remedy}")
  opened = gzip.open if path.suffix == ".gz" else open
  try:
    with opened(path, "rb") as file:
      raw = file.read(limit + 1)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(
      f"{path}: expected a gzip file, got one that is damaged or cut short"
      f" ({error}). {remedy or _RESTORE}"
    ) from error
  if len(raw) > limit:
    raise ValueError(
      f"{path}: expected at most {limit:,} bytes of JSON, got more."
      f" {remedy or _RESTORE}"
    )
  return raw


_RESTORE = "Restore it, or give another --workdir"


def parse_json(raw: bytes | str, where: object, remedy: str = "") -> Any:
  """Parse JSON strictly: UTF-8, no name twice, no endless nesting.

  NaN, Infinity and numbers beyond float64 are read as null.

  Args:
    raw: the text.
    where: names the file in errors.
    remedy: the end of the error.

  Raises:
    ValueError: if it is something else.
  """
  try:
    text = raw.decode() if isinstance(raw, bytes) else raw
    content = json.loads(
      text,
      object_pairs_hook=_unique,
      parse_constant=lambda _: None,
      parse_float=_parse_float,
    )
    level, depth = [content], 0
    while level := [child for node in level for child in _children(node)]:
      depth += 1
      if depth > _MAX_DEPTH:
        raise RecursionError
    if "\\u" in text:  # half of a pair of surrogates is no character
      json.dumps(content, ensure_ascii=False).encode()
  except RecursionError:
    problem = f"more than {_MAX_DEPTH} levels of brackets"
  except UnicodeError:
    problem = "a file that is not UTF-8"
  except json.JSONDecodeError as error:
    problem = f"a file that ends or breaks at character {error.pos}"
  except ValueError as error:  # of `_unique`, or an endless integer
    problem = str(error)
  else:
    return content
  raise ValueError(
    f"{where}: expected JSON, got {problem}. {remedy or _RESTORE}"
  )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  tree = dict(pairs)
  if len(tree) != len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"two fields {twice[:40]!r}")
  return tree


def _parse_float(text: str) -> float | None:
  value = float(text)
  return value if math.isfinite(value) else None


def _children(node: Any) -> Iterable[Any]:
  if isinstance(node, dict):
    return node.values()
  return node if isinstance(node, list) else ()


def convert(
  content: Any, schema: type[T], where: object, remedy: str = ""
) -> T:
  """Check parsed JSON against a schema.

  Args:
    content: of `parse_json`.
    schema: see `read_json`.
    where: names the file in errors.
    remedy: the end of the error.

  Raises:
    ValueError: naming the place in the file, what was expected and what came.
  """
  try:
    return msgspec.convert(content, schema, dec_hook=_score)
  except (msgspec.ValidationError, OverflowError) as error:
    what, _, place = str(error).partition(" - at `")
    place = place.removesuffix("`").removeprefix("$").removeprefix(".")
    raise ValueError(
      f"{where}{', at ' if place else ''}{place}: {what[:1].lower()}{what[1:]}."
      f" {remedy or _RESTORE}"
    ) from error


def _score(kind: type, value: Any) -> Any:
  if kind is not Score:
    raise TypeError(kind)
  if value is None:
    return Score("nan")
  if isinstance(value, int | float) and not isinstance(value, bool):
    return Score(value)
  raise ValueError(f"Expected `float` or `null`, got `{type(value).__name__}`")


class _Record(TypedDict):
  step: int
  kind: str


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Read a `metrics.jsonl`; a last line cut short by a crash is left out.

  Args:
    path: of the file, or of one compressed by gzip, whose name ends in .gz.

  Returns:
    A record of each line; null is read as NaN.

  Raises:
    ValueError: if it is something else, naming the line.
  """
  records = []
  lines = _read(path, _MAX_METRICS, _RESTORE).splitlines(keepends=True)
  for number, line in enumerate(lines, 1):
    where = f"{path}, line {number}"
    try:
      record = parse_json(line, where)
    except ValueError:
      if number < len(lines) or line.endswith(b"\n"):
        raise
      _log.warning("%s: left out a line that was cut short", path)
      continue
    convert(record, _Record, where)
    values = convert(record, dict[str, int | float | str | None], where)
    records.append({k: math.nan if v is None else v for k, v in values.items()})
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
