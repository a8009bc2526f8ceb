"""The commands evaluate, predict, export and convert, as typed."""

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from kd_jax import data, models
from kd_jax.cli import convert, evaluate, export, predict
from kd_jax.interop import card as card_lib
from kd_jax.interop import files, formats, pytorch, scoring, store
from kd_jax.interop import model as model_lib

DATA = {"image_size": 16, "num_examples": 20}


def random_variables(name, num_classes, size=32):
  rng = np.random.default_rng(0)
  network = models.create(name, num_classes)
  return jax.tree.map(
    lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32),
    model_lib.variable_shapes(network, (size, size, 3)),
  )


def write_weights(path, name, num_classes):
  """A file of weights of a network that nobody has trained."""
  variables = random_variables(name, num_classes)
  files.write(path, {"model": pytorch.to_state_dict(name, variables)})
  return path


@pytest.fixture
def source():
  return data.load("synthetic", split="test", **DATA)


@pytest.fixture
def model(source, tmp_path):
  """An export for synthetic images."""
  card = card_lib.make(
    "_tiny",
    num_classes=10,
    image_shape=source.image_shape,
    class_names=source.class_names,
    mean=source.mean,
    std=source.std,
    trained_on="synthetic",
    data_options=DATA,
  )
  variables = random_variables("_tiny", 10, 16)
  formats.save(model_lib.Model(card, variables), tmp_path / "model")
  return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path):
  """Pictures three times as wide as high, and a model that saw 16 pixels."""
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      (tmp_path / "data" / split / name).mkdir(parents=True)
      for i in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (18, 54, 3), np.uint8))
        picture.save(tmp_path / "data" / split / name / f"{i}.png")
  source = data.load(
    "folder", split="test", dir=tmp_path / "data", image_size=16, resize=18
  )
  card = card_lib.make(
    "_tiny",
    num_classes=2,
    image_shape=source.image_shape,
    class_names=source.class_names,
    mean=source.mean,
    std=source.std,
    trained_on="folder",
    data_options={"image_size": 16, "resize": 18},
    resize=18,
  )
  model = model_lib.Model(card, random_variables("_tiny", 2, 16))
  formats.save(model, tmp_path / "model")
  return tmp_path / "data", model, source


def test_every_form_of_naming_the_data_gives_the_same(
  pictures, tmp_path, run_main, capsys
):
  folder, model, source = pictures
  scores = scoring.evaluate(model, source)
  named = ("--data", "folder", "--data_dir", folder)
  for arguments in (
    *(named, ("--data", folder), ("--data_dir", folder)),
    ("--data", folder, "--resize", 18),
    (*named, "--image_size", 16, "--resize", 18),
  ):
    assert run_main(evaluate, "--model", tmp_path / "model", *arguments) == 0
    printed = capsys.readouterr().out
    assert f"cross-entropy {scores['ce']:.4f}" in printed
  arguments = ("--model", tmp_path / "model", "--data", folder, "--resize", 30)
  assert run_main(evaluate, *arguments) == 0
  assert f"cross-entropy {scores['ce']:.4f}" not in capsys.readouterr().out


def test_evaluate_on_classes_in_another_order(
  pictures, tmp_path, run_main, capsys
):
  folder, model, source = pictures
  scores = scoring.evaluate(model, source)
  for split in ("train", "val"):
    (folder / split / "cat").rename(folder / split / "Cat")
    (folder / split / "dog").rename(folder / split / "DOG")
  arguments = ("--model", tmp_path / "model", "--data", folder)
  assert run_main(evaluate, *arguments) == 0
  assert f"cross-entropy {scores['ce']:.4f}" in capsys.readouterr().out
  for split in ("train", "val"):
    (folder / split / "DOG").rename(folder / split / "wolf")
  assert run_main(evaluate, *arguments) == 2
  assert "1 of 2 that differ (1: 'dog' and 'wolf')" in capsys.readouterr().err


def test_predict_sees_what_evaluation_sees(
  pictures, tmp_path, run_main, capsys, monkeypatch
):
  monkeypatch.setattr(predict, "_BATCH", 3)
  folder, model, source = pictures
  bad = folder / "val" / "dog" / "1.png"
  bad.write_bytes(b"not an image")
  arguments = ("--model", tmp_path / "model", folder / "val")
  assert run_main(predict, *arguments) == 1
  output = capsys.readouterr()
  assert str(bad) in output.err and output.err.count("\n") == 1
  (batch,) = data.eval_stream(
    dataclasses.replace(source, on_bad_image="skip"), 8
  )
  answers = scoring.top_classes(model, batch["image"])
  assert output.out.splitlines() == [
    f"{path}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in best)}"
    for path, best in zip(source.paths, answers, strict=True)
    if path != str(bad)
  ]


