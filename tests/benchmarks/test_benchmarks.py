"""The benchmarks of a step: both sides are the same work, and say what is so.

How fast anything is, no test asserts.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
  cell,
  guard,
  image_loading,
  input_pipeline,
  jax_side,
  measure,
  profile_step,
  speed_table,
  step,
  torch_networks,
  torch_side,
)
from benchmarks import work as work_lib
from benchmarks.cell import SIDES, Cell
from kd_jax import data, models
from kd_jax.data import augment
from kd_jax.interop import pytorch

CPU = pathlib.Path(step.__file__).parent / "cpu.sh"
GPU = CPU.with_name("gpu.sh")
TINY = work_lib.Work(
  teacher="_tiny_wide",
  student="_tiny",
  method="kd",
  batch=8,
  image_size=16,
  classes=10,
  examples=32,
  pad=0,
  flip=False,
)
# No compiler of PyTorch's, which takes a minute, and no threads: the networks
# are too small for them.
ENVIRONMENT = {
  **os.environ,
  "JAX_PLATFORMS": "cpu",
  "OMP_NUM_THREADS": "1",
  "TORCH_COMPILE_DISABLE": "1",
}


def tiny(method: str, **changes) -> work_lib.Work:
  fields = {"k": 5} if method == "crd" else {}
  return dataclasses.replace(TINY, method=method, fields=fields, **changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("weights")
  work_lib.prepare([tiny(method) for method in work_lib.COMMON], folder)
  return folder


def torch_losses(work: work_lib.Work, weights, steps: int) -> list[float]:
  """Of the eager side's step, on the batches that kd_jax's pipeline has."""
  source = work.source
  eager = torch_side.Eager(work, weights, workers=0)
  pipeline = data.create(
    "device", source, batch_size=work.batch, seed=work_lib.SEED
  )
  found = []
  for _ in range(steps):
    index = np.array(pipeline.next_chunk(1)["index"][0])
    images = augment.normalize(
      jnp.asarray(source.images[index]), source.mean, source.std
    )
    batch = (
      torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))),
      torch.from_numpy(source.labels[index].astype(np.int64)),
      torch.from_numpy(index.astype(np.int64)),
    )
    found.append(eager.step(*batch)[0])
  return found


@pytest.mark.parametrize("method", ["none", "kd", "simkd"])
def test_sides_have_the_same_losses(method, weights, fast_compile):
  work = tiny(method)
  ours = jax_side.Program(work, weights).run(4)
  theirs = torch_losses(work, weights, 4)
  np.testing.assert_allclose(theirs, ours, rtol=1e-4)
  assert len(set(ours)) == 4  # it moves


def test_semckd_begins_with_the_same_loss(weights, fast_compile):
  work = tiny("semckd")
  ours = jax_side.Program(work, weights).run(1)
  np.testing.assert_allclose(torch_losses(work, weights, 1), ours, rtol=1e-4)


def test_crd_has_the_same_losses_of_the_same_negatives(weights, fast_compile):
  """The second and third step see the banks that those before have moved."""
  work = tiny("crd")
  source = work.source
  program = jax_side.Program(work, weights)
  eager = torch_side.Eager(work, weights, workers=0)
  step_ = jax.jit(program._alone)
  state, rng = program._state, np.random.default_rng(0)
  images = augment.normalize(
    jnp.asarray(source.images), source.mean, source.std
  )
  images = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))
  for _ in range(3):
    index = rng.choice(work.examples, work.batch, replace=False)
    negatives = rng.integers(work.examples, size=(work.batch, 5))
    batch = {
      "image": source.images[index],
      "label": source.labels[index],
      "index": index.astype(np.int32),
      "mask": np.ones(work.batch, bool),
      "negatives": negatives.astype(np.int32),
    }
    state, sums = step_(state, program._teacher_variables, batch)
    labels = source.labels[index].astype(np.int64)
    theirs, _ = eager.step(
      images[index], *map(torch.from_numpy, (labels, index, negatives))
    )
    ours = float(sums["loss"]) / work.batch
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)


def test_crd_contrasts_the_same_whichever_way(weights):
  """All negatives are drawn, so that it does not matter which way."""
  work = tiny("crd")
  torch.manual_seed(0)
  method = torch_side.Trainer(work, weights).method
  assert (method.bank_s != 0).any() and (method.class_count == 3).any()
  labels = torch.from_numpy(work.source.labels[:8].astype(np.int64))
  drawn = method._drawn(labels)
  assert drawn.shape == (8, 5)
  others = torch.from_numpy(work.source.labels)[drawn]
  assert (others != labels[:, None]).all()
  v = torch.nn.functional.normalize(torch.randn(8, 128))
  whole, gathered = (
    method._scores(v, method.bank_t, drawn, way) for way in (True, False)
  )
  torch.testing.assert_close(whole, gathered)
  before = method.bank_s.clone()
  index = torch.arange(8)
  method.remember((v, v, torch.tensor(2.0), torch.tensor(3.0), index))
  assert method.z_s == 2 and method.z_t == 3
  moved = (method.bank_s != before).any(dim=1)
  assert moved[:8].all() and not moved[8:].any()


def test_the_loader_goes_on_when_the_set_was_cut_short():
  """As a real one does: between epochs its workers and the device rest."""
  work = tiny("none")
  examples = torch_side.Examples(work, torch_side.arrays(work))
  assert len(examples) == 50_000
  pixels, label, i = examples[32 + 5]
  assert (label, i) == (work.source.labels[5], 5)
  torch.testing.assert_close(pixels, examples[5][0])
  assert tiny("none", image_size=224).epoch_examples == 1_281_167
  assert tiny("none", examples=60_000).epoch_examples == 60_000


def test_compiled_step_copies_no_constants(weights, monkeypatch):
  """CUDA graphs copy each input of another address: the whole set."""
  seen = []

  def backend(graph, inputs):
    del inputs
    for node in graph.graph.find_nodes(op="placeholder"):
      kind = node.meta["tensor_dict"].get("_dynamo_static_input_type")
      if kind is None:
        seen.append(node.meta["example_value"].shape)
    return graph

  compile_ = torch.compile
  monkeypatch.setattr(
    torch, "compile", lambda f, mode: compile_(f, backend=backend)
  )
  work = tiny("simkd", pad=4, flip=True)
  (loss,) = torch_side.Compiled(work, weights).run(1)
  assert np.isfinite(loss)
  assert seen == [(work.batch,)]  # of the inputs, the indices alone


@pytest.mark.parametrize("pair", [*work_lib.PAIRS, "ResNet50:ResNet18"])
def test_networks_have_the_same_tensors(pair):
  for name in pair.split(":"):
    expected = pytorch.tensor_shapes(
      name, 100, models.entry(name).weight_names[0]
    )
    with torch.device("meta"):
      found = torch_networks.create(name, 100).state_dict()
    counters = {n for n in found if n.endswith("num_batches_tracked")}
    shapes = {n: tuple(t.shape) for n, t in found.items() if n not in counters}
    assert shapes == dict(expected), name


@pytest.mark.parametrize("name", ["ShuffleV2_1_5", "vgg8", "ResNet18"])
def test_networks_compute_the_same(name, tmp_path, fast_compile):
  work = tiny("none", student=name, image_size=32)
  path = tmp_path / work.network_file("student")
  work_lib._save(path, work_lib._network(work, "student"))
  torch_networks.load(work, "student", tmp_path)  # which compares


def test_another_network_is_noticed(weights, tmp_path):
  work = tiny("none")
  name = work.network_file("student")
  arrays = work_lib.read(weights / name)
  arrays["layer1.0.conv1.weight"] *= 1.01
  np.savez(tmp_path / name, **arrays)
  with pytest.raises(ValueError, match=r"_tiny: expected the logits of kd_jax"):
    torch_networks.load(work, "student", tmp_path)


def test_refusals_say_what_to_do(weights):
  with pytest.raises(ValueError, match="method: expected one of none, kd"):
    tiny("nothing")
  with pytest.raises(ValueError, match=r"batch: expected 1 to 32 \(--examples"):
    tiny("kd", batch=64)
  with pytest.raises(ValueError, match=r"'wrn_16_1' on PyTorch's side.*jax"):
    torch_networks.create("wrn_16_1", 10)
  with pytest.raises(ValueError, match=r"methods none, kd,.* got at\. Leave"):
    torch_side.Trainer(tiny("at"), weights)
  with pytest.raises(ValueError, match="divisor of the 4 steps of an epoch"):
    jax_side.Program(tiny("kd"), weights, steps_per_dispatch=3)
  with pytest.raises(SystemExit, match="expected TEACHER:STUDENT, got 'vgg8'"):
    step.make_cells(step.parse(["--pairs", "vgg8"]))


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


# What each benchmark's file begins with.
HEAD = {"commit", "date", "hardware", "versions", "command", "xla_flags"}


def test_a_run_says_what_it_promises(tmp_path, monkeypatch, capsys):
  for name, value in {**ENVIRONMENT, "JAX_NUM_CPU_DEVICES": "2"}.items():
    monkeypatch.setenv(name, value)
  out = tmp_path / "step.json"
  arguments = [
    *("--pairs", "_tiny_wide:_tiny", "--methods", "simkd"),
    *("--batch", "8", "--steps", "3", "--turns", "2", "--examples", "32"),
    *("--image_size", "16", "--workers", "1", "--dtype", "float32"),
    *("--steps_per_dispatch", "2", "--weights", str(tmp_path / "weights")),
    *("--sides", *SIDES, "--out", str(out)),
  ]
  step.main(arguments)
  shown = capsys.readouterr().out
  result = json.loads(out.read_text())
  assert set(result) >= HEAD
  assert set(result["versions"]) == {"python", *measure.PACKAGES}
  assert [r["cell"]["side"] for r in result["rows"]] == list(SIDES)
  for row in result["rows"]:
    found, side = row["result"], row["cell"]["side"]
    assert "error" not in found, found
    turns = found["ms_per_step_turns"]
    assert len(turns) == 2
    assert found["ms_per_step_least"] == min(turns) > 0
    assert min(turns) <= found["ms_per_step"] <= max(turns)
    rate = 8 / found["ms_per_step"] * 1e3
    assert found["images_per_second"] == pytest.approx(rate)
    assert found["first_step_seconds"] > 0
    assert found["peak_bytes"] > 50e6 and found["peak_bytes_of"] == "process"
    assert found["share_of_peak"] is None  # no table has a CPU's
    assert found["host_ms_per_dispatch"] is None  # a CPU is busy with the step
    assert len(found["load_average"]) == 3
    assert np.isfinite(found["first_losses"]).all()
    ours = side in ("jax", "teacher")
    assert found["devices"] == (2 if ours else 1)
    assert f"{found['images_per_second']:,.0f}" in shown
  jax_row, eager, compiled, _ = (row["result"] for row in result["rows"])
  # Steps are rounded up to whole dispatches.
  assert jax_row["steps_per_turn"] == 4 and eager["steps_per_turn"] == 3
  assert jax_row["flops_per_step"] > 1e6
  assert eager["flops_per_step"] == jax_row["flops_per_step"]
  # Nearly the same: augmented otherwise.
  first = compiled["first_losses"][0]
  assert first == pytest.approx(jax_row["first_losses"][0], rel=0.2)


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


def make_cell(weights: str) -> Cell:
  work = tiny("kd", teacher="nobody")
  return Cell("jax", work, "float32", 0, 1, 1, 1, 0, weights)


def test_a_cell_that_breaks_or_is_late_leaves_the_others(tmp_path):
  cells = [make_cell(str(tmp_path / "weights"))]
  assert Cell.parse(json.dumps({**cells[0].key, "weights": "x"})).work == (
    cells[0].work
  )
  out = tmp_path / "out.json"
  result = step.measure_all(cells, out=out, seconds=100)
  (row,) = result["rows"]
  assert "unknown model 'nobody'" in row["result"]["error"]
  result = step.measure_all(cells, out=out, seconds=0)
  assert result["rows"][0]["result"] == {"error": step.NOT_RUN}
  assert step.NOT_RUN in step.report(json.loads(out.read_text()))


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(step, "_prepare", lambda cell, seconds: None)
  monkeypatch.setattr(
    step,
    "measure_in_processes",
    lambda cells, seconds: calls.extend(cells) or [dict(MADE_UP)] * len(cells),
  )
  monkeypatch.setattr(measure, "gpus", lambda: ["NVIDIA H200"])
  commits = iter(["a", "a", "b", "b-dirty", "b-dirty", "unknown", "unknown"])
  monkeypatch.setattr(measure, "commit", lambda: next(commits))
  made = []
  for _ in range(7):
    step.measure_all([make_cell("x")], out=tmp_path / "o.json", seconds=9)
    made.append(len(calls))
  assert made == [1, 1, 2, 3, 4, 5, 6]
  monkeypatch.setattr(measure, "commit", lambda: "a")
  for cards in (["NVIDIA H200"], ["NVIDIA H100 NVL"], [], []):
    monkeypatch.setattr(measure, "gpus", lambda cards=cards: cards)
    step.measure_all([make_cell("x")], out=tmp_path / "o.json", seconds=9)
    made.append(len(calls))
  assert made[7:] == [7, 8, 9, 9]
  monkeypatch.setenv("XLA_FLAGS", "--something")
  step.measure_all([make_cell("x")], out=tmp_path / "o.json", seconds=9)
  assert len(calls) == 10


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


def test_cells_of_a_work_take_turns(tmp_path, monkeypatch):
  turns = Turns({"jax": 2, "eager": 0, "teacher": 2})
  monkeypatch.setattr(step, "_start", turns.start)
  cells = [
    dataclasses.replace(make_cell("x"), side=side) for side in turns.turns
  ]
  results = step.measure_in_processes(cells, 9)
  assert [r["side"] for r in results] == ["jax", "eager", "teacher"]
  # Each warms up; then those that have not ended, in their order.
  assert turns.notes == [
    *("jax", "eager ends", "teacher", "jax", "teacher"),
    *("jax ends", "teacher ends"),
  ]


@pytest.mark.parametrize("options", [(), ("--by_turns",)])
def test_by_turns_is_by_work(options, tmp_path, monkeypatch, capsys):
  groups = []
  monkeypatch.setattr(step, "_prepare", lambda cell, seconds: None)

  def measured(cells, seconds):
    groups.append([f"{cell.work.method} {cell.side}" for cell in cells])
    return [dict(MADE_UP)] * len(cells)

  monkeypatch.setattr(step, "measure_in_processes", measured)
  step.main([
    *("--pairs", "_tiny_wide:_tiny", "--methods", "kd", "none", *options),
    *("--sides", "jax", "eager", "--batch", "8", "--dtype", "float32"),
    *("--out", str(tmp_path / "out.json")),
  ])  # fmt: skip
  capsys.readouterr()
  both = [["kd jax", "kd eager"], ["none jax", "none eager"]]
  assert groups == (
    both if options else [[name] for pair in both for name in pair]
  )


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
    ("time.sleep(99)", {"error": "not done in the 3 s that were left"}),
  ],
)
def test_a_process_waits_for_its_turns(last, result, tmp_path):
  (tmp_path / "waiting_program.py").write_text(WAITING + last)
  paths = [str(GPU.parent.parent), str(tmp_path)]
  environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
  with step._started(["waiting_program"], 3, environment) as process:
    process.wait()
    for warm in (False, True):
      assert process.result is None
      process.take_turn(warm)
    assert process.result == result


def test_a_process_ends_with_its_turns(tmp_path):
  """Its input at an end, a cell does not go on alone."""
  (tmp_path / "waiting_program.py").write_text(WAITING)
  done = subprocess.run(
    [sys.executable, str(tmp_path / "waiting_program.py")],
    env={**ENVIRONMENT, "PYTHONPATH": str(GPU.parent.parent)},
    input="\n",
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.splitlines() == [cell.READY, "warm: False", cell.READY]
  assert done.returncode == 1 and "expected a line" in done.stderr


def test_commands_are_told_without_the_machine(monkeypatch):
  monkeypatch.setattr(sys, "argv", [step.__file__, "--out", "x.json"])
  assert measure.command() == ["benchmarks/step.py", "--out", "x.json"]
  monkeypatch.setattr(sys, "argv", ["/elsewhere/pytest", "-q"])
  assert measure.command() == ["/elsewhere/pytest", "-q"]


def test_the_driver_names_the_cards(tmp_path, monkeypatch):
  stub = tmp_path / "nvidia-smi"
  monkeypatch.setenv("PATH", str(tmp_path))
  assert measure.hardware()["gpus"] == []
  stub.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA L4\n")
  stub.chmod(0o755)
  assert measure.hardware()["gpus"] == ["NVIDIA H200", "NVIDIA L4"]
  stub.write_text("#!/bin/sh\necho it failed to talk with the driver\nexit 9\n")
  assert measure.hardware()["gpus"] == []


def test_peaks_are_of_whole_names():
  assert measure.peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
  assert measure.peak("NVIDIA H200", "float32") == 494.7e12
  assert measure.peak("NVIDIA H100 PCIe", "float32") == 378e12
  for other in (
    *("NVIDIA L40S", "NVIDIA H100 NVL", "NVIDIA GH200 480GB"),
    *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu"),
  ):
    assert measure.peak(other, "float32") is None, other


class Clock:
  """A program whose steps take so many seconds, and its building ten."""

  def __init__(self, monkeypatch, steps: int, seconds: float):
    self.steps, self._seconds = steps, seconds
    self.host_seconds, self.dispatches = 0.0, 0
    self._now = 0.0
    monkeypatch.setattr(cell.time, "perf_counter", lambda: self._now)

  def run(self, steps: int) -> list[float]:
    self._now += steps * self._seconds + 10 * (not self.dispatches)
    self.host_seconds += 0.5 * steps / self.steps
    self.dispatches += steps // self.steps
    return [1.0] * steps


def test_a_turn_may_begin_with_a_dispatch_that_is_not_timed(monkeypatch):
  program = Clock(monkeypatch, 3, 0.25)
  device = {"device": "x", "platform": "cpu", "peak_bytes": 1}
  side = types.SimpleNamespace(device=lambda: device)
  monkeypatch.setattr(cell, "side_module", lambda _: side)
  monkeypatch.setattr(cell, "build", lambda *_: program)
  answers = iter([False, True])
  made = dataclasses.replace(make_cell("x"), devices=1, turns=2)
  found = cell.measure_cell(made, lambda: next(answers))
  assert found["ms_per_step_turns"] == [250, 250]
  assert program.dispatches == 3 + 2 + 1


@pytest.mark.parametrize("steps", [1, 781])
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_first_step_is_one_step_of_however_long_a_dispatch(
  steps, platform, monkeypatch
):
  program = Clock(monkeypatch, steps, 0.25)
  device = {"device": "x", "platform": platform, "peak_bytes": 1}
  side = types.SimpleNamespace(device=lambda: device)
  monkeypatch.setattr(cell, "side_module", lambda _: side)
  monkeypatch.setattr(cell, "build", lambda *_: program)
  found = cell.measure_cell(dataclasses.replace(make_cell("x"), devices=1))
  assert found["ms_per_step"] == 250
  assert found["first_step_seconds"] == pytest.approx(10.25)
  host = None if platform == "cpu" else pytest.approx(500)
  assert found["host_ms_per_dispatch"] == host


def rows_of(**ms: float) -> list[dict]:
  rows = []
  for name, value in ms.items():
    method, side = name.split("_")
    cell = {"side": side, "work": {"method": method}}
    result = {"ms_per_step": value, "devices": 2, "device": "cpu"}
    rows.append({"cell": cell, "result": result})
  return rows


ROWS = rows_of(
  none_jax=2.0, none_eager=3.0, simkd_jax=10.0, simkd_eager=12.0,
  simkd_teacher=3.0,
)  # fmt: skip


def test_guard_divides():
  assert guard.ratios(ROWS) == {
    "simkd / eager": 1.2,
    "none / eager": 1.5,
    "simkd / parts": 2.0,
  }
  broken = [*ROWS[1:], {**ROWS[0], "result": {"error": "not run"}}]
  with pytest.raises(SystemExit, match=r"none jax: expected.*more --seconds"):
    guard.ratios(broken)


def test_guard_keeps_a_history_and_compares(tmp_path, monkeypatch, capsys):
  history = tmp_path / "history.jsonl"
  result = {
    "commit": "0123456789abcdef",
    "date": "2026-01-01",
    "hardware": {"cpu": "x", "cores": 2, "load_average": [0, 0, 0]},
    "versions": {},
    "rows": ROWS,
  }
  monkeypatch.setattr(guard, "measure_cells", lambda args: result)
  monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
  guard.main(["--check", "--history", str(history)])
  assert "nothing to compare with" in capsys.readouterr().out
  guard.main(["--history", str(history)])
  (line,) = history.read_text().splitlines()
  assert json.loads(line)["ratios"]["simkd / parts"] == 2.0
  guard.main(["--check", "--history", str(history)])
  assert "no worse than 0123456789ab" in capsys.readouterr().out

  slower = {**result, "rows": rows_of(
    none_jax=2.0, none_eager=3.0, simkd_jax=12.0, simkd_eager=12.0,
    simkd_teacher=3.0,
  )}  # fmt: skip
  monkeypatch.setattr(guard, "measure_cells", lambda args: slower)
  with pytest.raises(SystemExit) as stop:
    guard.main(["--check", "--history", str(history)])
  assert str(stop.value).splitlines() == [
    "simkd / eager: 1.000, worse by 20% than 1.200 of 0123456789ab, and 15% are"
    " allowed",
    "simkd / parts: 2.400, worse by 20% than 2.000 of 0123456789ab, and 15% are"
    " allowed",
  ]
  guard.main(["--check", "--tolerance", "0.3", "--history", str(history)])
  # Other hardware compares with nothing; a busy machine appends nothing.
  other = {**slower, "hardware": {**result["hardware"], "cores": 4}}
  monkeypatch.setattr(guard, "measure_cells", lambda args: other)
  guard.main(["--check", "--history", str(history)])
  monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0, 0))
  with pytest.raises(SystemExit, match=r"busy: expected a load of at most 1.0"):
    guard.main(["--history", str(history)])
  assert len(history.read_text().splitlines()) == 1


def test_guard_asks_for_what_it_divides(monkeypatch, tmp_path):
  asked = []
  monkeypatch.setattr(
    step, "measure_all", lambda cells, **options: asked.extend(cells)
  )
  guard.measure_cells(guard.parse(["--weights", str(tmp_path)]))
  found = {(cell.work.method, cell.side) for cell in asked}
  assert found == {
    (r["cell"]["work"]["method"], r["cell"]["side"]) for r in ROWS
  }
  # kd_jax's on what a run takes, the frozen teacher's part as well.
  assert {c.side: c.devices for c in asked} == {
    "jax": 0, "teacher": 0, "eager": 1
  }  # fmt: skip


def run_gpu(
  tmp_path, python, *pieces: str, script: pathlib.Path = GPU, **environment: str
):
  return subprocess.run(
    ["bash", str(script), *pieces],
    env={
      **ENVIRONMENT,
      "PYTHON": str(python),
      "OUT": str(tmp_path / "out"),
      **environment,
    },
    capture_output=True,
    text=True,
    check=False,
  )


def test_gpu_pieces_ask_for_cells_that_exist(tmp_path):
  subprocess.run(["bash", "-n", str(GPU)], check=True)
  log = tmp_path / "log"
  profiles = []
  graphs = {}
  stub = tmp_path / "python"
  said = '"$@" "#$CUDA_MODULE_LOADING#$XLA_FLAGS"'
  stub.write_text(f"#!/bin/sh\necho {said} >> {log}\n")
  stub.chmod(0o755)

  def commands(*pieces: str, small: str):
    log.unlink(missing_ok=True)
    assert run_gpu(tmp_path, stub, *pieces, SMALL=small).returncode == 0
    for line in log.read_text().splitlines():
      line, loading, flags = line.split("#")
      dash, module, *arguments = line.split()
      assert dash == "-m"
      if "command_buffer" in flags:
        name = step.parse(arguments).out.rpartition("/")[2]
        graphs[name] = flags.rpartition("=")[2]
        assert loading == ("EAGER" if "eager" in name else "")
      if module == "benchmarks.profile_step":
        profiles.append(profile_step.parse(arguments))
      else:
        assert module == "benchmarks.step"
        yield step.parse(arguments)

  for small in ("", "1"):
    profiles.clear()
    pieces = [list(commands(piece, small=small)) for piece in "123"]
    (profile,) = profiles
    limits = [max(args.seconds for args in piece) for piece in pieces]
    assert max(limits) <= 9 * 60 and sum(limits) <= 25 * 60
    every = [args for piece in pieces for args in piece]
    assert len({args.out for args in every}) == len(every)
    assert len(list(commands(small=small))) == len(every)
    cells = [cell for args in every for cell in step.make_cells(args)]
    methods = {cell.work.method for cell in cells if cell.side == "jax"}
    assert methods == set(work_lib.methods())
    assert {cell.side for cell in cells} == set(SIDES[:3])
    bare, *again = (c for c in cells if not (c.work.pad or c.work.flip))
    assert again == [bare, bare]  # with convolutions in CUDA graphs
    whole = dataclasses.replace(bare.work, pad=4, flip=True)
    assert dataclasses.replace(bare, work=whole) in cells
    work = step.make_work(profile.pair, profile.method, profile.batch, profile)
    assert work in [cell.work for cell in cells]
    if not small:
      pairs = [*itertools.product(work_lib.PAIRS, (64, 256))]
      pairs.append(("ResNet50:ResNet18", 256))
      found = {
        (f"{w.teacher}:{w.student}", w.batch, w.method, c.side)
        for c in cells
        for w in [c.work]
      }
      for pair, method, side in itertools.product(
        pairs, work_lib.COMMON, SIDES[:3]
      ):
        assert (*pair, method, side) in found  # docs/speed.md's table
  assert graphs == {
    "graphs_none.json": "",
    "graphs_convolutions.json": "+CONVOLUTION",
    "graphs_convolutions_bare.json": "+CONVOLUTION",
    "graphs_convolutions_eager.json": "+CONVOLUTION",
    "graphs_loop.json": "+CONVOLUTION,+WHILE",
  }
  # XLA knows all of them: it ends a process for one that it does not.
  flag = f"--xla_gpu_enable_command_buffer={graphs['graphs_loop.json']}"
  subprocess.run(
    [sys.executable, "-c", "import jax; jax.jit(lambda x: x)(1)"],
    env={**ENVIRONMENT, "XLA_FLAGS": flag},
    check=True,
  )
  assert run_gpu(tmp_path, stub, "4").returncode == 2


def test_the_cpu_script_asks_for_every_cell_of_the_table(tmp_path):
  log = tmp_path / "log"
  stub = tmp_path / "python"
  stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
  stub.chmod(0o755)
  done = run_gpu(tmp_path, stub, script=CPU)
  assert done.returncode == 0, done.stderr
  keys = []
  for line in log.read_text().splitlines():
    dash, module, *arguments = line.split()
    assert (dash, module) == ("-m", "benchmarks.step")
    for asked in step.make_cells(step.parse(arguments)):
      row = {"cell": asked.key, "result": {"platform": "cpu"}}
      keys.append(speed_table.key_of(row))
  assert len(set(keys)) == len(keys) and None not in keys
  for work in speed_table.WORKS:
    for method, side in itertools.product(work_lib.COMMON, speed_table.SIDES):
      assert (False, *work, method, side) in keys
  for method in work_lib.methods():
    assert (False, *speed_table.WORKS[0], method, "jax") in keys
  log.unlink()
  assert run_gpu(tmp_path, stub, "main", script=CPU).returncode == 0
  assert len(log.read_text().splitlines()) == 1
  assert run_gpu(tmp_path, stub, "none", script=CPU).returncode == 2


def test_gpu_pieces_run_and_go_on(tmp_path):
  """Everything but the measurement itself, which is made up."""
  stub = tmp_path / "python"
  stub.write_text(f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(GPU.parent.parent)!r})
from benchmarks import measure, step
def measured(cells, seconds):
  print("measured\\n" * len(cells), end="", file=sys.stderr)
  return [{MADE_UP}] * len(cells)
step._prepare = lambda cell, seconds: None
step.measure_in_processes = measured
measure.commit = lambda: "a"
step.main(sys.argv[3:])
""")
  stub.chmod(0o755)
  done = run_gpu(tmp_path, stub, "1", SMALL="1")
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "out/main.json").read_text())["rows"]
  assert done.stderr.count("measured") == len(rows) == 20
  assert run_gpu(tmp_path, stub, "1", SMALL="1").stderr == ""
  over = run_gpu(tmp_path, stub, "3", SMALL="1", SECONDS_EACH="0")
  assert "methods: not run, the piece's 0 s are over" in over.stderr


