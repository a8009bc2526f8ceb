"""Drills: real processes on this machine, and every fault of a cluster.

    python scripts/drills.py            all, about 20 minutes on two cores
    python scripts/drills.py killed full_disk

Each drill trains CRD with small networks on the CPU, breaks something, shows
what the user then sees, and checks it. CRD has all that a restart can lose:
BatchNorm, banks, normalisers, random negatives. The exit code is 1 if a drill
fails.
"""

import argparse
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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
TOTAL = 120
TIMEOUT = 240.0
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
  ):
    """Starts the processes.

    Args:
      folder: for runs that share a teacher and compiled programs.
      name: of the run's workdir.
      count: number of processes; 1 is a plain run.
      options: added to the command.
      devices: number of devices of each process.
      program: path in the repository.
    """
    self.workdir = folder / name
    command = [
      *(sys.executable, program, "--config=configs/crd_cifar.py:smoke"),
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
  """Checks that two runs ended alike bit for bit, metrics included."""
  worst = worst_difference(workdir, other)
  expect(worst[0] == 0, f"other arrays than the straight run: {worst}")
  records = [
    [
      {k: v for k, v in record.items() if k != "images_per_second"}
      for record in storage.read_metrics(w / "metrics.jsonl")
    ]
    for w in (workdir, other)
  ]
  expect(records[0] == records[1], "other metrics than the straight run")
  return "ended bit for bit as the run that nothing interrupted"


def straight(
  folder: pathlib.Path, count: int = 2, options: Sequence[str] = ()
) -> pathlib.Path:
  """Returns the workdir of a run that nothing interrupts, made once."""
  name = "-".join(["straight", str(count), *(o.split("=")[1] for o in options)])
  if not (folder / name / "result.json").exists():
    Processes(folder, name, count, options).finish()
  return folder / name


def _again(folder, name, expected) -> Iterator[str]:
  said = Processes(folder, name).finish()
  yield line_with(RESUMED, said)
  yield expect_same_end(folder / name, expected)


def lose(folder: pathlib.Path, name: str, index: int) -> Iterator[str]:
  """Kills a process of two: the other stops with a reason."""
  run = Processes(folder, name)
  run.wait_for_steps(40)
  run.children[index].kill()
  before, other = time.monotonic(), 1 - index
  codes = run.codes(SEEN_WITHIN)
  yield f"the other ended after {time.monotonic() - before:.1f} s"
  yield f"with exit code {codes[other]}, and said:"
  expect(codes[index] == -signal.SIGKILL, f"exit codes {codes}")
  expect(codes[other] not in (0, 2, 75), f"exit codes {codes}:\n{run.said()}")
  yield line_with(LOST, run.said(other))


def killed(folder: pathlib.Path) -> Iterator[str]:
  """A process is killed; the restarted run goes on exactly."""
  expected = straight(folder)
  yield from lose(folder, "killed", 1)
  yield from _again(folder, "killed", expected)


def coordinator_gone(folder: pathlib.Path) -> Iterator[str]:
  """Process 0, which coordinates the others, is killed."""
  expected = straight(folder)
  yield from lose(folder, "coordinator", 0)
  yield from _again(folder, "coordinator", expected)


def frozen(folder: pathlib.Path) -> Iterator[str]:
  """A process hangs: the other notices its silence."""
  run = Processes(folder, "frozen")
  run.wait_for_steps(20)
  run.children[1].send_signal(signal.SIGSTOP)
  before = time.monotonic()
  try:
    run.children[0].wait(SEEN_WITHIN)
  except subprocess.TimeoutExpired:
    raise AssertionError(f"it waits forever:\n{run.said(0)}") from None
  finally:
    run.end()
  yield f"the other ended after {time.monotonic() - before:.1f} s, and said:"
  yield line_with(LOST, run.said(0))


def terminated(folder: pathlib.Path) -> Iterator[str]:
  """SIGTERM to one process: all save at one step and exit with 75."""
  expected = straight(folder)
  run = Processes(folder, "terminated")
  run.wait_for_steps(40)
  run.children[1].terminate()
  codes = run.codes(SEEN_WITHIN)
  expect(codes == [75, 75], f"exit codes {codes}:\n{run.said()}")
  yield line_with("stopped by a signal to another process at step", run.said(0))
  step = steps_saved(run.workdir)[-1]
  expect(f"at step {step}, saved" in run.said(0), "saved at another step")
  yield from _again(folder, "terminated", expected)


def cut_newest(workdir: pathlib.Path) -> None:
  """Cuts the largest file of the newest checkpoint in half."""
  newest = workdir / "checkpoints" / str(steps_saved(workdir)[-1])
  files = [p for p in newest.rglob("*") if p.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)


def alone(folder: pathlib.Path, pipeline: str = "device") -> Iterator[str]:
  """One process: killed, then SIGTERM, then its newest checkpoint damaged."""
  options = [f"--config.data.pipeline={pipeline}"]
  arguments = folder, f"alone_{pipeline}", 1, options
  expected = straight(folder, 1, options)
  run = Processes(*arguments)
  run.wait_for_steps(40)
  run.children[0].kill()
  codes = run.codes()
  expect(codes == [-signal.SIGKILL], f"exit codes {codes}:\n{run.said()}")
  run = Processes(*arguments)
  run.wait_for_steps(76)
  run.children[0].terminate()
  codes = run.codes()
  expect(codes == [75], f"exit codes {codes}:\n{run.said()}")
  # Checkpoints are 16 steps apart, and the last may not have been finished.
  resumed = re.search(rf"{RESUMED} (\d+)", run.said())
  expect(resumed is not None and int(resumed[1]) >= 16, run.said())
  yield line_with(r"stopped by SIGTERM at step \d+", run.said())
  before, newest = steps_saved(run.workdir)[-2:]
  expect(f"at step {newest}," in run.said(), f"saved at {newest}")
  cut_newest(run.workdir)
  said = Processes(*arguments).finish()
  yield line_with(UNUSABLE, said)
  yield line_with(f"{RESUMED} {before} ", said)
  yield expect_same_end(run.workdir, expected)


def alone_grain(folder: pathlib.Path) -> Iterator[str]:
  """The same with Grain, whose workers load the images."""
  yield from alone(folder, "grain")


def cut_short(folder: pathlib.Path) -> Iterator[str]:
  """A file of the newest checkpoint is cut; then a process's part is lost."""
  expected = straight(folder)
  run = Processes(folder, "cut")
  run.wait_for_steps(60)
  run.children[0].terminate()
  expect(run.codes(SEEN_WITHIN) == [75, 75], run.said())
  newest = run.workdir / "checkpoints" / str(steps_saved(run.workdir)[-1])
  whole = shutil.copytree(run.workdir, folder / "half")
  cut_newest(run.workdir)
  again = Processes(folder, "cut").finish()
  yield line_with(UNUSABLE, again)
  yield line_with(RESUMED, again)
  yield expect_same_end(run.workdir, expected)
  # The part that process 1 wrote.
  state = whole / "checkpoints" / newest.name / "state"
  shutil.rmtree(state / "ocdbt.process_1")
  again = Processes(folder, "half").finish()
  yield line_with(UNUSABLE, again)
  yield expect_same_end(whole, expected)


def half_written(folder: pathlib.Path) -> Iterator[str]:
  """A process is killed while a checkpoint is being written."""
  expected = straight(folder)
  run = Processes(folder, "half_written")
  run.wait_for_steps(20)
  checkpoints = run.workdir / "checkpoints"
  deadline = time.monotonic() + TIMEOUT
  while not (seen := list(checkpoints.glob("*.orbax-checkpoint-tmp"))):
    expect(time.monotonic() < deadline, f"no save was seen:\n{run.said()}")
  run.children[1].kill()
  run.codes(SEEN_WITHIN)
  left = [p.name for p in checkpoints.iterdir()]
  yield f"killed while {seen[0].name} was there"
  yield f"left: {', '.join(sorted(left))}"
  yield from _again(folder, "half_written", expected)
  left = [p.name for p in checkpoints.iterdir() if not p.name.isdigit()]
  expect(not left, f"not removed: {left}")


def _full_disk(folder, index, limit) -> Iterator[str]:
  """No file of a process may grow beyond `limit` bytes."""
  expected, name = straight(folder), f"full_disk_{index}"
  run = Processes(folder, name)
  run.wait_for_steps(30)
  pid, none = run.children[index].pid, resource.RLIM_INFINITY
  resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, none))
  before = time.monotonic()
  codes = run.codes(SEEN_WITHIN)
  yield f"exit codes {codes} after {time.monotonic() - before:.1f} s"
  expect(codes[index] == 1, f"exit codes {codes}:\n{run.said()}")
  expect(codes[1 - index] not in (0, 2, 75), f"{codes}:\n{run.said()}")
  yield line_with("could not be saved .* resumes from step", run.said(index))
  yield from _again(folder, name, expected)


