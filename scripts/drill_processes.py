"""Processes of `drills.py`: started, watched, and compared.

Each trains CRD with small networks on the CPU. CRD has all that a restart can
lose: BatchNorm, banks, normalisers, random negatives.
"""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np

from kd_jax import storage

OPTIONS = (
  "--config.student.name=_tiny",
  "--config.teacher.name=_tiny_wide",
  "--config.teacher.epochs=1",
  "--config.distiller.k=32",
  "--config.distiller.feat_dim=8",
  "--config.data.image_size=8",
  "--config.epochs=30",
  "--config.eval.every_epochs=10",
  "--config.checkpoint.every_steps=16",
  "--config.log.every_steps=4",
  # At the recipe's 0.05 rounding is amplified: with nothing interrupted, other
  # numbers of devices come out 0.3 apart in the worst momentum. At this, 5e-6.
  "--config.optim.learning_rate=0.01",
  "--config.parallel.heartbeat_seconds=10",
)
TIMEOUT = 600.0
SEEN_WITHIN = 60.0
# How a process says that another one has ended, in our words and in JAX's.
LOST = "the end of another process|another task died|stopped sending heartbeats"
RESUMED = "resuming from step"
UNUSABLE = r"checkpoint of step \d+ in .* cannot be used"


def _copy(pipe: IO[bytes], log: IO[bytes]) -> None:
  with pipe, log:
    shutil.copyfileobj(pipe, log)


class Processes:
  """The processes of one run, and their output."""

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    count: int = 2,
    options: Sequence[str] = (),
    *,
    devices: int = 1,
    program: str = "launch.py",
    reader: str = "",
    config: str = "configs/crd_cifar.py:smoke",
  ):
    """Starts the processes.

    Args:
      folder: for runs that share a teacher and compiled programs.
      name: of the run's workdir.
      count: number of processes; 1 is a plain run.
      options: added to the command.
      devices: number of devices of each process.
      program: path in the repository.
      reader: a command that the output is piped into.
      config: a config file.
    """
    self.workdir = folder / name
    pipe = f'"$@" 2>&1 | {reader}'
    command = [
      *(("bash", "-o", "pipefail", "-c", pipe, "-") if reader else ()),
      *(sys.executable, program, f"--config={config}"),
      f"--config.parallel.compilation_cache={folder / 'cache'}",
      *(*OPTIONS, f"--workdir={self.workdir}", *options),
    ]
    port = free_port()
    self.logs = [folder / f"{name}.{i}.log" for i in range(count)]
    self.children: list[subprocess.Popen] = []
    self.pumps: list[threading.Thread] = []
    for index, log in enumerate(self.logs):
      mine = []
      if count > 1:
        mine = [
          f"--coordinator_address=127.0.0.1:{port}",
          f"--num_processes={count}",
          f"--process_id={index}",
        ]
      child = subprocess.Popen(
        [*command, *mine],
        cwd=REPO,
        env=environment(devices),
        # A pipe: a limit on the size of its files must not cut its log.
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
      )
      file = log.open("wb", buffering=0)
      pump = threading.Thread(target=_copy, args=(child.stdout, file))
      pump.start()
      self.pumps.append(pump)
      self.children.append(child)

  def wait_for_steps(self, steps: int) -> None:
    """Waits until the run has logged so many steps; it must not have ended."""
    path = self.workdir / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
      for child in self.children:
        expect(child.poll() is None, f"it ended too early:\n{self.said()}")
      if path.exists():
        lines = path.read_text().splitlines()[:-1]
        if lines and json.loads(lines[-1])["step"] >= steps:
          return
      time.sleep(0.02)
    raise AssertionError(f"has not come to step {steps}:\n{self.said()}")

  def wait_for_words(self, words: str) -> None:
    """Until some process has said that."""
    deadline = time.monotonic() + TIMEOUT
    while not re.search(words, self.said()):
      expect(time.monotonic() < deadline, f"no {words!r}:\n{self.said()}")
      time.sleep(0.05)

  def codes(self, within: float = TIMEOUT) -> list[int]:
    """Waits for the exit codes, for so many seconds at most."""
    deadline = time.monotonic() + within
    try:
      for child in self.children:
        child.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired as error:
      raise AssertionError(
        f"processes still there after {within:.0f} s:\n{self.said()}"
      ) from error
    finally:
      self.end()
    return [child.returncode for child in self.children]

  def end(self) -> None:
    """Kills what is left."""
    for child in self.children:
      if child.poll() is None:
        child.kill()
        child.wait()
    for pump in self.pumps:
      pump.join()

  def said(self, index: int | None = None) -> str:
    """Returns the output of all processes, or of one."""
    logs = self.logs if index is None else [self.logs[index]]
    return "\n".join(log.read_text(errors="replace") for log in logs)

  def finish(self) -> str:
    """Waits for a good end; returns the output."""
    codes = self.codes()
    expect(not any(codes), f"exit codes {codes}:\n{self.said()}")
    return self.said()


