"""A run goes on when nobody reads what it prints any more."""

import subprocess
import sys

import pytest

from kd_jax.distributed import devices, processes

CODE = """
import sys
from kd_jax.distributed import launcher
launcher.keep_output()
for i in range(2000):
  print("line", i)
print("done", file=sys.stderr)
"""


def test_a_reader_that_leaves(repo):
  run = subprocess.run(
    ["bash", "-c", '"$0" -c "$1" | head -n 1', sys.executable, CODE],
    cwd=repo,
    capture_output=True,
    text=True,
    check=True,
  )
  assert (run.stdout, run.stderr) == ("line 0\n", "done\n")


def test_an_interactive_shell_of_slurm_is_one_process():
  tasks = {"SLURM_STEP_NUM_TASKS": "2"}
  assert processes.detect(tasks) == "slurm"
  assert processes.detect({**tasks, "SLURM_PTY_PORT": "1"}) is None


def test_a_platform_without_devices(monkeypatch):
  def fail():
    raise AssertionError

  monkeypatch.setattr(devices.jax, "devices", fail)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  with pytest.raises(ValueError, match=r"JAX_PLATFORMS=cuda: .*cuda12"):
    devices.require_backend()