def check_rates(row, line, key, turns):
  """That a row has each turn, their median and spread, and shows them."""
  shown = " ".join(line.split())
  found = row[f"{key}_turns"]
  assert len(found) == turns and min(found) > 0
  assert row[key] == np.median(found)
  least, most = row[f"{key}_least"], row[f"{key}_most"]
  assert (least, most) == (min(found), max(found))
  assert f" {row[key]:,.0f} {least:,.0f}-{most:,.0f}" in shown


@pytest.fixture
def coarse_clock(monkeypatch):
  """CPU seconds that go on by one a look: too few ticks for so little work."""
  seconds = itertools.count()
  monkeypatch.setattr(measure, "cpu_seconds", lambda: next(seconds))


def test_input_pipelines_beside_each_other(
  tmp_path, fast_compile, capsys, coarse_clock
):
  out = tmp_path / "input.json"
  input_pipeline.main(
    [
      *("--examples", "32", "--batch-size", "8", "--chunk", "2"),
      *("--repeats", "3", "--workers", "0", "--out", str(out)),
    ]
  )
  result = json.loads(out.read_text())
  assert set(result) >= HEAD
  assert {"jax", "grain", "torch"} < set(result["versions"])
  _, _, *lines, _ = capsys.readouterr().out.splitlines()
  assert len(result["rows"]) == len(lines) == 7
  for row, line in zip(result["rows"], lines, strict=True):
    assert line.startswith(row["pipeline"])
    assert len(row["load_average"]) == 3
    check_rates(row, line, "images_per_second", 3)
    check_rates(row, line, "images_per_cpu_second", 3)
    # An epoch is all of the 32 images, in a made-up second.
    assert row["images_per_cpu_second"] == 32


