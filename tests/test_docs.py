"""The documents under docs/: their commands parse, their scripts run."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kd_jax import models
from kd_jax.interop import card as card_lib
from kd_jax.interop import conversion, files, formats, opening, pytorch, store

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
  for name, text in SCRIPTS.items():
    code = ast.parse(text).body
    imports = [s for s in code if isinstance(s, ast.Import | ast.ImportFrom)]
    # One of them has to write a whole network down.
    assert len(code) - len(imports) <= (13 if "torch" in name else 10)


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
  model = store.load(smoke_run("simkd_cifar"))
  formats.save(model, tmp_path / "student.stablehlo")
  printed = run("predict.py", "student.stablehlo", *pictures, folder=tmp_path)
  assert printed == classes(model, pictures)


def test_arrays(smoke_run, tmp_path):
  folder = smoke_run("simkd_cifar") / "export"
  shutil.copytree(folder, tmp_path / "export")
  card = card_lib.read_card(folder)
  printed = run("arrays.py", "export", folder=tmp_path)
  mean = card["normalization"]["mean"]
  assert printed == f"resnet8 {card['parameters']} {mean}\n"


def test_state_dicts(tmp_path, pictures):
  network = models.create("vgg8", 100)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: (
      rng.uniform(0.1, 1, x.shape).astype(np.float32) - (x.ndim > 1) / 2
    ),
    shapes,
  )
  tensors = pytorch.to_state_dict("vgg8", variables)
  files.write(tmp_path / "theirs.npz", {"model": tensors})
  for path in pictures:
    Image.open(path).resize((32, 32)).save(path)
  conversion.convert(tmp_path / "theirs.npz", tmp_path / "vgg8.pth")
  model = opening.open_model(tmp_path / "vgg8.pth")
  assert model.card["normalization"]["mean"] == [0.5071, 0.4867, 0.4408]
  printed = run("torch_predict.py", "vgg8.pth", *pictures, folder=tmp_path)
  assert printed == classes(model, pictures)
