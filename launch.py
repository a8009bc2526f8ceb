"""Trains, distils, evaluates and exports: what one config file says.

    python launch.py --config configs/simkd_cifar.py
    python launch.py --config configs/simkd_cifar.py:smoke
    python launch.py --config configs/kd_cifar.py --config.seed=1 --workdir DIR
    python launch.py --config configs/kd_cifar.py --local_processes 2
    srun python launch.py --config configs/kd_cifar.py

Started again with the same command, a run goes on where it stopped.
Exit codes: 0 finished, 1 failed, 2 bad input, 75 stopped by a signal with
nothing lost (start it again).
"""

import difflib
import importlib.metadata
import itertools
import os
import pathlib
import re
import socket
import sys
import traceback
from collections.abc import Iterable
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

REPO = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(REPO))

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: a scheduler may requeue

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A file of configs/, with `:smoke` after it for a run of seconds.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run (default: runs/NAME OF THE CONFIG)."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0. Under srun, mpirun and in an indexed Kubernetes job"
  " this and the next two are found out.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes share the run."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0."
)
_LOCAL_PROCESSES = flags.DEFINE_integer(
  "local_processes", None, "Start so many processes on this machine."
)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; says what is wrong with them in a line, and exits."""
  try:
    rest = flags.FLAGS(argv)[1:]
    if rest:
      raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    if _CONFIG.value is None:
      raise ValueError("name a config, as in --config configs/quickstart.py")
    _ = _CONFIG.value.grid  # a file that cannot be read is an error only now
    from kd_jax.distributed import launcher

    launcher.check_flags(
      coordinator_address=_COORDINATOR_ADDRESS.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
      local_processes=_LOCAL_PROCESSES.value,
    )
  except OSError as error:
    _refuse(_no_such_config(argv) or str(error))
  except (AttributeError, KeyError) as error:
    _refuse(_no_such_field(error, argv))
  except (flags.Error, TypeError, ValueError) as error:
    lines = str(error).strip().splitlines()
    # What a config file raises comes with its whole traceback.
    traced = any("Traceback" in line for line in lines)
    _refuse(lines[-1] if traced else " ".join(lines))
  return argv[:1]


def _refuse(text: str) -> NoReturn:
  print(f"launch.py: {text}", file=sys.stderr)
  sys.exit(EXIT_BAD_INPUT)


def _no_such_config(argv: list[str]) -> str:
  words = [word for arg in argv for word in arg.split("=", 1)]
  pairs = itertools.pairwise(words)
  wanted = next((b for a, b in pairs if a.strip("-") == "config"), "")
  path = wanted.partition(":")[0]
  if pathlib.Path(path).is_file():
    return ""
  names = sorted(f"configs/{file.name}" for file in REPO.glob("configs/*.py"))
  near = difflib.get_close_matches(path, names, n=3)
  hint = f"Did you mean {' or '.join(near)}? " if near else ""
  return (
    f"--config {wanted}: no such file. {hint}The configs are:"
    f" {', '.join(names)}"
  )


def _no_such_field(error: BaseException, argv: list[str]) -> str:
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  first, *hint = str(error.args[0]).splitlines()
  field = re.findall(r"[\w.]+", first)[-1]
  named = [
    arg for arg in argv if f".{field}." in arg.partition("=")[0] + "."
  ] or [field]
  hint = hint or ["Fields are those of configs/base.py and of the config file"]
  return f"{' '.join(named)}: no such field. {' '.join(hint)}"


def main(argv: list[str]) -> None:
  """Runs the config, in as many processes as there are to be."""
  del argv
  from kd_jax.distributed import signals

  # While a run trains, it watches the signals itself, to save first.
  with signals.ended_by_signals(EXIT_STOPPED):
    _start_processes()
    try:
      _run()
    except Exception as error:
      _fail(error)


def _start_processes() -> None:
  """Joins the other processes; or starts them, and exits as they do."""
  from kd_jax.distributed import launcher, processes

  try:
    if _LOCAL_PROCESSES.value is not None:
      flag = "local_processes"
      command = [sys.executable, *_without(flag, [__file__, *sys.argv[1:]])]
      sys.exit(launcher.start_local(_LOCAL_PROCESSES.value, command))
    processes.initialize(
      coordinator_address=_COORDINATOR_ADDRESS.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
      heartbeat_seconds=_CONFIG.value.parallel.heartbeat_seconds,
    )
  except ValueError as error:
    _refuse(str(error))


def _without(flag: str, argv: list[str]) -> list[str]:
  """The arguments without a flag and its value."""
  kept, skip = [], False
  for arg in argv:
    name, equals, _ = arg.lstrip("-").partition("=")
    if skip:
      skip = False
    elif arg.startswith("-") and name == flag:
      skip = not equals
    else:
      kept.append(arg)
  return kept


def _run() -> None:
  from kd_jax.runs import grid, logs, train

  _split_cpu(grid.cells(_CONFIG.value).values())
  logs.configure_logging()
  path, _, arg = flags.FLAGS["config"].config_filename.partition(":")
  name = "_".join(filter(None, [pathlib.Path(path).stem, arg]))
  workdir = _WORKDIR.value or str(pathlib.Path("runs") / name)
  if not grid.is_grid(_CONFIG.value):
    train.train_and_evaluate(_CONFIG.value, workdir)
    return
  folder = pathlib.Path(workdir).absolute()
  try:
    grid.run_grid(_CONFIG.value, workdir)
  except grid.CellsFailedError:
    _report(folder)
    raise
  _report(folder)


def _report(folder: pathlib.Path) -> None:
  """Writes and prints the report of the runs that have finished."""
  from kd_jax.distributed import processes
  from kd_jax.reporting import report, runs

  if processes.is_first() and runs.find_runs(folder):
    text, paths = report.write_report(folder)
    print(f"\n{text}", *paths, sep="\n", flush=True)


def _split_cpu(cells: Iterable[ConfigDict]) -> None:
  """Gives every core its share of the batch, where that changes no result."""
  import jax

  from kd_jax.distributed import devices

  cells = list(cells)
  alone = not jax.distributed.is_initialized()
  if alone and all(cell.sync_batch_stats for cell in cells):
    devices.split_cpu(
      *(cell.batch_size // max(cell.accumulate_steps, 1) for cell in cells)
    )


def _fail(error: Exception) -> NoReturn:
  """Says what has ended the run, and exits; a fault keeps its traceback."""
  import jax

  from kd_jax.distributed import processes
  from kd_jax.runs import errors, grid

  agreed = (*errors.AGREED, grid.CellsFailedError)
  told = (*agreed, errors.UnsavedError)
  several = jax.process_count() > 1
  # How XLA's and gloo's errors begin, of whatever class they are.
  lost = several and re.match(r"[A-Z_]{5,}: ", str(error)) is not None
  code = EXIT_FAILED
  if isinstance(error, errors.PreemptedError):
    code = EXIT_STOPPED
  elif isinstance(error, (ValueError, ImportError)) and not lost:
    code = EXIT_BAD_INPUT
  kind = f"{type(error).__name__}: "
  stopped = isinstance(error, (errors.PreemptedError, processes.RefusedError))
  text = f"{'' if stopped else kind}{error}"
  if not several:
    if code == EXIT_FAILED and not isinstance(error, told):
      raise error
    print(text, file=sys.stderr)
  elif stopped or isinstance(error, agreed):
    # Raised in all processes, which can take leave of each other.
    if processes.is_first():
      print(text, file=sys.stderr)
  else:
    plain = isinstance(error, (*told, OSError)) or lost
    if code == EXIT_FAILED and not plain:
      traceback.print_exception(error)
    if lost:
      text = (
        f"{text.strip()}\nThis is how the end of another process, or of the"
        " network, is seen here: look for what another has said before"
      )
    me = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{me} ({socket.gethostname()}): {text}", file=sys.stderr)
    processes.end(code)
  sys.exit(code)


def order_cpu_operations() -> None:
  """Has XLA run a CPU's operations one after the other: see docs/speed.md."""
  flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
  flags = os.environ.get("XLA_FLAGS", "")
  on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
  # XLA does not start with a flag that its version lacks.
  jaxlib = importlib.metadata.version("jaxlib")
  known = jaxlib.startswith(("0.10.", "0.11.", "0.12."))
  gpu = pathlib.Path("/dev/nvidiactl").exists()
  if known and flag not in flags and (on_cpu or not gpu):
    os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


if __name__ == "__main__":
  order_cpu_operations()
  app.run(main, flags_parser=parse)
