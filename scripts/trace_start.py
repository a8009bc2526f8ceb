"""Counts the files that a run enters before its first train step.

    python scripts/trace_start.py
    python scripts/trace_start.py --root OTHER_CHECKOUT --keep FOLDER

Runs the command of `launch.py` on `configs/simkd_cifar.py:smoke`, with a
teacher that is trained already, and follows every Python call of the main
thread until the first chunk of steps has been dispatched. Files of kd_jax,
configs and launch.py count; libraries and what an import runs do not. A move is
a call of a function in another file than the last call was in.
"""

import argparse
import collections
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

REPO = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "configs/simkd_cifar.py:smoke"
# The function that calls the compiled train step, old name and new.
STOP_AT = ("dispatch", "_dispatch")


class Dispatched(BaseException):
  """The first chunk of train steps has been dispatched."""


class Trace:
  """A profile function that notes the project's files.

  Attributes:
    files: files in order of first entry.
    imported: number of files that were imported.
    moves: (from, to) to the number of moves.
  """

  def __init__(self, root: pathlib.Path, stop_at: tuple[str, ...]):
    """Follows the files below a folder.

    Args:
      root: checkout that holds launch.py, kd_jax and configs.
      stop_at: names of functions in kd_jax; the first return of one ends it.
    """
    self._root, self._stop_at = f"{root}{os.sep}", stop_at
    self._names: dict[str, str] = {}
    self._last, self._imports = "", 0
    self.files: list[str] = []
    self.moves: collections.Counter[tuple[str, str]] = collections.Counter()
    self.imported = 0

  def _name(self, path: str) -> str:
    """The path below the root, "" for a file that does not count."""
    if path not in self._names:
      inside = os.path.abspath(path).removeprefix(self._root)
      counts = inside.startswith(("kd_jax/", "configs/", "launch.py"))
      self._names[path] = inside if counts else ""
    return self._names[path]

  def __call__(self, frame, event, argument) -> None:
    """Notes a call or a return; see `sys.setprofile`."""
    del argument
    if event not in ("call", "return"):
      return
    name = self._name(frame.f_code.co_filename)
    if not name:
      return
    if frame.f_code.co_name == "<module>" and name != "launch.py":
      self.imported += event == "call"
      self._imports += 1 if event == "call" else -1
      return
    if self._imports:
      return
    if event == "call":
      if name not in self.files:
        self.files.append(name)
      if self._last not in ("", name):
        self.moves[self._last, name] += 1
      self._last = name
      return
    if frame.f_code.co_name in self._stop_at and name.startswith("kd_jax/"):
      sys.setprofile(None)
      raise Dispatched


def train_teacher(root: pathlib.Path, folder: pathlib.Path) -> None:
  """Runs the config once, which leaves its teacher beside the workdir."""
  workdir = folder / "first"
  if (workdir / "result.json").exists():
    return
  subprocess.run(
    [
      *(sys.executable, "launch.py", "--config", CONFIG),
      f"--workdir={workdir}",
    ],
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root)},
    stdout=subprocess.DEVNULL,
    check=True,
  )


def trace_launch(
  root: pathlib.Path, workdir: pathlib.Path, stop_at: tuple[str, ...]
) -> Trace:
  """Starts launch.py in this process, up to the first dispatch.

  Args:
    root: checkout whose code is run.
    workdir: of the run.
    stop_at: see `Trace`.

  Returns:
    What was seen.

  Raises:
    RuntimeError: if no function of these names has returned.
  """
  os.chdir(root)
  sys.path[:] = [str(root), *(p for p in sys.path if p != str(REPO))]
  sys.argv = ["launch.py", "--config", CONFIG, f"--workdir={workdir}"]
  path = root / "launch.py"
  spec = importlib.util.spec_from_file_location("launch", path)
  assert spec is not None and spec.loader is not None
  launch = importlib.util.module_from_spec(spec)
  sys.modules["launch"] = launch
  from absl import app

  trace = Trace(root, stop_at)
  sys.setprofile(trace)
  try:
    spec.loader.exec_module(launch)
    app.run(launch.main, flags_parser=launch.parse)
  except Dispatched:
    return trace
  except SystemExit:
    pass
  finally:
    sys.setprofile(None)
  raise RuntimeError(f"no function named {' or '.join(stop_at)} has returned")


def main() -> None:
  """Prints the files in order of first entry, and the counts."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--root", type=pathlib.Path, default=REPO)
  parser.add_argument("--keep", type=pathlib.Path, help="folder of the runs")
  parser.add_argument("--stop", help="name of the function that dispatches")
  arguments = parser.parse_args()
  root = arguments.root.resolve()
  stop_at = (arguments.stop,) if arguments.stop else STOP_AT
  with tempfile.TemporaryDirectory(prefix="trace-") as name:
    folder = (arguments.keep or pathlib.Path(name)).resolve()
    train_teacher(root, folder)
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="traced-", dir=folder))
    trace = trace_launch(root, workdir, stop_at)
    for file in trace.files:
      print(file)
    print("\nThe most frequent moves:")
    for (source, target), count in trace.moves.most_common(10):
      print(f"{count:4} {source} -> {target}")
    print(
      f"\n{trace.imported} files imported, {len(trace.files)} entered,"
      f" {trace.moves.total()} moves",
      flush=True,
    )
  os._exit(0)  # the run is abandoned, with its threads


if __name__ == "__main__":
  main()
