"""How cells are chosen, measured, kept and resumed; the scripts' commands.

No test asserts how fast anything is.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from benchmarks import (
  cell,
  guard,
  measure,
  processes,
  profile_step,
  speed_table,
  step,
)
from benchmarks import work as work_lib
from benchmarks.cell import SIDES, Cell

REPO = pathlib.Path(step.__file__).parent.parent
CPU, GPU = REPO / "benchmarks/cpu.sh", REPO / "benchmarks/gpu.sh"
# No compiler of PyTorch's, which takes a minute, and no threads: the networks
# are too small for them.
ENVIRONMENT = {
  **os.environ,
  "JAX_PLATFORMS": "cpu",
  "OMP_NUM_THREADS": "1",
  "TORCH_COMPILE_DISABLE": "1",
}
# Of a cell, as far as the table reads it.
MADE_UP = {
  "images_per_second": 1.0,
  "ms_per_step": 1.0,
  "ms_per_step_least": 1.0,
  "ms_per_step_most": 1.0,
  "first_step_seconds": 1.0,
  "host_ms_per_dispatch": None,
  "share_of_peak": None,
  "flops_per_step": None,
  "peak_bytes": 1,
  "devices": 1,
  "device": "cpu",
}


def make_cell(weights: str = "x", teacher: str = "nobody", **fields) -> Cell:
  work = work_lib.Work(
    teacher=teacher, student="_tiny", method="kd", batch=8, examples=32
  )
  made = Cell("jax", work, "float32", 0, 1, 1, 1, 0, weights)
  return dataclasses.replace(made, **fields)


@pytest.fixture
def made_up(monkeypatch):
  """Cells are not measured; the list of those that were asked for."""
  asked = []

  def measured(cells, seconds):
    asked.append(list(cells))
    return [dict(MADE_UP)] * len(cells)

  monkeypatch.setattr(step, "_prepare", lambda cell, seconds: None)
  monkeypatch.setattr(step, "measure_in_processes", measured)
  return asked


def test_cells_are_those_that_exist():
  arguments = ["--methods", "none", "at", "--sides", *SIDES, "--batch", "64"]
  cells = step.make_cells(step.parse([*arguments, "--pairs", "a:b"]))
  found = [(c.work.method, c.side, c.dtype[:5]) for c in cells]
  assert found == [
    *[("none", "jax", "float"), ("none", "jax", "bfloa")],
    *[("none", "eager", "float"), ("none", "compiled", "bfloa")],
    *[("at", "jax", "float"), ("at", "jax", "bfloa")],
    *[("at", "teacher", "float"), ("at", "teacher", "bfloa")],
  ]


@pytest.mark.full
def test_all_sides_are_measured(tmp_path, monkeypatch, capsys):
  for name, value in {**ENVIRONMENT, "JAX_NUM_CPU_DEVICES": "2"}.items():
    monkeypatch.setenv(name, value)
  out = tmp_path / "step.json"
  step.main(
    [
      *("--pairs", "_tiny_wide:_tiny", "--methods", "simkd"),
      *("--batch", "8", "--steps", "3", "--turns", "2", "--examples", "32"),
      *("--image_size", "16", "--workers", "1", "--dtype", "float32"),
      *("--steps_per_dispatch", "2", "--weights", str(tmp_path / "weights")),
      *("--sides", *SIDES, "--out", str(out)),
    ]
  )
  shown, result = capsys.readouterr().out, json.loads(out.read_text())
  assert [r["cell"]["side"] for r in result["rows"]] == list(SIDES)
  for row in result["rows"]:
    found = row["result"]
    assert "error" not in found, found
    turns = found["ms_per_step_turns"]
    assert len(turns) == 2 and min(turns) > 0
    assert found["ms_per_step"] == pytest.approx(np.median(turns))
    rate = 8 / found["ms_per_step"] * 1e3
    assert found["images_per_second"] == pytest.approx(rate)
    assert found["first_step_seconds"] > 0 and found["peak_bytes"] > 50e6
    assert found["share_of_peak"] is None  # no table has a CPU's
    assert np.isfinite(found["first_losses"]).all()
    ours = row["cell"]["side"] in ("jax", "teacher")
    assert found["devices"] == (2 if ours else 1)
    assert f"{found['images_per_second']:,.0f}" in shown
  ours, eager, compiled, _ = (row["result"] for row in result["rows"])
  # Steps are rounded up to whole dispatches.
  assert ours["steps_per_turn"] == 4 and eager["steps_per_turn"] == 3
  assert eager["flops_per_step"] == ours["flops_per_step"] > 1e6
  # Nearly the same: augmented otherwise.
  first = compiled["first_losses"][0]
  assert first == pytest.approx(ours["first_losses"][0], rel=0.2)


def test_a_cell_that_fails_or_is_late_leaves_the_others(tmp_path):
  cells = [make_cell(str(tmp_path / "weights"))]
  again = Cell.parse(json.dumps({**cells[0].key, "weights": "x"}))
  assert again.work == cells[0].work
  out = tmp_path / "out.json"
  (row,) = step.measure_all(cells, out=out, seconds=100)["rows"]
  assert "nobody" in row["result"]["error"]
  (row,) = step.measure_all(cells, out=out, seconds=0)["rows"]
  assert row["result"] == {"error": step.NOT_RUN}
  assert step.NOT_RUN in step.report(json.loads(out.read_text()))


@pytest.mark.parametrize(
  ("change", "again"),
  [
    ({}, False),
    ({"commit": "b"}, True),
    ({"commit": "a-dirty"}, True),
    ({"gpus": ["NVIDIA H100 NVL"]}, True),
    ({"flags": "--something"}, True),
  ],
)
def test_only_the_same_code_and_machine_resumes(
  change, again, made_up, tmp_path, monkeypatch
):
  for wanted in ({}, change):
    found = {"commit": "a", "gpus": ["NVIDIA H200"], "flags": "", **wanted}
    monkeypatch.setattr(measure, "commit", lambda found=found: found["commit"])
    monkeypatch.setattr(measure, "gpus", lambda found=found: found["gpus"])
    monkeypatch.setenv("XLA_FLAGS", found["flags"])
    step.measure_all([make_cell()], out=tmp_path / "o.json", seconds=9)
  assert len(list(filter(None, made_up))) == (2 if again else 1)


class Turns:
  """Stands for cells' processes: notes what happens, in which order."""

  def __init__(self, turns):
    self.turns, self.notes = turns, []

  def start(self, cell, seconds):
    process = types.SimpleNamespace(result=None)
    name, left = cell.side, self.turns[cell.side]

    def wait(warm=None):
      nonlocal left
      # Others were at work since its last turn, but not since it was built.
      assert warm is (None if left == self.turns[name] else True)
      self.notes.append(name if left else f"{name} ends")
      process.result = None if left else {"side": name}
      left -= 1

    process.wait = process.take_turn = wait
    return contextlib.nullcontext(process)


