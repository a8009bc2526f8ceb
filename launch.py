"""Trains what a config file describes, resuming if a checkpoint exists.

    python launch.py --config configs/simkd_cifar.py
    python launch.py --config configs/simkd_cifar.py:smoke
    python launch.py --config configs/kd_cifar.py --config.seed=1 --workdir DIR
    python launch.py --config configs/kd_cifar.py --local_processes 2
    python launch.py --config configs/quickstart.py --shard 0/4
    srun python launch.py --config configs/kd_cifar.py

Run the same command again to resume. Exit codes: 0 finished, 1 failed, 2 bad
input, 75 stopped by a signal with everything saved (start it again).
"""

import os
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

REPO = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(REPO))

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A file of configs/, with `:smoke` after it for a run of seconds, or a preset"
  " (`:mdistiller`, `:mdistiller,smoke`).",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run (default: runs/NAME OF THE CONFIG)."
)
_SHARD = flags.DEFINE_string(
  "shard",
  None,
  "I/N: of a config with several runs, do runs I, I + N, ... only. The tasks of"
  " a SLURM array divide them by themselves.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0. Under srun, mpirun and in an indexed Kubernetes job"
  " JAX finds this and the next two itself.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes that share the run."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Index of this process, from 0."
)
_LOCAL_PROCESSES = flags.DEFINE_integer(
  "local_processes", None, "Start so many processes on this machine."
)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; on a mistake, prints one line and exits with 2."""
  from kd_jax.distributed import launcher
  from kd_jax.runs import exits

  with exits.explained_flags(argv, REPO):
    rest = flags.FLAGS(argv)[1:]
    if rest:
      raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    if _CONFIG.value is None:
      raise ValueError("name a config, as in --config configs/quickstart.py")
    _ = _CONFIG.value.grid  # only now is the file read
    launcher.parse_shard(_SHARD.value, os.environ)
    launcher.check_flags(
      coordinator_address=_COORDINATOR_ADDRESS.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
      local_processes=_LOCAL_PROCESSES.value,
    )
  return argv[:1]


def main(argv: list[str]) -> None:
  """Runs the config, in one process or several."""
  del argv
  from kd_jax.distributed import signals
  from kd_jax.runs import exits

  # While a run trains, its loop watches the signals instead, to save first.
  with signals.ended_by_signals(exits.STOPPED), exits.explained_errors():
    _start_processes()
    _run()


def _start_processes() -> None:
  """Joins the other processes; or starts them, and exits as they do."""
  from kd_jax.distributed import launcher, processes

  if _LOCAL_PROCESSES.value is not None:
    command = [sys.executable, __file__, *sys.argv[1:]]
    sys.exit(launcher.start_local(_LOCAL_PROCESSES.value, command))
  processes.initialize(
    coordinator_address=_COORDINATOR_ADDRESS.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    heartbeat_seconds=_CONFIG.value.parallel.heartbeat_seconds,
  )


def _run() -> None:
  """Trains one run, or the runs of a grid that are this shard's."""
  from kd_jax.distributed import devices, launcher
  from kd_jax.runs import grid, logs, train

  config = _CONFIG.value
  cells = grid.cells(config).values()
  if all(cell.sync_batch_stats for cell in cells):  # else the result depends
    devices.split_cpu(
      *(cell.batch_size // max(cell.accumulate_steps, 1) for cell in cells)
    )
  devices.require_backend()
  logs.configure_logging()
  file = config_flags.get_config_filename(flags.FLAGS["config"])
  path, _, arg = file.partition(":")
  words = [pathlib.Path(path).stem, *arg.split(",")]
  name = "_".join(filter(None, words))
  workdir = _WORKDIR.value or str(pathlib.Path("runs") / name)
  if grid.is_grid(config):
    shard = launcher.parse_shard(_SHARD.value, os.environ)
    _run_grid(workdir, shard)
  elif _SHARD.value is not None:
    raise ValueError("--shard: expected a config with several runs, got one")
  else:
    train.train_and_evaluate(config, workdir)


def _run_grid(workdir: str, shard: tuple[int, int]) -> None:
  """Trains a shard of a grid; writes and prints the report of all runs."""
  from kd_jax import reporting, storage
  from kd_jax.distributed import processes
  from kd_jax.runs import errors, grid, logs

  failed = missing = None
  try:
    reporting.require_packages()
  except ImportError as error:
    missing = f"{error}, then python -m kd_jax report {workdir}"
    logs.say(f"The grid will end without a report: {missing}")
  if shard[1] > 1:
    logs.say(f"shard {shard[0]}/{shard[1]} of the grid")
  try:
    grid.run_grid(_CONFIG.value, workdir, shard=shard)
  except errors.CellsFailedError as error:
    failed = error
  if processes.is_first() and missing is None:
    from kd_jax.reporting import report, runs

    folder = storage.local_path(workdir, "--workdir")
    if runs.find_runs(folder):
      text, paths = report.write_report(folder)
      print(f"\n{text}", *paths, sep="\n", flush=True)
  if failed is not None:
    raise failed


if __name__ == "__main__":
  from kd_jax.distributed import launcher

  launcher.keep_output()
  launcher.set_xla_flags()
  app.run(main, flags_parser=parse)