def test_evaluate_in_a_fresh_process(model, source, repo, tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "kd_jax", "evaluate", "--model", str(model)],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  scores = scoring.evaluate(store.load(model), source)
  assert process.stdout == (
    f"_tiny on synthetic (test, 20 images): top-1 {scores['top1']:.2f} %, top-5"
    f" {scores['top5']:.2f} %, cross-entropy {scores['ce']:.4f}, calibration"
    f" error {scores['ece']:.2f} %\n"
  )


def test_evaluate_on_the_training_set(model, run_main, capsys):
  arguments = ("--model", model, "--split", "train", "--batch_size", "7")
  assert run_main(evaluate, *arguments) == 0
  assert "_tiny on synthetic (train, 20 images)" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--data", "cifar"), "'cifar'. Did you mean cifar10"),
    (("--data", "."), "expected one data set, cifar-10-batches-py, cifar-100"),
    (("--data", "cifar100", "--data_dir", "/no/such"), "cifar-100-python"),
    (("--batch_size", "0"), "batch_size"),
    (("--image_size", "0"), "--image_size: expected 1 or more, got 0"),
    (("--split", "valid"), "invalid choice: 'valid'"),
    (("--model", "/no/such"), "/no/such does not exist: expected the workdir"),
  ],
)
def test_errors_of_evaluate(model, arguments, words, run_main, capsys):
  assert run_main(evaluate, "--model", model, *arguments) == 2
  output = capsys.readouterr()
  assert words in output.err
  assert output.out == ""


def test_evaluate_weights_on_a_folder_of_cifars_layout(
  tmp_path, run_main, capsys
):
  rng = np.random.default_rng(0)
  folder = tmp_path / "data" / "cifar-100-python"
  folder.mkdir(parents=True)
  names = [f"class {i}" for i in range(100)]
  (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
  labels = rng.integers(0, 100, 20).tolist()
  rows = rng.integers(0, 256, (20, 3072), np.uint8)
  for split in ("test", "train"):
    content = pickle.dumps({"data": rows, "fine_labels": labels})
    (folder / split).write_bytes(content)
  arguments = (
    *("--model", write_weights(tmp_path / "a.npz", "resnet8", 100)),
    *("--teacher", write_weights(tmp_path / "b.npz", "resnet14", 100)),
    *("--data", tmp_path / "data", "--batch_size", 7),
  )
  assert run_main(evaluate, *arguments, "--model_name", "resnet8") == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on cifar100 (test, 20 images): top-1 ")
  assert ", agreement with resnet14 (top-1 " in printed
  assert run_main(evaluate, *arguments, "--model_name", "vgg8") == 2
  assert "It looks like resnet8 with 100 classes" in capsys.readouterr().err


def test_evaluate_on_a_folder_of_images(tmp_path, run_main, capsys):
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for name in ("n01", "n02", "n03"):
      (tmp_path / "data" / split / name).mkdir(parents=True)
      for i in range(2):
        picture = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
        picture.save(tmp_path / "data" / split / name / f"{i}.JPEG")
  broken = tmp_path / "data" / "val" / "n02" / "0.JPEG"
  weights = write_weights(tmp_path / "weights.npz", "resnet8", 3)
  arguments = (
    *("--model", weights, "--data", tmp_path / "data"),
    *("--image_size", 32, "--resize", 36),
  )
  assert run_main(evaluate, *arguments) == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on folder (test, 6 images): top-1 ")
  assert "top-5" not in printed  # of three classes
  broken.write_bytes(broken.read_bytes()[:100])
  assert run_main(evaluate, *arguments) == 2
  assert str(broken) in capsys.readouterr().err
  assert run_main(evaluate, *arguments, "--on_bad_image", "skip") == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on folder (test, 5 images): top-1 ")
  # Nobody can tell which data these three classes are of.
  assert run_main(predict, "--model", weights, broken) == 2
  assert "resnet8 with 3 classes: the file does" in capsys.readouterr().err


def test_predict(model, source, tmp_path, run_main, capsys):
  paths = [tmp_path / f"{i}.png" for i in range(3)]
  for path, image in zip(paths, source.images, strict=False):
    Image.fromarray(image).save(path)
  assert run_main(predict, "--model", model, *paths) == 0
  answers = scoring.top_classes(store.load(model), source.images[:3])
  assert capsys.readouterr().out.splitlines() == [
    f"{path}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in best)}"
    for path, best in zip(paths, answers, strict=True)
  ]


def test_errors_of_predict(model, tmp_path, run_main, capsys):
  path, picture = tmp_path / "x.png", tmp_path / "good.png"
  path.write_bytes(b"not an image")
  Image.new("RGB", (16, 16)).save(picture)
  stranger = tmp_path / "stranger"
  stranger.mkdir()
  (stranger / "checkpoint").symlink_to(model / "checkpoint")
  text = (model / "model.json").read_text()
  (stranger / "model.json").write_text(text.replace("_tiny", "resnet8x9"))
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "empty").mkdir()
  for opened, image, words, code in (
    (model, path, f"{path}: expected an image file, got one that cannot be", 1),
    (model, tmp_path / "none.png", "does not exist: expected an image file", 1),
    (model, tmp_path / "pipe", "got a pipe or a device", 1),
    (model, tmp_path / "empty", "expected images in the folder, found none", 2),
    (tmp_path, path, "got a folder with neither", 2),
    (stranger, picture, "its card_sha256 differs", 2),
  ):
    assert run_main(predict, "--model", opened, image) == code
    output = capsys.readouterr()
    assert words in output.err
    assert output.out == ""