def test_cells_of_a_work_take_turns(monkeypatch):
  turns = Turns({"jax": 2, "eager": 0, "teacher": 2})
  monkeypatch.setattr(step, "_start", turns.start)
  cells = [make_cell(side=side) for side in turns.turns]
  results = step.measure_in_processes(cells, 9)
  assert [r["side"] for r in results] == ["jax", "eager", "teacher"]
  # Each warms up; then those that have not ended, in their order.
  assert turns.notes == [
    *("jax", "eager ends", "teacher", "jax", "teacher"),
    *("jax ends", "teacher ends"),
  ]


@pytest.mark.parametrize("options", [(), ("--by_turns",)])
def test_by_turns_is_by_work(options, made_up, tmp_path, capsys):
  step.main([
    *("--pairs", "_tiny_wide:_tiny", "--methods", "kd", "none", *options),
    *("--sides", "jax", "eager", "--batch", "8", "--dtype", "float32"),
    *("--out", str(tmp_path / "out.json")),
  ])  # fmt: skip
  both = [["kd jax", "kd eager"], ["none jax", "none eager"]]
  expected = both if options else [[name] for pair in both for name in pair]
  asked = [[f"{c.work.method} {c.side}" for c in cells] for cells in made_up]
  assert asked == expected


WAITING = """
import json, sys, time
from benchmarks import cell
for turn in range(2):
  print("warm:", cell.wait_for_turn())
"""


@pytest.mark.parametrize(
  "last, result",
  [
    ("print('{\"a\": 1}')", {"a": 1}),
    (
      "print('because', file=sys.stderr); sys.exit('broken')",
      {"error": "exit code 1: broken", "said": ["because", "broken"]},
    ),
    ("time.sleep(99)", {"error": "not done in the 9 s that were left"}),
  ],
)
def test_a_process_waits_for_its_turns(last, result, tmp_path):
  (tmp_path / "waiting_program.py").write_text(WAITING + last)
  paths = os.pathsep.join([str(REPO), str(tmp_path)])
  environment = {**ENVIRONMENT, "PYTHONPATH": paths}
  with processes.started(["waiting_program"], 9, environment) as process:
    process.wait()
    for warm in (False, True):
      assert process.result is None
      process.take_turn(warm)
    assert process.result == result


