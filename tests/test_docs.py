"""The documents under docs/: their commands parse, their scripts run."""

import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from kd_jax import convert, export, inference

REPO = pathlib.Path(__file__).resolve().parent.parent
MODELS = (REPO / "docs" / "models.md").read_text(encoding="utf-8")
SCRIPTS = dict(
  re.findall(r"```python\n# (\w+\.py):[^\n]*\n(.*?)```", MODELS, re.S)
)


def run(script, *arguments, folder):
  """What a documented script prints, where kd_jax cannot be imported."""
  (folder / script).write_text(SCRIPTS[script])
  finder = subprocess.run(
    [sys.executable, "-I", "-c", "import kd_jax"],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  assert "No module named 'kd_jax'" in finder.stderr, (
    "this environment has kd_jax installed; run the tests in one that has not"
  )
  process = subprocess.run(
    [sys.executable, "-I", script, *map(str, arguments)],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  return process.stdout


def test_scripts_are_short():
  assert set(SCRIPTS) == {"predict.py", "arrays.py", "torch_predict.py"}
  for text in SCRIPTS.values():
    code = [line for line in text.splitlines() if line.strip()]
    imports = [line for line in code if re.match(r"(import|from) ", line)]
    assert len(code) - len(imports) <= 10


@pytest.fixture
def pictures(tmp_path):
  rng = np.random.default_rng(0)
  paths = [tmp_path / f"{i}.png" for i in range(3)]
  for path in paths:
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(path)
  return paths


def classes(model, pictures):
  images = [np.asarray(Image.open(path)) for path in pictures]
  logits = np.asarray(model.logits(np.stack(images)))
  return " ".join(map(str, logits.argmax(1))) + "\n"


def test_programs(smoke_run, tmp_path, pictures):
  model = export.load(smoke_run("simkd_cifar"))
  export.save(model, tmp_path / "student.stablehlo")
  printed = run("predict.py", "student.stablehlo", *pictures, folder=tmp_path)
  assert printed == classes(model, pictures)


def test_arrays(smoke_run, tmp_path):
  folder = smoke_run("simkd_cifar") / "export"
  shutil.copytree(folder, tmp_path / "export")
  card = export.read_card(folder)
  printed = run("arrays.py", "export", folder=tmp_path)
  mean = card["normalization"]["mean"]
  assert printed == f"resnet8 {card['parameters']} {mean}\n"


def test_state_dicts(tmp_path, pictures):
  import torchvision

  torch.manual_seed(0)
  network = torchvision.models.resnet18(num_classes=10)
  torch.save(network.state_dict(), tmp_path / "theirs.pth")
  model = convert.open_model(
    tmp_path / "theirs.pth",
    model_name="ResNet18",
    origin=convert.Origin("cifar10"),
  )
  convert.convert(
    tmp_path / "theirs.pth", tmp_path / "ours.pth", model_name="ResNet18"
  )
  for path in pictures:
    Image.open(path).resize((224, 224)).save(path)
  card = {
    **model.card,
    "normalization": export.normalization(
      (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
  }
  printed = run("torch_predict.py", "ours.pth", *pictures, folder=tmp_path)
  model = inference.Model(card, jax.tree.map(np.asarray, model.variables))
  assert printed == classes(model, pictures)