def test_the_loader_hands_over_every_image_of_an_epoch_once():
  source = data.load(
    "synthetic", split="train", num_examples=24, num_classes=4, image_size=16
  )
  seen = []
  for pixels, labels, index in input_pipeline.make_loader(source, 8, 0):
    assert pixels.shape == (8, 3, 16, 16) and pixels.dtype == torch.float32
    assert (labels.numpy() == source.labels[index]).all()
    seen += index.tolist()
  assert sorted(seen) == list(range(24))


def test_image_loaders_beside_each_other(
  tmp_path, monkeypatch, capsys, coarse_clock
):
  for i in range(2):
    Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
  monkeypatch.setattr(image_loading, "dali_is_installed", lambda: False)
  out = tmp_path / "loading.json"
  image_loading.main(
    [
      *("--data_dir", str(tmp_path), "--batch_size", "2", "--batches", "1"),
      *("--workers", "0", "--repeats", "3", "--out", str(out)),
    ]
  )
  result = json.loads(out.read_text())
  assert set(result) >= HEAD
  assert {"pillow", "grain", "torch"} < set(result["versions"])
  _, _, *lines, _ = capsys.readouterr().out.splitlines()
  names = [row["loader"] for row in result["rows"]]
  assert names == ["grain", "PyTorch, uint8", "PyTorch, float"]
  for row, line in zip(result["rows"], lines, strict=True):
    assert line.startswith(row["loader"])
    assert len(row["load_average_turns"]) == 3
    check_rates(row, line, "images_per_second", 3)
    check_rates(row, line, "images_per_cpu_second", 3)


