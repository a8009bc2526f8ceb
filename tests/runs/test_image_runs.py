"""Whole runs from a folder of images: recipe, stop and resume, bad images."""

import pathlib
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from kd_jax import data, storage
from kd_jax.data import dali, grain, images
from kd_jax.interop import card as card_lib
from kd_jax.interop import scoring, store
from kd_jax.runs import checkpoint
from kd_jax.runs import workdir as workdir_lib

REPO = pathlib.Path(__file__).resolve().parents[2]
CLASSES, TRAIN, TEST, BATCH = 3, 8, 5, 8
PIPELINES = {"grain": grain.GrainPipeline, "dali": dali.DaliPipeline}
# Smoothing, mixing, warm-up, and a rate in proportion to the batch.
RECIPE = (
  *("--config.label_smoothing=0.1", "--config.loss_weights.ce=1.0"),
  *("--config.data.mixup=0.2", "--config.data.cutmix=1.0"),
  *("--config.optim.reference_batch_size=16", "--config.optim.warmup_epochs=1"),
  "--config.optim.schedule=constant",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Photographs of three classes, told apart by their colour."""
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split, count in (("train", TRAIN), ("val", TEST)):
    for k in range(CLASSES):
      place = root / split / f"class {k}"
      place.mkdir(parents=True)
      for i in range(count):
        size = rng.integers(20, 40, 2)
        pixels = rng.integers(0, 128, (*size, 3), np.uint8)
        pixels[..., k] += 127
        Image.fromarray(pixels).save(place / f"{i}.JPEG", quality=95)
  return root


@pytest.fixture
def run(launch, folder, tmp_path):
  def start(name, pipeline, *flags, data_dir=folder):
    code = launch(
      *("--config", f"{REPO}/configs/simkd_folder.py"),
      *("--workdir", str(tmp_path / name), f"--config.data.dir={data_dir}"),
      *("--config.teacher.name=_tiny_wide", "--config.student.name=_tiny"),
      *("--config.data.image_size=16", "--config.data.resize=18"),
      *(f"--config.batch_size={BATCH}", f"--config.eval.batch_size={BATCH}"),
      *("--config.epochs=2", "--config.teacher.epochs=1"),
      *("--config.optim.milestones=(1,)", "--config.parallel.num_devices=1"),
      *(f"--config.data.pipeline={pipeline}", "--config.log.every_steps=1"),
      *flags,
    )
    return code, tmp_path / name

  return start


@pytest.fixture
def stop_at(monkeypatch):
  """stop_at(pipeline, n): the n-th chunk from now comes with a SIGTERM."""

  def prepare(pipeline, number):
    real, calls = PIPELINES[pipeline].next_chunk, []

    def next_chunk(self, k):
      calls.append(k)
      if len(calls) == number:
        signal.raise_signal(signal.SIGTERM)
      return real(self, k)

    monkeypatch.setattr(PIPELINES[pipeline], "next_chunk", next_chunk)

  return prepare


def newest(workdir):
  return checkpoint.read_latest(workdir / "checkpoints")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_run_and_one_that_stops_and_resumes(
  pipeline, run, folder, stop_at, monkeypatch
):
  real = subprocess.run

  def skip_predict(command, **options):
    if "predict" not in command:
      return real(command, **options)
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(subprocess, "run", skip_predict)
  code, straight = run(
    "straight", pipeline, "--config.verify_export=True", *RECIPE
  )
  assert code == 0
  result = workdir_lib.result(straight)
  assert result["steps"] == 2 * (CLASSES * TRAIN // BATCH)
  assert result["skipped_images"] == {"train": 0, "test": 0}
  lines = storage.read_metrics(straight / "metrics.jsonl")
  rates = [x["learning_rate"] for x in lines if x["kind"] == "train"]
  # A rate of 0.1 for 16 images is 0.05 for 8, after a warm-up of one epoch.
  np.testing.assert_allclose(
    rates, [0, 0.05 / 3, 0.1 / 3, 0.05, 0.05, 0.05], atol=1e-6
  )
  # With DALI, the run's scores are of DALI's pixels.
  tolerance = 1e-3 if pipeline == "grain" else 0.1
  check_export(straight, result["best"], folder, tolerance)

  teacher = result["teacher"]["checkpoint"]
  flags = (f"--config.teacher.checkpoint={teacher}", *RECIPE)
  stop_at(pipeline, 3)
  assert run("stopped", pipeline, *flags)[0] == 75
  code, stopped = run("stopped", pipeline, *flags)
  assert code == 0
  ours, theirs = newest(stopped).state, newest(straight).state
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def check_export(workdir, best, folder, tolerance):
  """Checks the model card, the samples and the scores of the export."""
  card = card_lib.read_card(workdir / "export")
  assert card["trained_on"] == "folder"
  assert card["image_shape"] == [16, 16, 3]
  assert card["data_options"] == {"image_size": 16, "resize": 18}
  assert card["class_names"] == [f"class {k}" for k in range(CLASSES)]
  source = data.load("folder", split="test", dir=folder, **card["data_options"])
  # The export is tried on what the network sees.
  samples = sorted((workdir / "samples").iterdir())
  assert len(samples) == 4
  for i, path in enumerate(samples):
    image = images.load(source.read_bytes(i), "x")
    np.testing.assert_array_equal(
      np.asarray(Image.open(path)),
      images.evaluate_crop(image, size=16, resize=18),
    )
  scores = scoring.evaluate(store.load(workdir), source)
  assert scores["examples"] == CLASSES * TEST
  assert scores["ce"] == pytest.approx(best["ce"], rel=tolerance)


def test_bad_images(run, folder, tmp_path, stop_at, capsys):
  """Refused; or left out, and still listed when the run resumes."""
  broken = tmp_path / "broken"
  shutil.copytree(folder, broken)
  for path in (broken / "train" / "class 1").iterdir():
    path.write_bytes(path.read_bytes()[:200])
  (broken / "val" / "class 2" / "0.JPEG").write_bytes(b"")
  assert run("grain", "grain", data_dir=broken)[0] == 2
  assert f"{broken}/train/class 1/" in capsys.readouterr().err
  assert run("dali", "dali", data_dir=broken)[0] == 2
  assert "DALI could not decode an image" in capsys.readouterr().err
  skip = ("--config.data.on_bad_image=skip", "--config.epochs=1")
  assert run("none", "dali", *skip, data_dir=broken)[0] == 2
  assert "cannot leave out bad images" in capsys.readouterr().err

  stop_at("grain", 3 + 2)  # the teacher has 3 steps
  assert run("skipping", "grain", *skip, data_dir=broken)[0] == 75
  # In order again: nothing more is found.
  shutil.copytree(folder, broken, dirs_exist_ok=True)
  assert run("skipping", "grain", *skip, data_dir=broken)[0] == 2
  (tmp_path / "skipping" / "data.json").unlink()
  code, workdir = run("skipping", "grain", *skip, data_dir=broken)
  assert code == 0
  count = workdir_lib.result(workdir)["skipped_images"]
  listed = storage.read_json(workdir / "skipped_images.json")
  assert {split: len(reasons) for split, reasons in listed.items()} == count
  assert count["train"] > 0
  assert all("class 1" in reason for reason in listed["train"])


@pytest.mark.parametrize(
  ("pipeline", "flags", "words"),
  [
    ("device", [], "Use the pipeline 'grain'"),
    ("grain", ["label_smoothing=1.0"], "config.label_smoothing: expected"),
    ("grain", ["data.mixup=-1.0"], "config.data.mixup: expected"),
    ("grain", ["data.on_bad_image=ignore"], "on_bad_image 'ignore'"),
    ("grain", ["data.crop_area=(0.5, 0.1)"], "crop_area must be"),
    ("dali", ["data.decoder=tpu"], "device 'tpu'"),
    ("grain", ["batch_size=3", "data.mixup=0.2"], "expected an even number"),
  ],
)
def test_settings_that_are_refused(pipeline, flags, words, run, capsys):
  code, workdir = run(
    "refused", pipeline, *(f"--config.{flag}" for flag in flags)
  )
  assert code == 2
  assert words in capsys.readouterr().err
  assert not workdir.exists()
