"""Drills: real processes on this machine, and every fault of a cluster.

    python scripts/drills.py            all, about 30 minutes on two cores
    python scripts/drills.py killed full_disk
    python scripts/drills.py moments --moments 1000

Each drill trains CRD with small networks on the CPU, breaks something, shows
what the user then sees, and checks it. The exit code is 1 if a drill fails.
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
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np
from PIL import Image

from kd_jax import storage
from scripts.drill_processes import (
  LOST,
  OPTIONS,
  RESUMED,
  SEEN_WITHIN,
  TIMEOUT,
  UNUSABLE,
  Processes,
  environment,
  expect,
  expect_same_end,
  line_with,
  steps_saved,
  train_in,
  worst_difference,
)


def straight(
  folder: pathlib.Path, count: int = 2, options: Sequence[str] = ()
) -> pathlib.Path:
  """Returns the workdir of a run that nothing interrupts, made once."""
  name = "-".join(["straight", str(count), *(o.split("=")[1] for o in options)])
  if not (folder / name / "result.json").exists():
    Processes(folder, name, count, options).finish()
  return folder / name


def _again(folder, name, expected, count=2, options=()) -> Iterator[str]:
  said = Processes(folder, name, count, options).finish()
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


# One process; `alone` has the same straight run.
ALONE = 1, ("--config.data.pipeline=device",)


def hung_up(folder: pathlib.Path) -> Iterator[str]:
  """SIGHUP, as of a terminal that is closed: saved, and resumed exactly."""
  # Of nohup, under which it has no effect.
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  expected = straight(folder, *ALONE)
  run = Processes(folder, "hung_up", *ALONE)
  run.wait_for_steps(40)
  run.children[0].send_signal(signal.SIGHUP)
  codes = run.codes(SEEN_WITHIN)
  expect(codes == [75], f"exit codes {codes}:\n{run.said()}")
  yield line_with("stopped by SIGHUP at step", run.said())
  yield from _again(folder, "hung_up", expected, *ALONE)


def broken_pipe(folder: pathlib.Path) -> Iterator[str]:
  """The reader of the output leaves: the run goes on without."""
  expected = straight(folder, *ALONE)
  run = Processes(folder, "broken_pipe", *ALONE, reader="head -2")
  lines = run.finish().splitlines()
  yield f"{len(lines)} lines were read"
  expect(len(lines) == 2, "\n".join(lines))
  yield expect_same_end(run.workdir, expected)


def two_commands(folder: pathlib.Path) -> Iterator[str]:
  """The same command twice at once: one runs, the other is refused."""
  expected = straight(folder, *ALONE)
  count, options = ALONE
  options = (*options, f"--workdir={folder / 'twice'}")
  runs = [Processes(folder, name, count, options) for name in ("one", "two")]
  codes = [code for run in runs for code in run.codes()]
  said = "\n".join(run.said() for run in runs)
  expect(sorted(codes) == [0, 2], f"exit codes {codes}:\n{said}")
  yield line_with(r"is in use by another run \(process \d+", said)
  yield expect_same_end(folder / "twice", expected)


def best_lost(folder: pathlib.Path) -> Iterator[str]:
  """No room when the best weights are saved: no worse ones replace them."""
  count, options = ALONE
  every = ("--config.eval.every_epochs=2", "--config.checkpoint.every_steps=4")
  options = (*options, *every)
  expected = straight(folder, count, options)
  records = storage.read_metrics(expected / "metrics.jsonl")
  scores = [(r["top1"], -r["step"]) for r in records if r["kind"] == "eval"]
  (_, minus_step), last = max(scores), scores[-1]
  expect(last < max(scores), f"the last epoch is the best one: {scores}")
  options = (*options, f"--no_room_at={-minus_step}")
  program = "scripts/drill_launch.py"
  run = Processes(folder, "best_lost", count, options, program=program)
  codes = run.codes()
  expect(codes == [1], f"exit codes {codes}:\n{run.said()}")
  yield line_with("best weights could not be saved .* resumes", run.said())
  yield from _again(folder, "best_lost", expected, count, options[:-1])


def data_changed(folder: pathlib.Path) -> Iterator[str]:
  """Images change between stop and restart: refused until they are back."""
  rng, images = np.random.default_rng(0), folder / "images"
  for split in ("train", "val"):
    for label in "abcd":
      (images / split / label).mkdir(parents=True)
      for i in range(16):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        picture = Image.fromarray(pixels)
        picture.save(images / split / label / f"{i}.png")
  config = "configs/crd_cifar.py"
  options = (
    *("--config.data.name=folder", f"--config.data.dir={images}"),
    *("--config.data.pipeline=grain", "--config.data.resize=8"),
    *("--config.data.crop_padding=0", "--config.optim.milestones=(20,)"),
    *("--config.batch_size=16", "--config.eval.batch_size=64"),
  )
  arguments = {"count": 1, "options": options, "config": config}
  unstopped = Processes(folder, "data_straight", **arguments)
  unstopped.finish()
  run = Processes(folder, "data_changed", **arguments)
  run.wait_for_steps(40)
  run.children[0].terminate()
  codes = run.codes(SEEN_WITHIN)
  expect(codes == [75], f"exit codes {codes}:\n{run.said()}")
  saved = steps_saved(run.workdir)
  here, there = images / "train" / "a" / "3.png", images / "train" / "b"
  here.rename(there / "x.png")
  again = Processes(folder, "data_changed", **arguments)
  codes = again.codes()
  expect(codes == [2], f"exit codes {codes}:\n{again.said()}")
  words = "holds a run of other data: .*'a' has 16 images"
  yield line_with(words, again.said())
  expect(steps_saved(run.workdir) == saved, "checkpoints have changed")
  (there / "x.png").rename(here)
  again = Processes(folder, "data_changed", **arguments)
  yield line_with(RESUMED, again.finish())
  yield expect_same_end(again.workdir, unstopped.workdir)


def moments(folder: pathlib.Path, count: int = 20) -> Iterator[str]:
  """SIGTERM at random moments, again and again, until the run ends."""
  to = folder / "moments"
  short = ("--config.epochs=4", "--config.eval.every_epochs=1")
  process = subprocess.Popen(
    [
      *(sys.executable, "scripts/drill_forks.py", str(to), str(count), "0"),
      *("--config=configs/crd_cifar.py:smoke", *OPTIONS, *short),
      *("--config.checkpoint.every_steps=3", "--config.log.every_steps=2"),
    ],
    cwd=REPO,
    env={
      **environment(1),
      "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    },
    stdout=subprocess.PIPE,
    text=True,
  )
  stopped, starts, expected = 0, 0, None
  assert process.stdout is not None
  try:
    for line in process.stdout:
      ended = json.loads(line)
      codes, workdir = ended["codes"], pathlib.Path(ended["workdir"])
      # Python lets the signal kill a run that ends by itself, and is whole.
      late = codes[codes.index(-15) :] if -15 in codes else [0]
      fine = set(codes) <= {0, 75, -15} and 75 not in late
      expect(fine, f"exit codes {codes}:\n{ended['log']}")
      starts += len(codes)
      stopped += len(codes) - 1
      if expected is None:
        expected = workdir
        continue
      expect_same_end(workdir, expected)
      shutil.rmtree(workdir)
    code = process.wait()
  finally:
    process.kill()
    process.stdout.close()
  expect(code == 0, f"exit code {code}")
  expect(stopped >= count / 2, f"only {stopped} starts were stopped")
  yield f"{stopped} of {starts} starts were stopped; each run ended alike"


METHODS = ("crd", "semckd", "simkd", "dkd")


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
    *(hung_up, broken_pipe, two_commands, best_lost, data_changed, moments),
    equal,
  )
}


def main() -> int:
  """Runs the drills that the command line names, or all."""
  parser = argparse.ArgumentParser(description="Breaks runs of processes.")
  parser.add_argument("drills", nargs="*", choices=[*DRILLS, []])
  parser.add_argument("--moments", type=int, default=20, help="how many")
  args = parser.parse_args()
  # Orbax warns of a file that it no longer writes.
  logging.getLogger("absl").setLevel(logging.ERROR)
  failed = []
  names = args.drills or list(DRILLS)
  drills = {**DRILLS, "moments": lambda to: moments(to, args.moments)}
  with tempfile.TemporaryDirectory(prefix="drills-") as name:
    folder = pathlib.Path(name)
    for drill in names:
      print(f"\n{drill}: {DRILLS[drill].__doc__}", flush=True)
      begun = time.monotonic()
      try:
        for line in drills[drill](folder):
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