PROGRAM = """HloModule jit_train_chunk

%fused.1 (a: f32[2,8,8,3], b: f32[3,3,3,4]) -> f32[2,8,8,4] {
  %a = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[3,3,3,4]{3,2,1,0} parameter(1)
  ROOT %conv.0 = f32[2,8,8,4]{3,2,1,0} convolution(%a, %b), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/jvp(Net)/conv_general_dilated"}
}

%stage.1 (a: f32[2,8,8,3], b: f32[3,3,3,4]) -> f32[2,4] {
  %dot.0 = f32[2,8,8,3]{3,2,1,0} dot(%a, %c), lhs_contracting_dims={3}
  %conv.5 = f32[2,8,8,4]{3,2,1,0} convolution(%dot.0, %b), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/Net/conv_general_dilated"}
}

%gemm.1 (a: f32[2,3]) -> f32[2,4] {
  %a.1 = f32[2,3]{1,0} parameter(0)
  ROOT %call.9 = f32[2,4]{1,0} custom-call(%a.1), \
custom_call_target="__cublas$gemm"
}

ENTRY %main (x: f32[2,8,8,3]) -> f32[2] {
  %x = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %ynn.1 = f32[2,8,8,4]{3,2,1,0} fusion(%x, %w), kind=kCustom, calls=%fused.1
  %conv.1 = f32[2,8,8,3]{3,2,1,0} convolution(%g, %w), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/transpose(jvp(Net))/conv_general_dilated"}
  %conv.2 = f32[3,3,3,4]{3,2,1,0} convolution(%x, %g), \
window={size=8x8 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %conv.3 = f32[3,3,3,4]{3,2,1,0} convolution(%x, %g), \
window={size=7x7 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf, \
metadata={op_name="jit(f)/transpose(jvp(Net))/conv_general_dilated"}
  %conv.4 = f32[2,8,8,4]{3,2,1,0} convolution(%x, %g), \
window={size=7x7 stride=2x2}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/jvp(Net)/conv_general_dilated"}
  %cudnn.1 = (f32[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), \
custom_call_target="__cudnn$convForward"
  %cudnn.2 = (f32[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), \
custom_call_target="__cudnn$convBackwardFilter"
  %cudnn.3 = (f32[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), \
custom_call_target="__cudnn$convBackwardInput"
  %ynn.2 = f32[2,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%stage.1
  %triton.1 = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%gemm.1
  %dot.1 = f32[2,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}
  %psum.1 = f32[4]{0} all-reduce(%a), channel_id=1, to_apply=%sum
  %transpose_copy_fusion = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused.7
  %copy.1 = f32[4]{0} copy(%a)
  %loop_convert_fusion = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused.8
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%d
}
"""
KINDS_OF_PROGRAM = {
  "ynn.1": "convolution",
  "conv.1": "input gradient",
  "conv.2": "kernel gradient",
  "conv.3": "kernel gradient",
  "conv.4": "convolution",
  "cudnn.1": "convolution",
  "cudnn.2": "kernel gradient",
  "cudnn.3": "input gradient",
  "ynn.2": "convolution",
  "triton.1": "matrix product",
  "dot.1": "matrix product",
  "psum.1": "collective",
  "transpose_copy_fusion": "transpose, copy",
  "copy.1": "transpose, copy",
  "loop_convert_fusion": "other",
  "while.1": None,
}