def test_export(model, tmp_path, run_main, capsys):
  to = tmp_path / "a" / "b"
  arguments = ("--model", model, "--fold_batch_norm", "--dtype", "bfloat16")
  assert run_main(export, *arguments, "--to", to) == 0
  card = json.loads((to / "model.json").read_text())
  assert card["batch_norm_folded"] and card["dtype"] == "bfloat16"
  assert capsys.readouterr().out == (
    f"{to}: _tiny, 10 classes, {card['parameters']:,} parameters\n"
  )
  new = tmp_path / "c"
  for arguments, words in (
    (("--workdir", tmp_path / "x", "--to", new), "expected the workdir of a"),
    (("--workdir", tmp_path), "arguments are required: --to"),
    (("--model", model, "--to", tmp_path / "x.onnx"), "ends in .pth, "),
    (("--model", model, "--to", new, "--weights_beside"), "in .stablehlo, got"),
  ):
    assert run_main(export, *arguments) == 2
    assert words in capsys.readouterr().err
  assert not new.exists()


@pytest.mark.parametrize(
  ("command", "flag"), [(export, "--model"), (convert, "--from")]
)
def test_a_full_disk(
  command, flag, model, run_main, capsys, monkeypatch, tmp_path
):
  def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  arguments = (flag, model, "--to", tmp_path / "new.npz")
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", fail)
    assert run_main(command, *arguments) == 1
  error = capsys.readouterr().err
  assert (
    f"No space left on device: '{tmp_path / 'new.npz'}'. Make room" in error
  )
  assert error.count("\n") == 1
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  assert run_main(command, *arguments) == 0


def test_convert(tmp_path, run_main, capsys):
  weights = write_weights(tmp_path / "a.npz", "resnet8", 100)
  to, new = tmp_path / "out", tmp_path / "new"
  assert run_main(convert, "--from", weights, "--to", to) == 0
  assert capsys.readouterr().out.startswith(f"{to}: resnet8, 100 classes, ")
  simkd = ("--simkd_student", weights, "--to", new)
  for arguments, words in (
    (("--from", weights, "--to", new, "--num_classes", 9), "like resnet8 with"),
    (("--from", tmp_path / "b.pth", "--to", new), "b.pth does not exist"),
    (("--from", weights, "--to", new, "--rename", "a"), "expected old=new"),
    (
      ("--from", weights, "--to", new, "--prefix", "a"),
      "names that begin with",
    ),
    (
      ("--from", weights, "--to", new, "--rename", "layer=stage"),
      "convert --rename 'stage=layer'",
    ),
    (("--from", weights, "--to", new, "--factor", 2), "--factor goes with"),
    (simkd, "--simkd_student needs --teacher"),
    ((*simkd, "--teacher", weights), "'model' and 'proj', got a file without"),
  ):
    assert run_main(convert, *arguments) == 2
    assert words in capsys.readouterr().err
  assert not new.exists()