def full_disk(folder: pathlib.Path) -> Iterator[str]:
  """The disk is full, for metrics too; the same command resumes."""
  yield from _full_disk(folder, 0, 3000)


def full_disk_elsewhere(folder: pathlib.Path) -> Iterator[str]:
  """A process other than the first cannot write its part of a checkpoint."""
  yield from _full_disk(folder, 1, 10)


def unreadable(folder: pathlib.Path) -> Iterator[str]:
  """A data file cannot be read in the middle of an epoch, by one process."""
  file = folder / "images.bin"
  file.write_bytes(b"images")
  run = Processes(
    folder,
    "unreadable",
    options=["--config.data.pipeline=grain", f"--data_file={file}"],
    program="scripts/drill_launch.py",
  )
  run.wait_for_steps(30)
  file.unlink()
  codes = run.codes(SEEN_WITHIN)
  expect(all(codes), f"exit codes {codes}")
  yield line_with(f"process 1 of 2 .*{file.name}", run.said(1))
  yield f"exit codes {codes}; checkpoints {steps_saved(run.workdir)} are kept"
  expect(bool(steps_saved(run.workdir)), "no checkpoint is left")


def not_shared(folder: pathlib.Path) -> Iterator[str]:
  """The workdir is another folder for each process."""
  run = Processes(
    folder, "not_shared", options=["--apart"], program="scripts/drill_launch.py"
  )
  codes = run.codes()
  expect(codes == [2, 2], f"exit codes {codes}:\n{run.said()}")
  yield line_with("does not see what process 0 writes", run.said(0))
  expect(not run.workdir.exists(), "something was left behind")


