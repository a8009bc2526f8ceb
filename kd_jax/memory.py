"""The host's memory, as the C library asks the kernel for it.

A train step on a CPU takes and returns hundreds of megabytes, and with pages of
4 KiB the kernel hands them over 90,000 times a step. Pages of 2 MiB make the
step faster by 4 % or more (docs/speed.md). The C library asks for them if a
variable of the environment says so, which it reads before Python begins.
"""

import os
import pathlib
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
# Linux: "always [madvise] never", the one in force in brackets.
_MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NVIDIA = pathlib.Path("/dev/nvidiactl")


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
  """An environment whose processes ask for huge pages, where that helps.

  Args:
    environment: variables by name.

  Returns:
    A copy, with glibc's tunable for transparent huge pages. Without it where
    the kernel gives huge pages to all or to none, where the tunable has been
    set to anything, and where a GPU does the work.
  """
  changed = dict(environment)
  tunables = environment.get(VARIABLE, "")
  on_gpu = _NVIDIA.exists() and environment.get("JAX_PLATFORMS") != "cpu"
  if on_gpu or _TUNABLE in tunables or not _programs_decide():
    return changed
  changed[VARIABLE] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
  return changed


def _programs_decide() -> bool:
  try:
    return "[madvise]" in _MODES.read_text()
  except OSError:
    return False


def restart_with_huge_pages() -> None:
  """Starts this program anew, as the same process, if it has no huge pages yet.

  To be called first of all: what the program has done is lost.
  """
  environment = with_huge_pages(os.environ)
  if environment != dict(os.environ):
    os.execve(sys.executable, sys.orig_argv, environment)
