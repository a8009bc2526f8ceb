"""Runs and analyses that nobody has trained."""

import json

import numpy as np
import pytest

from kd_jax.reporting import analysis


@pytest.fixture
def keep(write):
  """keep(folder, top1, **more): a finished run with its environment."""

  def make(folder, *arguments, command=("launch.py",), **more):
    write(folder, *arguments, **more)
    environment = {"command": command, "versions": {"jax": "1.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))

  return make


@pytest.fixture
def runs(tmp_path, write):
  """Three trials alone and with KD, one of another temperature, a teacher."""
  folder = tmp_path / "runs"
  teacher = {"name": "resnet32x4", "checkpoint": "x"}
  kd = {"method": "kd", "teacher": teacher, "distiller_parameters": 1234}
  for seed in range(3):
    name = f"_seed{seed}" if seed else ""
    alone = {"seed": seed, "seconds": 10.0 + seed, "age": 20}
    write(folder / f"alone{name}", (70.0, 70.5, 71.75)[seed], **alone)
    write(
      folder / f"kd{name}", (74.0, 74.25, 74.0)[seed], seed=seed, **kd, age=9
    )
  hot = {"distiller": {"name": "kd", "temperature": 8.0}}
  write(folder / "hot", 60.0, **kd, age=1, changes=hot)
  wide = {"student": "resnet32x4", "parameters": 7}
  write(folder / "teachers" / "x", 79.0, **wide, age=0, evals=4)
  (folder / "unfinished").mkdir()
  (folder / "unfinished" / "config.json").write_text("{}")
  return folder


@pytest.fixture
def pairs():
  """A teacher with three students of ten classes, one of them in two trials."""
  rng = np.random.default_rng(0)
  students = {
    name: analysis.Student(
      agreement=np.array(agreement),
      distances=np.full(len(agreement), 0.25),
      difference=np.full((10, 10), 0.25 * i),
      points=rng.normal(size=(35, 2)),
    )
    for i, (name, agreement) in enumerate(
      {"none": [70.0], "kd": [80.0, 90.0], "simkd (factor=2)": [95.0]}.items()
    )
  }
  labels, names = np.repeat(np.arange(7), 5), {k: f"<{k}>" for k in range(7)}
  points = rng.normal(size=(35, 2))
  pair = analysis.Pair("resnet32x4", points, labels, names, students)
  return {("cifar100", "resnet8x4", "resnet32x4"): pair}