def other_numbers(folder: pathlib.Path) -> Iterator[str]:
  """Four processes, then two of two devices, then one: one result."""
  # In more steps some unit's ReLU switches at another step, in a run of one
  # process too: the last bit then decides about a tenth of a gradient.
  options = ["--config.epochs=10"]
  expected = straight(folder, 2, options)
  for count, devices, steps in ((4, 1, 12), (2, 2, 24)):
    run = Processes(folder, "numbers", count, options, devices=devices)
    run.wait_for_steps(steps)
    run.children[-1].terminate()
    codes = run.codes()
    expect(codes == [75] * count, f"exit codes {codes}:\n{run.said()}")
    yield line_with("stopped by .* at step", run.said(0))
  said = Processes(folder, "numbers", 1, options).finish()
  yield line_with(RESUMED, said)
  worst = worst_difference(run.workdir, expected)
  yield f"differs from the straight run by {worst[0]:.1e} at most ({worst[1]})"
  expect(worst[0] < 1e-4, "too much")


METHODS = ("kd", "simkd", "crd", "semckd")


def equal(folder: pathlib.Path) -> Iterator[str]:
  """1, 2 and 4 processes, and 2 of 2 devices: equal parameters."""
  for count, devices in ((1, 1), (2, 1), (4, 1), (2, 2)):
    size = f"{count}x{devices}"
    jobs = [[method, f"{method}-{size}", 0, {}] for method in METHODS]
    if devices > 1:
      jobs.append(["crd", f"pmap-{size}", 0, {"parallel.mapping": "pmap"}])
    train_in(folder, count, devices, jobs)
    for method, name, *_ in jobs if count > 1 else ():
      runs = folder / name, folder / f"{method}-1x1"
      worst = worst_difference(*runs, "/params")
      whole = worst_difference(*runs)
      yield (
        f"{name}: parameters {worst[0]:.1e}, all that is saved {whole[0]:.1e}"
      )
      expect(worst[0] < 1e-5, f"differs: {worst}")


DRILLS: dict[str, Callable[[pathlib.Path], Iterator[str]]] = {
  drill.__name__: drill
  for drill in (
    *(alone, alone_grain, killed, coordinator_gone, frozen, terminated),
    *(cut_short, half_written),
    *(full_disk, full_disk_elsewhere, unreadable, not_shared, other_numbers),
    equal,
  )
}


def main() -> int:
  """Runs the drills that the command line names, or all."""
  parser = argparse.ArgumentParser(description="Breaks runs of processes.")
  parser.add_argument("drills", nargs="*", choices=[*DRILLS, []])
  # Orbax warns of a file that it no longer writes.
  logging.getLogger("absl").setLevel(logging.ERROR)
  failed = []
  names = parser.parse_args().drills or list(DRILLS)
  with tempfile.TemporaryDirectory(prefix="drills-") as name:
    folder = pathlib.Path(name)
    for drill in names:
      print(f"\n{drill}: {DRILLS[drill].__doc__}", flush=True)
      begun = time.monotonic()
      try:
        for line in DRILLS[drill](folder):
          print(f"  {line}", flush=True)
        print(f"  passed, {time.monotonic() - begun:.0f} s", flush=True)
      except Exception:
        traceback.print_exc()
        failed.append(drill)
  print(f"\n{len(names) - len(failed)} of {len(names)} drills passed")
  if failed:
    print(f"failed: {', '.join(failed)}")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
