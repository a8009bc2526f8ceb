"""Huge pages and XLA's flag: where they help, and by the same process."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from kd_jax.distributed import cpu_environment


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """kernel(modes, gpu=False): a machine of this kind."""

  def make(modes, gpu=False):
    monkeypatch.setattr(cpu_environment, "_MODES", tmp_path / "enabled")
    monkeypatch.setattr(cpu_environment, "_NVIDIA", tmp_path / "nvidiactl")
    if modes is not None:
      (tmp_path / "enabled").write_text(f"{modes}\n")
    if gpu:
      (tmp_path / "nvidiactl").touch()

  return make


ASKED = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ({"A": "b"}, {"A": "b", cpu_environment.TUNABLES: ASKED}),
    (
      {cpu_environment.TUNABLES: "glibc.malloc.check=3"},
      {cpu_environment.TUNABLES: f"glibc.malloc.check=3:{ASKED}"},
    ),
    (
      {cpu_environment.TUNABLES: "glibc.malloc.hugetlb=0"},
      {cpu_environment.TUNABLES: "glibc.malloc.hugetlb=0"},
    ),
  ],
)
def test_huge_pages_are_asked_for_once(kernel, before, after):
  kernel("always [madvise] never")
  found = cpu_environment.with_huge_pages(before)
  assert found == after
  assert cpu_environment.with_huge_pages(found) == found


@pytest.mark.parametrize(
  "modes", ["[always] madvise never", "always madvise [never]", None]
)
def test_a_kernel_that_decides_itself_is_not_asked(kernel, modes):
  kernel(modes)
  assert cpu_environment.with_huge_pages({"A": "b"}) == {"A": "b"}


def test_a_gpu_needs_none(kernel):
  kernel("always [madvise] never", gpu=True)
  assert cpu_environment.with_huge_pages({}) == {}
  on_cpu = cpu_environment.with_huge_pages({"JAX_PLATFORMS": "cpu"})
  assert on_cpu[cpu_environment.TUNABLES] == ASKED


SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ({"A": "b"}, {"A": "b", cpu_environment.FLAGS: f"{SCHEDULER}=false"}),
    (
      {cpu_environment.FLAGS: "--xla_dump_to=d"},
      {cpu_environment.FLAGS: f"--xla_dump_to=d {SCHEDULER}=false"},
    ),
    (
      {cpu_environment.FLAGS: f"{SCHEDULER}=true"},
      {cpu_environment.FLAGS: f"{SCHEDULER}=true"},
    ),
  ],
)
def test_the_scheduler_is_named_once(kernel, before, after):
  kernel(None)
  found = cpu_environment.with_scheduler(before)
  assert found == after
  assert cpu_environment.with_scheduler(found) == found


def test_a_cpus_programs_have_both(kernel):
  kernel("always [madvise] never")
  both = cpu_environment.prepared({"A": "b"})
  assert set(both) == {"A", cpu_environment.TUNABLES, cpu_environment.FLAGS}
  assert cpu_environment.prepared(both) == both


@pytest.mark.parametrize("version", ["0.9.2", "0.13.0", "1.10.0"])
def test_an_unknown_xla_gets_no_flag(kernel, monkeypatch, version):
  kernel(None)
  monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
  assert cpu_environment.with_scheduler({}) == {}


def test_a_gpu_gets_no_flag(kernel):
  kernel(None, gpu=True)
  assert cpu_environment.with_scheduler({}) == {}
  on_cpu = cpu_environment.with_scheduler({"JAX_PLATFORMS": "cpu"})
  assert cpu_environment.FLAGS in on_cpu


def test_this_xla_knows_the_flag():
  """It ends a process for one that it does not know."""
  program = "import jax; print(int(jax.jit(lambda x: 2 * x)(1)))"

  def run(flags):
    variables = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      cpu_environment.FLAGS: flags,
    }
    return subprocess.run(
      [sys.executable, "-c", program],
      env=variables,
      capture_output=True,
      text=True,
    )

  known = cpu_environment.with_scheduler({"JAX_PLATFORMS": "cpu"})
  assert run(known[cpu_environment.FLAGS]).stdout == "2\n"
  assert run(f"{SCHEDULER}_of_none=false").returncode != 0


PROGRAM = """
import os, pathlib, sys
from kd_jax import environment
environment._MODES = pathlib.Path(sys.argv[1])
environment._NVIDIA = pathlib.Path("no such file")
print(os.getpid(), flush=True)
environment.restart_prepared()
print(os.environ.get(environment.TUNABLES), sys.argv[2:], sys.flags.dev_mode)
"""


@pytest.mark.parametrize("mode", ["[madvise]", "[always]"])
def test_the_same_process_starts_again_with_its_arguments(tmp_path, mode):
  path = tmp_path / "enabled"
  path.write_text(mode)
  variables = {
    k: v for k, v in os.environ.items() if k != cpu_environment.TUNABLES
  } | {cpu_environment.FLAGS: f"{SCHEDULER}=true"}
  process = subprocess.Popen(
    [sys.executable, "-X", "dev", "-c", PROGRAM, path, "a b", "--c"],
    env=variables,
    stdout=subprocess.PIPE,
    text=True,
  )
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  *pids, last = out.splitlines()
  again = mode == "[madvise]"
  assert pids == [str(process.pid)] * (1 + again)
  assert last == f"{ASKED if again else None} ['a b', '--c'] True"