def test_an_ended_process_takes_no_turn(tmp_path):
  (tmp_path / "waiting_program.py").write_text(WAITING)
  paths = os.pathsep.join([str(REPO), str(tmp_path)])
  environment = {**ENVIRONMENT, "PYTHONPATH": paths}
  with processes.started(["waiting_program"], 9, environment) as process:
    process.wait()
    process.end()
    process.wait()
    process.take_turn()
    assert "9 s that were left" in process.result["error"]


def test_peaks_are_of_whole_names():
  assert measure.peak("NVIDIA H200", "float32") == 494.7e12
  assert measure.peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
  for other in ("NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu"):
    assert measure.peak(other, "float32") is None, other


class Clock:
  """A program whose steps take 0.25 s, and its building ten."""

  def __init__(self, monkeypatch, steps: int):
    self.steps, self.host_seconds, self.dispatches = steps, 0.0, 0
    self._now = 0.0
    monkeypatch.setattr(cell.time, "perf_counter", lambda: self._now)

  def run(self, steps: int) -> list[float]:
    self._now += steps * 0.25 + 10 * (not self.dispatches)
    self.host_seconds += 0.5 * steps / self.steps
    self.dispatches += steps // self.steps
    return [1.0] * steps


@pytest.mark.parametrize("steps", [1, 781])
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_first_step_is_one_step_of_however_long_a_dispatch(
  steps, platform, monkeypatch
):
  program = Clock(monkeypatch, steps)
  device = {"device": "x", "platform": platform, "peak_bytes": 1}
  side = types.SimpleNamespace(device=lambda: device)
  monkeypatch.setattr(cell, "side_module", lambda _: side)
  monkeypatch.setattr(cell, "build", lambda *_: program)
  warm = iter([False, True])  # the second turn begins with a warm-up
  found = cell.measure_cell(make_cell(turns=2), lambda: next(warm))
  assert found["ms_per_step_turns"] == [250, 250]
  assert program.dispatches == 3 + 2 + 1
  assert found["first_step_seconds"] == pytest.approx(10.25)
  assert (found["host_ms_per_dispatch"] is None) == (platform == "cpu")


def rows_of(*, simkd: float) -> list[dict]:
  ms = {
    ("none", "jax"): 2.0,
    ("none", "eager"): 3.0,
    ("simkd", "jax"): simkd,
    ("simkd", "eager"): 12.0,
    ("simkd", "teacher"): 3.0,
  }
  return [
    {
      "cell": {"side": side, "work": {"method": method}},
      "result": {"ms_per_step": value, "devices": 2, "device": "cpu"},
    }
    for (method, side), value in ms.items()
  ]


def test_guard_keeps_a_history_and_compares(tmp_path, monkeypatch, capsys):
  history = tmp_path / "history.jsonl"
  result = {
    "commit": "0123456789abcdef",
    "date": "2026-01-01",
    "hardware": {"cpu": "x", "cores": 2, "load_average": [0, 0, 0]},
    "versions": {},
    "rows": rows_of(simkd=10.0),
  }

  def run(*arguments, load=0.1, **changes):
    found = {**result, **changes}
    monkeypatch.setattr(guard, "measure_cells", lambda *_: found)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    guard.main([*arguments, "--history", str(history)])
    return capsys.readouterr().out

  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
  assert "nothing to compare with" in run("--check")
  run()
  (line,) = history.read_text().splitlines()
  assert json.loads(line)["ratios"] == {
    "simkd / eager": 1.2,
    "none / eager": 1.5,
    "simkd / parts": 2.0,
  }
  assert "no worse than 0123456789ab" in run("--check")
  slower = {"rows": rows_of(simkd=12.0)}
  with pytest.raises(SystemExit) as stop:
    run("--check", **slower)
  first, second = str(stop.value).splitlines()
  assert first.startswith("simkd / eager: 1.000, worse by 20% than 1.200")
  assert second.startswith("simkd / parts: 2.400, worse by 20% than 2.000")
  run("--check", "--tolerance", "0.3", **slower)
  # Other hardware compares with nothing; a busy machine appends nothing.
  run("--check", hardware={**result["hardware"], "cores": 4}, **slower)
  with pytest.raises(
    SystemExit, match=r"busy: expected a load of at most 1\.0"
  ):
    run(load=1.5)
  broken = [*result["rows"]]
  broken[0] = {**broken[0], "result": {"error": "not run"}}
  with pytest.raises(SystemExit, match=r"none jax: expected.*more --seconds"):
    run("--check", rows=broken)
  assert len(history.read_text().splitlines()) == 1