def train_in(
  folder: pathlib.Path, count: int, devices: int, jobs: Sequence[Sequence]
) -> str:
  """Runs jobs of `drill_worker.py` in processes; returns their output."""
  port = free_port()
  children = [
    subprocess.Popen(
      [
        *(sys.executable, "scripts/drill_worker.py", f"127.0.0.1:{port}"),
        *(str(count), str(index), str(folder), json.dumps(jobs)),
      ],
      cwd=REPO,
      env=environment(devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]
  try:
    said = [child.communicate(timeout=TIMEOUT)[0] for child in children]
  finally:
    for child in children:
      child.kill()
      child.wait()
  codes = [child.returncode for child in children]
  expect(not any(codes), f"exit codes {codes}:\n" + "\n".join(said))
  return "\n".join(said)


def free_port() -> int:
  """Returns a port on which nobody listens."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
  """Returns the variables of a process on the CPU that compiles fast."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }


def expect(condition: bool, text: str) -> None:
  """Fails with a text unless the condition holds."""
  if not condition:
    raise AssertionError(text)


def line_with(words: str, text: str) -> str:
  """Returns the first line that matches a pattern, shortened."""
  for line in text.splitlines():
    if re.search(words, line):
      return line[:500]
  raise AssertionError(f"nobody said {words!r}:\n{text}")


def steps_saved(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of a run's checkpoints."""
  names = [p.name for p in (workdir / "checkpoints").iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def final_arrays(workdir: pathlib.Path) -> tuple[int, dict[str, np.ndarray]]:
  """Returns step and arrays of the newest checkpoint, by path."""
  step = steps_saved(workdir)[-1]
  tree = storage.restore_tree(workdir / "checkpoints" / str(step) / "state")
  return step, dict(leaves(tree))


def leaves(tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
  """Yields (path, array) of nested dicts."""
  if not isinstance(tree, dict):
    yield prefix, tree
    return
  for key, value in tree.items():
    yield from leaves(value, f"{prefix}/{key}")


def worst_difference(
  workdir: pathlib.Path, other: pathlib.Path, part: str = ""
) -> tuple[float, str]:
  """Returns the largest difference between the last checkpoints of two runs.

  Ignores rows of zeros that pad an array to a multiple of the devices.

  Args:
    workdir: of one run.
    other: of the other.
    part: prefix of the paths of the arrays to compare.

  Returns:
    The difference, relative to the array's largest value, and its path.
  """
  (step, ours), (other_step, theirs) = map(final_arrays, (workdir, other))
  expect(step == other_step, f"ended at steps {step} and {other_step}")
  expect(ours.keys() == theirs.keys(), "they hold other arrays")
  worst = (0.0, "")
  for path, a in ours.items():
    if not path.startswith(part):
      continue
    a, b = np.atleast_1d(a), np.atleast_1d(theirs[path])
    rows = min(len(a), len(b))
    expect(not a[rows:].any() and not b[rows:].any(), f"{path}: other rows")
    difference = np.abs(a[:rows].astype(np.float64) - b[:rows]).max(initial=0)
    scale = np.abs(b).max(initial=0) or 1.0
    worst = max(worst, (float(difference / scale), path))
  return worst


def expect_same_end(workdir: pathlib.Path, other: pathlib.Path) -> str:
  """Checks that two runs ended alike bit for bit, all files included."""
  worst = worst_difference(workdir, other)
  expect(worst[0] == 0, f"other arrays than the straight run: {worst}")
  records, results, exports = (
    [read(folder) for folder in (workdir, other)]
    for read in (_metrics, _scores, _export)
  )
  expect(records[0] == records[1], "other metrics than the straight run")
  expect(results[0] == results[1], f"another result: {results}")
  expect(exports[0] == exports[1], "another export than the straight run's")
  return "ended bit for bit as the run that nothing interrupted"


def _metrics(workdir: pathlib.Path) -> list[dict]:
  return [
    {k: v for k, v in record.items() if k != "images_per_second"}
    for record in storage.read_metrics(workdir / "metrics.jsonl")
  ]


def _scores(workdir: pathlib.Path) -> dict:
  result = json.loads((workdir / "result.json").read_text())
  return {epoch: result[epoch] for epoch in ("best", "final")}


def _export(workdir: pathlib.Path) -> dict[str, bytes]:
  tree = storage.restore_tree(workdir / "export" / "checkpoint")
  return {path: array.tobytes() for path, array in leaves(tree)}