def test_profile_tells_the_kinds_of_operations():
  kinds = profile_step.kinds_of(PROGRAM)
  assert {name: kinds[name] for name in KINDS_OF_PROGRAM} == KINDS_OF_PROGRAM


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("sm90_xmma_fprop_implicit_gemm_bf16", "convolution"),
    ("sm80_xmma_wgrad_implicit_gemm_indexed", "kernel gradient"),
    ("cudnn::dgrad2d_grouped_direct_kernel", "input gradient"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "collective"),
    ("MemcpyD2D", "transpose, copy"),
    ("loop_transpose_fusion", "transpose, copy"),
    ("nvjet_hsh_128x64_gemm", "matrix product"),
    ("input_convert_reduce_fusion_2", "other"),
  ],
)
def test_profile_tells_the_kinds_of_kernels(name, kind):
  assert profile_step.kind_of_name(name) == kind


def test_profile_adds_up_a_step_and_device():
  ms = 1_000_000
  events = [
    profile_step.Event("ynn.1", "x", 0, 6 * ms),
    profile_step.Event("ynn.1", "x", 6 * ms, 2 * ms),
    profile_step.Event("while.1", "x", 0, 90 * ms),
    profile_step.Event("command_buffer", "ncclKernel", 9 * ms, 8 * ms),
  ]
  kinds, operations = profile_step.add_up(events, KINDS_OF_PROGRAM, times=4)
  found = {row["kind"]: row for row in kinds}
  assert tuple(found) == profile_step.KINDS
  assert found["convolution"] == {
    "kind": "convolution",
    "ms": 2.0,
    "count": 0.5,
    "share": 0.5,
  }
  assert found["collective"]["ms"] == 2.0 and found["other"]["ms"] == 0
  assert [row["operation"] for row in operations] == ["ynn.1", "ncclKernel"]


