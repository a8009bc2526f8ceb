"""Evaluating an export: the run's own figures, from another process."""

import math
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kd_jax import data, models
from kd_jax.cli import evaluate
from kd_jax.interop import files, pytorch, store
from kd_jax.runs import workdir

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def simkd(smoke_run):
  return smoke_run("simkd_cifar")


@pytest.fixture
def source():
  return data.load("synthetic", split="test", image_size=16, num_examples=64)


def test_figures_are_the_runs(simkd, source):
  got = evaluate.evaluate(store.load(simkd), source)
  best = workdir.result(simkd)["best"]
  assert got["examples"] == 64
  for name in ("top1", "top5"):
    assert got[name] == best[name]
  assert got["ce"] == pytest.approx(best["ce"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100])
def test_every_example_counts_once(simkd, source, batch_size):
  model = store.load(simkd)
  first = [getattr(source, name)[:10] for name in ("images", "labels")]
  few = data.Source(
    *first,
    num_classes=10,
    class_names=source.class_names,
    mean=source.mean,
    std=source.std,
    name="few",
  )
  logits = np.asarray(model.logits(few.images), np.float64)
  logits -= logits.max(1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  got = evaluate.evaluate(model, few, batch_size=batch_size)
  rows = np.arange(10)
  assert got["ce"] == pytest.approx(-log_p[rows, few.labels].mean(), rel=1e-5)
  hits = logits.argmax(1) == few.labels
  assert got["top1"] == pytest.approx(100 * hits.mean())
  assert got["examples"] == 10


def test_a_fresh_process_prints_the_runs_figures(simkd, source, tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "kd_jax", "evaluate", "--model", str(simkd)],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  best = workdir.result(simkd)["best"]
  assert process.stdout == (
    "resnet8 on synthetic (test, 64 images): top-1"
    f" {best['top1']:.2f} %, top-5 {best['top5']:.2f} %, cross-entropy"
    f" {best['ce']:.4f}, calibration error"
    f" {evaluate.evaluate(store.load(simkd), source)['ece']:.2f} %\n"
  )


def test_command_line_on_the_training_set(simkd, run_main, capsys):
  arguments = ("--model", simkd / "export", "--split", "train")
  assert run_main(evaluate, *arguments, "--batch_size", "64") == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on synthetic (train, 64 images): top-1 ")
  assert math.isfinite(float(printed.split()[-2]))


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--data", "cifar"), "Unknown data source 'cifar'. Did you mean cifar10"),
    (("--data", "."), "expected one data set, cifar-10-batches-py, cifar-100"),
    (
      ("--data", "cifar100", "--data_dir", "/no/such"),
      "No cifar100 data: expected the folder cifar-100-python",
    ),
    (("--batch_size", "0"), "batch_size"),
    (("--split", "valid"), "invalid choice: 'valid'"),
    (("--model", "/no/such"), "/no/such does not exist: expected the workdir"),
  ],
)
def test_command_line_errors(simkd, arguments, words, run_main, capsys):
  assert run_main(evaluate, "--model", simkd, *arguments) == 2
  output = capsys.readouterr()
  assert words in output.err
  assert output.out == ""


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"image_size": 16, "num_classes": 5}, "classes: the model takes 10, syn"),
    (
      {"image_size": 8},
      r"image shape: the model takes \[16, 16, 3\], synthetic has \[8, 8, 3\]\."
      " It was trained on synthetic; choose data like it",
    ),
  ],
)
def test_other_data_is_refused(simkd, options, words):
  source = data.load("synthetic", split="test", num_examples=10, **options)
  with pytest.raises(ValueError, match=words):
    evaluate.evaluate(store.load(simkd), source)


# Of other models and other data.


def test_calibration_and_agreement(simkd, kd, source):
  """Against the definitions, spelled out."""
  model, teacher = store.load(simkd), store.load(kd)
  got = evaluate.evaluate(model, source, teacher=teacher, batch_size=10)
  ours = np.asarray(jax.nn.softmax(model.logits(source.images)), np.float64)
  theirs = np.asarray(teacher.logits(source.images)).argmax(1)
  chosen, confidence = ours.argmax(1), ours.max(1)
  correct = chosen == source.labels
  ece = 0.0
  for i in range(15):
    inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
    if inside.any():
      gap = correct[inside].mean() - confidence[inside].mean()
      ece += inside.mean() * abs(gap)
  assert got["ece"] == pytest.approx(100 * ece, rel=1e-4)
  assert got["agreement"] == pytest.approx(100 * (chosen == theirs).mean())
  assert got["teacher_top1"] == pytest.approx(
    100 * (theirs == source.labels).mean()
  )
  assert got["agreement"] < 100


@pytest.fixture
def kd(smoke_run):
  return smoke_run("kd_cifar")


def test_a_file_of_weights_on_a_folder_of_cifars_layout(
  tmp_path, run_main, capsys
):
  """A model of each kind, told apart by its tensors, and its teacher."""
  rng = np.random.default_rng(0)
  folder = tmp_path / "data" / "cifar-100-python"
  folder.mkdir(parents=True)
  names = [f"class {i}" for i in range(100)]
  (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
  labels = rng.integers(0, 100, 20).tolist()
  rows = rng.integers(0, 256, (20, 3072), np.uint8)
  content = pickle.dumps({"data": rows, "fine_labels": labels})
  (folder / "test").write_bytes(content)
  (folder / "train").write_bytes(content)
  for name in ("resnet8", "resnet14"):
    shapes = jax.eval_shape(
      models.create(name, 100).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    arrays = jax.tree.map(
      lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32), shapes
    )
    tensors = pytorch.to_state_dict(name, arrays)
    files.write(tmp_path / f"{name}.npz", {"model": tensors})
  arguments = (
    *("--model", tmp_path / "resnet8.npz", "--model_name", "resnet8"),
    *("--data", tmp_path / "data", "--batch_size", 7),
    *("--teacher", tmp_path / "resnet14.npz"),
  )
  assert run_main(evaluate, *arguments) == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on cifar100 (test, 20 images): top-1 ")
  assert ", agreement with resnet14 (top-1 " in printed
  wrong = (*arguments[:2], "--model_name", "vgg8", *arguments[4:])
  assert run_main(evaluate, *wrong) == 2
  assert "It looks like resnet8 with 100 classes" in capsys.readouterr().err


def test_a_file_of_weights_on_a_folder_of_images(
  tmp_path, run_main, capsys, fast_compile
):
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for name in ("n01", "n02", "n03"):
      (tmp_path / "data" / split / name).mkdir(parents=True)
      for i in range(2):
        picture = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
        picture.save(tmp_path / "data" / split / name / f"{i}.JPEG")
  broken = tmp_path / "data" / "val" / "n02" / "0.JPEG"
  network = models.create("resnet8", 3)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)
  arrays = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes)
  path = tmp_path / "weights.safetensors"
  files.write(path, {"model": pytorch.to_state_dict("resnet8", arrays)})
  arguments = (
    *("--model", path, "--data", tmp_path / "data"),
    *("--image_size", 32, "--resize", 36),
  )
  assert run_main(evaluate, *arguments) == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on folder (test, 6 images): top-1 ")
  broken.write_bytes(broken.read_bytes()[:100])
  assert run_main(evaluate, *arguments) == 2
  assert str(broken) in capsys.readouterr().err
  assert run_main(evaluate, *arguments, "--on_bad_image", "skip") == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on folder (test, 5 images): top-1 ")
