"""A process that does several small runs one after another, for `drills.py`.

    python scripts/drill_worker.py ADDRESS COUNT INDEX FOLDER JOBS

JOBS is JSON: [[method, name of the run, step at which the last process gets
SIGTERM or 0, {config field: value}], ...].
"""

import importlib
import json
import os
import pathlib
import signal
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import jax

from kd_jax.distributed import processes
from kd_jax.runs import errors, logs, loop, train

TINY = {
  "student.name": "_tiny",
  "data.image_size": 8,
  "data.num_examples": 32,
  "data.crop_padding": 1,
  "batch_size": 8,
  "epochs": 2,
  "eval.every_epochs": 2,
  "optim.learning_rate": 0.02,
  "log.every_steps": 2,
}


def make_config(method: str, changes: dict[str, object]):
  """Returns a method's config with tiny networks and images."""
  config = importlib.import_module(f"configs.{method}_cifar").get_config(
    "smoke"
  )
  config.teacher.name, config.teacher.epochs = "_tiny_wide", 1
  if method == "crd":
    config.distiller.k, config.distiller.feat_dim = 16, 8
  config.update_from_flattened_dict({**TINY, **changes})
  return config.lock()


def main(address: str, count: str, index: str, folder: str, jobs: str) -> None:
  """Joins the others and trains."""
  if int(count) > 1:
    processes.initialize(
      coordinator_address=address,
      num_processes=int(count),
      process_id=int(index),
      heartbeat_seconds=10,
    )
  logs.configure_logging()
  cache = pathlib.Path(folder) / "cache"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  dispatch, stop_at = loop.Loop.dispatch, 0

  def signalled(self):
    if self.step == stop_at and int(index) == int(count) - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    dispatch(self)

  loop.Loop.dispatch = signalled
  for method, name, step, changes in json.loads(jobs):
    stop_at = step or -1
    try:
      train.train_and_evaluate(make_config(method, changes), f"{folder}/{name}")
    except errors.PreemptedError as stopped:
      print(stopped, flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
