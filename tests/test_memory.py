"""Huge pages: asked for where that helps, and by the same process."""

import os
import subprocess
import sys

import pytest

from kd_jax import memory


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """kernel(modes, gpu=False): a machine of this kind."""

  def make(modes, gpu=False):
    monkeypatch.setattr(memory, "_MODES", tmp_path / "enabled")
    monkeypatch.setattr(memory, "_NVIDIA", tmp_path / "nvidiactl")
    if modes is not None:
      (tmp_path / "enabled").write_text(f"{modes}\n")
    if gpu:
      (tmp_path / "nvidiactl").touch()

  return make


ASKED = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ({"A": "b"}, {"A": "b", memory.VARIABLE: ASKED}),
    (
      {memory.VARIABLE: "glibc.malloc.check=3"},
      {memory.VARIABLE: f"glibc.malloc.check=3:{ASKED}"},
    ),
    (
      {memory.VARIABLE: "glibc.malloc.hugetlb=0"},
      {memory.VARIABLE: "glibc.malloc.hugetlb=0"},
    ),
  ],
)
def test_huge_pages_are_asked_for_once(kernel, before, after):
  kernel("always [madvise] never")
  found = memory.with_huge_pages(before)
  assert found == after
  assert memory.with_huge_pages(found) == found


@pytest.mark.parametrize(
  "modes", ["[always] madvise never", "always madvise [never]", None]
)
def test_a_kernel_that_decides_itself_is_not_asked(kernel, modes):
  kernel(modes)
  assert memory.with_huge_pages({"A": "b"}) == {"A": "b"}


def test_a_gpu_needs_none(kernel):
  kernel("always [madvise] never", gpu=True)
  assert memory.with_huge_pages({}) == {}
  on_cpu = memory.with_huge_pages({"JAX_PLATFORMS": "cpu"})
  assert on_cpu[memory.VARIABLE] == ASKED


PROGRAM = """
import os, pathlib, sys
from kd_jax import memory
memory._MODES = pathlib.Path(sys.argv[1])
memory._NVIDIA = pathlib.Path("no such file")
print(os.getpid(), flush=True)
memory.restart_with_huge_pages()
print(os.environ.get(memory.VARIABLE), sys.argv[2:], sys.flags.dev_mode)
"""


@pytest.mark.parametrize("mode", ["[madvise]", "[always]"])
def test_the_same_process_starts_again_with_its_arguments(tmp_path, mode):
  path = tmp_path / "enabled"
  path.write_text(mode)
  environment = {k: v for k, v in os.environ.items() if k != memory.VARIABLE}
  process = subprocess.Popen(
    [sys.executable, "-X", "dev", "-c", PROGRAM, path, "a b", "--c"],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  *pids, last = out.splitlines()
  again = mode == "[madvise]"
  assert pids == [str(process.pid)] * (1 + again)
  assert last == f"{ASKED if again else None} ['a b', '--c'] True"
