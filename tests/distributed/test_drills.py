"""Real processes, really killed: what a restart must give back."""

import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kd_jax import storage

# CRD has all that a restart can lose: BatchNorm, banks, normalisers, random
# negatives. Small enough to start eight times, long enough to be caught.
OVERRIDES = [
  "--config.student.name=_tiny",
  "--config.teacher.name=_tiny_wide",
  "--config.teacher.epochs=1",
  "--config.distiller.k=32",
  "--config.distiller.feat_dim=8",
  "--config.data.image_size=8",
  "--config.epochs=60",
  "--config.eval.every_epochs=15",
  "--config.checkpoint.every_steps=16",
  "--config.log.every_steps=8",
]
TIMEOUT = 240


class Drill:
  """One folder of runs that share a teacher and compiled programs."""

  def __init__(self, folder: pathlib.Path, repo: pathlib.Path):
    self.folder, self.repo = folder, repo

  def start(self, name: str, *options: str) -> subprocess.Popen:
    command = [
      sys.executable,
      "launch.py",
      "--config=configs/crd_cifar.py:smoke",
      f"--workdir={self.folder / name}",
      f"--config.parallel.compilation_cache={self.folder / 'cache'}",
      *OVERRIDES,
      *options,
    ]
    return subprocess.Popen(
      command,
      cwd=self.repo,
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def finish(self, name: str, *options: str) -> str:
    process = self.start(name, *options)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, out + err
    return out + err

  def wait_for_steps(self, name: str, process, steps: int) -> None:
    """Until the run has logged that many steps; it must still be running."""
    path = self.folder / name / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
      assert process.poll() is None, process.communicate()
      if path.exists():
        lines = path.read_text().splitlines()[:-1]
        if lines and json.loads(lines[-1])["step"] >= steps:
          return
      time.sleep(0.02)
    raise AssertionError(f"{name} has not come to step {steps}")

  def checkpoints(self, name: str) -> list[int]:
    folder = self.folder / name / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

  def final_arrays(self, name: str):
    step = self.checkpoints(name)[-1]
    folder = self.folder / name / "checkpoints" / str(step) / "state"
    return step, storage.restore_tree(folder)

  def records(self, name: str) -> list[str]:
    return (self.folder / name / "metrics.jsonl").read_text().splitlines()

  def assert_same_end(self, name: str, other: str) -> None:
    step, arrays = self.final_arrays(name)
    other_step, other_arrays = self.final_arrays(other)
    assert step == other_step
    ours = dict(_leaves(arrays))
    theirs = dict(_leaves(other_arrays))
    assert ours.keys() == theirs.keys()
    assert any("bank_s" in path for path in ours)
    for path, value in ours.items():
      np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    assert self.records(name) == self.records(other)


def _leaves(tree, prefix=""):
  if not isinstance(tree, dict):
    yield prefix, tree
    return
  for key, value in tree.items():
    yield from _leaves(value, f"{prefix}/{key}")


@pytest.fixture(scope="session")
def drill(session_folder, repo):
  folder = session_folder / "drill"
  folder.mkdir(exist_ok=True)
  return Drill(folder, repo)


@pytest.fixture
def straight(drill):
  """straight(*options) -> name of a run that nothing interrupted."""

  def make(*options):
    name = "-".join(["straight", *(o.split("=")[1] for o in options)])
    with (drill.folder / f"{name}.lock").open("w") as lock:
      # Made by one of xdist's workers for all.
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not (drill.folder / name / "result.json").exists():
        drill.finish(name, *options)
    return name

  return make


def kill(drill, name, option, *, after):
  process = drill.start(name, option)
  drill.wait_for_steps(name, process, after)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert not (drill.folder / name / "result.json").exists()


def assert_it_goes_on(said, *, after):
  step, total = re.search(r"going on from step (\d+) of (\d+)", said).groups()
  # Checkpoints are 16 steps apart, and the last may not have been finished.
  assert after - 32 <= int(step) < int(total)


def test_sigkill(drill, straight):
  option, name = "--config.data.pipeline=grain", "grain"
  expected = straight(option)
  kill(drill, name, option, after=100)
  assert_it_goes_on(drill.finish(name, option), after=100)
  drill.assert_same_end(name, expected)


def test_sigkill_then_sigterm_then_a_damaged_checkpoint(drill, straight):
  option, name = "--config.data.pipeline=device", "device"
  expected = straight(option)
  kill(drill, name, option, after=60)

  process = drill.start(name, option)
  drill.wait_for_steps(name, process, 140)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 75, err
  assert_it_goes_on(out, after=60)
  assert re.search(r"stopped by SIGTERM at step \d+, saved in", err)
  before, newest = drill.checkpoints(name)[-2:]
  assert 140 <= newest < 240 and f"at step {newest}," in err

  files = (drill.folder / name / "checkpoints" / str(newest)).rglob("*")
  largest = max(
    (p for p in files if p.is_file()), key=lambda p: p.stat().st_size
  )
  with largest.open("r+b") as file:
    file.truncate(largest.stat().st_size // 2)

  said = drill.finish(name, option)
  assert re.search(rf"checkpoint of step {newest} in .* cannot be used", said)
  assert f"going on from step {before} of" in said
  drill.assert_same_end(name, expected)
