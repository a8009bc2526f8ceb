"""Evaluating an export: the run's own figures, from another process."""

import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kd_jax import data, evaluate, export, record

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def simkd(smoke_run):
  return smoke_run("simkd_cifar")


@pytest.fixture
def source():
  return data.load("synthetic", split="test", image_size=16, num_examples=64)


def main(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
  try:
    evaluate.main()
  except SystemExit as stop:
    return stop.code
  return 0


def test_figures_are_the_runs(simkd, source):
  got = evaluate.evaluate(export.load(simkd), source)
  best = record.result(simkd)["best"]
  assert got["examples"] == 64
  for name in ("top1", "top5"):
    assert got[name] == best[name]
  assert got["ce"] == pytest.approx(best["ce"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100])
def test_every_example_counts_once(simkd, source, batch_size):
  model = export.load(simkd)
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


def test_a_fresh_process_prints_the_runs_figures(simkd, tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "kd_jax.evaluate", "--model", str(simkd)],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  best = record.result(simkd)["best"]
  assert process.stdout == (
    "resnet8 on synthetic (test, 64 images): top-1"
    f" {best['top1']:.2f} %, top-5 {best['top5']:.2f} %, cross-entropy"
    f" {best['ce']:.4f}\n"
  )


def test_command_line_on_the_training_set(simkd, monkeypatch, capsys):
  arguments = ("--model", simkd / "export", "--split", "train")
  assert main(monkeypatch, *arguments, "--batch_size", "64") == 0
  printed = capsys.readouterr().out
  assert printed.startswith("resnet8 on synthetic (train, 64 images): top-1 ")
  assert math.isfinite(float(printed.split()[-1]))


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--data", "cifar"), "Unknown data source 'cifar'. Did you mean cifar10"),
    (
      ("--data", "cifar100", "--data_dir", "/no/such"),
      "No cifar100 data: expected the folder cifar-100-python",
    ),
    (("--batch_size", "0"), "batch_size"),
    (("--split", "valid"), "invalid choice: 'valid'"),
    (("--model", "/no/such"), "/no/such does not exist: expected the workdir"),
  ],
)
def test_command_line_errors(simkd, arguments, words, monkeypatch, capsys):
  assert main(monkeypatch, "--model", simkd, *arguments) == 2
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
    evaluate.evaluate(export.load(simkd), source)