def test_idle_is_when_nothing_ran():
  spans = [(5, 1), (0, 3), (1, 1), (2, 2)]
  events = [profile_step.Event("", "", *span) for span in spans]
  assert profile_step.idle_share(events) == pytest.approx(1 / 6)
  assert profile_step.idle_share(events[1:]) == 0


def test_profile_reads_the_streams_of_a_gpu(tmp_path, monkeypatch):
  def line(name, *events):
    fields = ("name", "start_ns", "duration_ns", "stats")
    events = [
      types.SimpleNamespace(**dict(zip(fields, event, strict=True)))
      for event in events
    ]
    return types.SimpleNamespace(name=name, events=events)

  planes = [
    types.SimpleNamespace(
      name="/host:CPU", lines=[line("python", ("f", 0, 9, {"hlo_op": "a"}))]
    ),
    types.SimpleNamespace(
      name="/device:GPU:0",
      lines=[
        line(
          "Stream #13(Compute)",
          ("kernel", 1, 2, {"hlo_op": "fusion.1"}),
          ("MemcpyD2D", 3, 4, {}),
        ),
        line("XLA Modules", ("jit_train_chunk", 0, 9, {})),
      ],
    ),
  ]
  seen = []

  def from_file(path):
    seen.append(path)
    return types.SimpleNamespace(planes=planes)

  reader = types.SimpleNamespace(from_file=from_file)
  monkeypatch.setattr(jax.profiler, "ProfileData", reader)
  (tmp_path / "plugins").mkdir()
  path = tmp_path / "plugins/a.xplane.pb"
  path.touch()
  assert profile_step.events_of(tmp_path) == (
    [("fusion.1", "kernel", 1, 2), ("", "MemcpyD2D", 3, 4)],
    True,
  )
  assert seen == [str(path)]
  del planes[1]
  assert profile_step.events_of(tmp_path) == ([("a", "f", 0, 9)], False)


