"""What makes a train step on a CPU faster, and has to be said before it starts.

Two variables of the environment, which are read before Python begins or when
JAX is first used (figures in docs/speed.md):

- A step takes and returns hundreds of megabytes, and with pages of 4 KiB the
  kernel hands them over 90,000 times a step. The C library can ask for pages of
  2 MiB instead.
- XLA orders a program's operations such that many of them could run at once.
  Where every core is a device they cannot, and maps lie about for longer.
"""

import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Mapping

TUNABLES, FLAGS = "GLIBC_TUNABLES", "XLA_FLAGS"


_TUNABLE = "glibc.malloc.hugetlb"


_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"


# The XLA of these has the flag; one that has not would end the process.
_JAXLIB = ("0.10", "0.11", "0.12")


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
  tunables = environment.get(TUNABLES, "")
  if _is_on_gpu(environment) or _TUNABLE in tunables or not _programs_decide():
    return changed
  changed[TUNABLES] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
  return changed


def with_scheduler(environment: Mapping[str, str]) -> dict[str, str]:
  """An environment whose XLA puts a CPU's operations one after the other.

  Args:
    environment: variables by name.

  Returns:
    A copy, with XLA's flag. Without it where it has been set to anything, where
    a GPU does the work, and for a jaxlib that is not known to have it.
  """
  changed = dict(environment)
  flags = environment.get(FLAGS, "")
  version = importlib.metadata.version("jaxlib")
  known = version.startswith(tuple(f"{v}." for v in _JAXLIB))
  if _is_on_gpu(environment) or _SCHEDULER in flags or not known:
    return changed
  changed[FLAGS] = " ".join(filter(None, [flags, f"{_SCHEDULER}=false"]))
  return changed


def prepared(environment: Mapping[str, str]) -> dict[str, str]:
  """`with_huge_pages` and `with_scheduler`."""
  return with_scheduler(with_huge_pages(environment))


def _is_on_gpu(environment: Mapping[str, str]) -> bool:
  return _NVIDIA.exists() and environment.get("JAX_PLATFORMS") != "cpu"


def _programs_decide() -> bool:
  try:
    return "[madvise]" in _MODES.read_text()
  except OSError:
    return False


def restart_prepared() -> None:
  """Starts this program anew, as the same process, if it is not `prepared`.

  To be called first of all: what the program has done is lost.
  """
  environment = prepared(os.environ)
  if environment != dict(os.environ):
    os.execve(sys.executable, sys.orig_argv, environment)
