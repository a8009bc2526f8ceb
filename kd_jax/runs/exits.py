"""How launch.py ends: exit codes, and errors in words."""

import contextlib
import itertools
import pathlib
import re
import runpy
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from kd_jax import registry

FAILED, BAD_INPUT = 1, 2
STOPPED = 75  # EX_TEMPFAIL: a scheduler may requeue


@contextlib.contextmanager
def explained_flags(argv: list[str], repo: pathlib.Path) -> Iterator[None]:
  """Turns a mistake in the flags into one line and exit code 2.

  Args:
    argv: the command line.
    repo: folder that holds configs/.
  """
  try:
    yield
    return
  except OSError as error:
    text = _no_such_config(argv, repo) or str(error)
  except (AttributeError, KeyError) as error:
    text = _no_such_field(error, argv)
  except (flags.Error, TypeError, ValueError) as error:
    lines = str(error).strip().splitlines()
    # An error in a config file comes with its whole traceback.
    traced = any("Traceback" in line for line in lines)
    text = lines[-1] if traced else " ".join(lines)
  print(f"launch.py: {text}", file=sys.stderr)
  sys.exit(BAD_INPUT)


def _no_such_config(argv: list[str], repo: pathlib.Path) -> str:
  wanted = _named_config(argv)
  path = wanted.partition(":")[0]
  if pathlib.Path(path).is_file():
    return ""
  names = sorted(f"configs/{file.name}" for file in repo.glob("configs/*.py"))
  return (
    f"--config {wanted}: no such file.{registry.did_you_mean(path, names)} The"
    f" configs are: {', '.join(names)}"
  )


def _named_config(argv: list[str]) -> str:
  """The value of --config."""
  words = [word for arg in argv for word in arg.split("=", 1)]
  pairs = itertools.pairwise(words)
  return next((b for a, b in pairs if a.strip("-") == "config"), "")


def _no_such_field(error: BaseException, argv: list[str]) -> str:
  """Names the first flag of a field that the config file does not make."""
  with contextlib.suppress(Exception):  # of a file that is wrong itself
    path, *argument = _named_config(argv).split(":", 1)
    config = runpy.run_path(path)["get_config"](*argument)
    for arg in argv:
      flag = re.match(r"--?(?:no)?config\.([\w.]+)", arg)
      if flag and (problem := _missing(config, flag[1].split("."))):
        return f"{arg}: no such field. {problem}"
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  return f"{type(error).__name__}: {str(error.args[0]).splitlines()[0]}"


def _missing(section: Any, names: Sequence[str]) -> str:
  """Says which name of a field's path there is none of; "" if it is there."""
  place = "config"
  for name in names:
    if not isinstance(section, Mapping | ConfigDict):
      return f"{place} has no fields, it is {section!r}"
    if name not in section:
      hint = registry.did_you_mean(name, section).lstrip()
      if "name" in section and place.endswith(".distiller"):
        from kd_jax import distillers

        if name in distillers.fields_of(section["name"]):
          hint = f"It is one of {section['name']}: set it in the config file."
      return f"{hint} {place} has {', '.join(section) or 'none'}".lstrip()
    section, place = section[name], f"{place}.{name}"
  return ""


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
  """Turns an error that ends a run into words and an exit code.

  An error that the user cannot have caused keeps its traceback.
  """
  try:
    yield
  except Exception as error:
    code = _explain(error)
    if code is None:
      raise
    sys.exit(code)


def _explain(error: Exception) -> int | None:
  """Prints what has ended the run; None for a fault of a single process."""
  import jax

  from kd_jax.distributed import processes
  from kd_jax.runs import errors

  several = jax.distributed.is_initialized() and jax.process_count() > 1
  lost = several and processes.is_lost(error)
  code = FAILED
  if isinstance(error, errors.PreemptedError):
    code = STOPPED
  elif isinstance(error, (ValueError, ImportError)) and not lost:
    code = BAD_INPUT
  text = f"{type(error).__name__}: {error}"
  if isinstance(error, (errors.PreemptedError, processes.RefusedError)):
    text = str(error)
  # Raised on all processes, which then end in an orderly way.
  agreed = isinstance(error, (*errors.AGREED, processes.RefusedError))
  # A disk that is full, read-only or gone; it names the file.
  of_file = isinstance(error, OSError) and error.filename is not None
  fault = code == FAILED and not (
    agreed or lost or of_file or isinstance(error, errors.UnsavedError)
  )
  if not several:
    if fault:
      return None
    print(text, file=sys.stderr)
  elif agreed:
    if processes.is_first():
      print(text, file=sys.stderr)
  else:
    if lost:
      text = (
        f"{text.strip()}\nThis is how the end of another process, or of the"
        " network, shows here: look for what another process has said before"
      )
    me = f"process {jax.process_index()} of {jax.process_count()}"
    try:
      if fault:
        traceback.print_exception(error)
      print(f"{me} ({socket.gethostname()}): {text}", file=sys.stderr)
    finally:  # even if the log is on a full disk
      processes.end(code)
  return code