def test_a_profile_of_a_step(tmp_path, capsys):
  out = tmp_path / "profile.json"
  profile_step.main(
    [
      *("--pair", "_tiny_wide:_tiny", "--method", "kd", "--batch", "8"),
      *("--examples", "32", "--image_size", "16", "--devices", "2"),
      *("--steps", "2", "--longest", "3"),
      *("--weights", str(tmp_path / "weights"), "--out", str(out)),
    ]
  )
  result = json.loads(out.read_text())
  assert set(result) >= HEAD
  assert (result["steps"], result["devices"]) == (2, 2)
  kinds = {row["kind"]: row for row in result["kinds"]}
  assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
  # 1x1 convolutions are matrix products on a CPU.
  images = jnp.zeros((1, 16, 16, 3))
  shapes = [
    jax.eval_shape(
      functools.partial(models.create(name, 10).init, train=False),
      jax.random.key(0),
      images,
    )
    for name in ("_tiny_wide", "_tiny")
  ]
  kernels = [leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim == 4]
  wide = [shape for shape in kernels if shape[0] == 3]
  assert kinds["convolution"]["count"] == len(wide)
  first, head, *lines = capsys.readouterr().out.splitlines()
  assert first.startswith(f"{result['ms_per_step']:.2f} ms a step")
  assert head.split() == ["kind", "ms", "share", "count"]
  assert [line.split("  ")[0] for line in lines[:7]] == list(kinds)