def run_script(script: pathlib.Path, tmp_path, *pieces: str, **environment):
  """Runs a script whose Python writes its arguments and XLA_FLAGS down."""
  log, stub = tmp_path / "log", tmp_path / "python"
  log.unlink(missing_ok=True)
  stub.write_text(f'#!/bin/sh\necho "$@" "#$XLA_FLAGS" >> {log}\n')
  stub.chmod(0o755)
  done = subprocess.run(
    ["bash", str(script), *pieces],
    env={
      **ENVIRONMENT,
      "PYTHON": str(stub),
      "OUT": str(tmp_path / "out"),
      **environment,
    },
    capture_output=True,
    text=True,
    check=False,
  )
  lines = log.read_text().splitlines() if log.exists() else []
  return done, [line.split("#") for line in lines]


def test_gpu_pieces_ask_for_cells_that_exist(tmp_path):
  for small in ("", "1"):
    asked, profiles, limits, graphs = [], [], [], set()
    for piece in "123":
      done, lines = run_script(GPU, tmp_path, piece, SMALL=small)
      assert done.returncode == 0, done.stderr
      found = []
      for line, flags in lines:
        _, module, *arguments = line.split()
        graphs.add(flags.partition("command_buffer=")[2])
        if module == "benchmarks.profile_step":
          profiles.append(profile_step.parse(arguments))
        else:
          found.append(step.parse(arguments))
      limits.append(max(args.seconds for args in found))
      asked += found
    assert max(limits) <= 9 * 60 and sum(limits) <= 25 * 60
    assert len({args.out for args in asked}) == len(asked)
    cells = [cell for args in asked for cell in step.make_cells(args)]
    methods = {cell.work.method for cell in cells if cell.side == "jax"}
    assert methods == set(work_lib.methods())
    (asked_profile,) = profiles
    work = step.make_work(
      asked_profile.pair,
      asked_profile.method,
      asked_profile.batch,
      asked_profile,
    )
    assert work in [cell.work for cell in cells]
    assert graphs == {"", "+CONVOLUTION", "+CONVOLUTION,+WHILE"}
    if not small:
      found = {
        (f"{w.teacher}:{w.student}", w.batch, w.method, c.side)
        for c in cells
        for w in [c.work]
      }
      for work, method, side in itertools.product(
        speed_table.WORKS, work_lib.COMMON, speed_table.SIDES
      ):
        assert (*work, method, side) in found  # docs/speed.md's table
  # XLA ends a process for a flag that it does not know.
  subprocess.run(
    [sys.executable, "-c", "import jax; jax.jit(lambda x: x)(1)"],
    env={
      **ENVIRONMENT,
      "XLA_FLAGS": "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
    },
    check=True,
  )
  done, _ = run_script(GPU, tmp_path, "4")
  assert done.returncode == 2
  done, lines = run_script(GPU, tmp_path, "3", SECONDS_EACH="0")
  assert lines == [] and "not run, the piece's 0 s are over" in done.stderr


def test_the_cpu_script_asks_for_every_cell_of_the_table(tmp_path):
  done, lines = run_script(CPU, tmp_path)
  assert done.returncode == 0, done.stderr
  keys = []
  for line, flags in lines:
    _, module, *arguments = line.split()
    assert module == "benchmarks.step" and flags == speed_table.FLAGS
    for asked in step.make_cells(step.parse(arguments)):
      row = {"cell": asked.key, "result": {"platform": "cpu"}}
      keys.append(speed_table.key_of(row))
  assert len(set(keys)) == len(keys) and None not in keys
  for work in speed_table.WORKS:
    for method, side in itertools.product(work_lib.COMMON, speed_table.SIDES):
      assert (False, *work, method, side) in keys
  for method in work_lib.methods():
    assert (False, *speed_table.WORKS[0], method, "jax") in keys
  _, lines = run_script(CPU, tmp_path, "main")
  assert len(lines) == 1
  done, _ = run_script(CPU, tmp_path, "none")
  assert done.returncode == 2
