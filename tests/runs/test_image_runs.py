"""Whole runs from folders of images, by every pipeline that reads them."""

import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image

from kd_jax import data, storage
from kd_jax.data import images
from kd_jax.interop import card as card_lib
from kd_jax.interop import scoring, store
from kd_jax.runs import checkpoint, train
from kd_jax.runs import workdir as workdir_lib

REPO = pathlib.Path(__file__).resolve().parents[2]
PIPELINES = ("grain", "dali")
CLASSES, TRAIN, TEST = 3, 8, 5


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
def run(launch, folder, tmp_path, fast_compile):
  def start(name, pipeline, *flags, data_dir=folder):
    code = launch(
      *("--config", f"{REPO}/configs/simkd_folder.py"),
      *("--workdir", str(tmp_path / name), f"--config.data.dir={data_dir}"),
      *("--config.teacher.name=_tiny_wide", "--config.student.name=_tiny"),
      *("--config.data.image_size=16", "--config.data.resize=18"),
      *("--config.batch_size=8", "--config.eval.batch_size=8"),
      *("--config.epochs=2", "--config.teacher.epochs=2"),
      *("--config.optim.milestones=(1,)", "--config.parallel.num_devices=1"),
      *(f"--config.data.pipeline={pipeline}", "--config.log.every_steps=1"),
      *flags,
    )
    return code, tmp_path / name

  return start


def losses(workdir):
  records = storage.read_metrics(workdir / "metrics.jsonl")
  return [r["loss"] for r in records if r["kind"] == "train"]


def newest(workdir):
  reader = checkpoint.Checkpointer(workdir / "checkpoints", read_only=True)
  return reader.restore_latest(None)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_run(pipeline, run, folder, monkeypatch):
  commands = []
  fresh = types.SimpleNamespace(run=lambda *a, **_: commands.append(*a))
  monkeypatch.setattr(train, "subprocess", fresh)
  code, workdir = run("run", pipeline, "--config.verify_export=True")
  assert code == 0
  result = workdir_lib.result(workdir)
  assert result["steps"] == 2 * (CLASSES * TRAIN // 8)
  assert result["skipped_images"] == {"train": 0, "test": 0}
  card = card_lib.read_card(workdir / "export")
  assert card["trained_on"] == "folder"
  assert card["image_shape"] == [16, 16, 3]
  assert card["data_options"] == {"image_size": 16, "resize": 18}
  assert card["class_names"] == [f"class {k}" for k in range(CLASSES)]
  source = data.load("folder", split="test", dir=folder, **card["data_options"])
  # What the export is tried on is what the network sees.
  (command,) = commands
  for i, path in enumerate(command[-4:]):
    image = images.load(source.read_bytes(i), "x")
    np.testing.assert_array_equal(
      np.asarray(Image.open(path)),
      images.evaluate_crop(image, size=16, resize=18),
    )
  scores = scoring.evaluate(store.load(workdir), source)
  assert scores["examples"] == CLASSES * TEST
  assert scores["top1"] == pytest.approx(result["best"]["top1"])
  assert scores["ce"] == pytest.approx(result["best"]["ce"], rel=1e-3)


def test_both_pipelines_train_alike(run):
  """The same order, the same crops, decoders that agree to a level or two."""
  grain, dali = PIPELINES
  first = run(grain, grain)[1]
  teacher = workdir_lib.result(first)["teacher"]["checkpoint"]
  named = f"--config.teacher.checkpoint={teacher}"
  both = [losses(first), losses(run(dali, dali, named)[1])]
  assert len(both[0]) == 6
  np.testing.assert_allclose(both[0][0], both[1][0], rtol=2e-3)
  # Such small batches amplify whatever differs.
  np.testing.assert_allclose(*both, rtol=0.1)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_stopped_run_goes_on_exactly(pipeline, run, monkeypatch):
  code, straight = run("straight", pipeline)
  assert code == 0
  real, calls = train.Loop._dispatch, []

  def dispatch(self):
    if self.run_.workdir.name == "stopped":
      calls.append(None)
      if len(calls) == 3:
        self.stop.received = "SIGTERM"
    return real(self)

  monkeypatch.setattr(train.Loop, "_dispatch", dispatch)
  code, stopped = run("stopped", pipeline)
  assert code == 75
  code, stopped = run("stopped", pipeline)
  assert code == 0
  ours, theirs = newest(stopped).state, newest(straight).state
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_bad_image(pipeline, run, folder, tmp_path, capsys):
  broken = tmp_path / "broken"
  shutil.copytree(folder, broken)
  bad = broken / "train" / "class 1" / "3.JPEG"
  bad.write_bytes(bad.read_bytes()[:200])
  (broken / "val" / "class 2" / "0.JPEG").write_bytes(b"")
  assert run("refused", pipeline, data_dir=broken)[0] == 2
  assert str(bad) in capsys.readouterr().err
  code, workdir = run(
    "skipping",
    pipeline,
    "--config.data.on_bad_image=skip",
    "--config.epochs=1",
    data_dir=broken,
  )
  assert code == 0
  result = workdir_lib.result(workdir)
  assert result["skipped_images"] == {"train": 1, "test": 1}
  listed = storage.read_json(workdir / "skipped_images.json")
  assert str(bad) in listed["train"][0]
  assert "0.JPEG" in listed["test"][0] and "0 bytes" in listed["test"][0]


@pytest.mark.parametrize("kept", [True, False])
def test_bad_images_stay_listed_when_a_run_goes_on(
  kept, run, folder, tmp_path, monkeypatch
):
  """Where they were met before the stop; not of an older checkpoint."""
  broken = tmp_path / "broken"
  shutil.copytree(folder, broken)
  for path in (broken / "train" / "class 1").iterdir():
    path.write_bytes(b"no image")
  real_dispatch, real_save = train.Loop._dispatch, checkpoint.Checkpointer.save

  def dispatch(self):
    if self.step == 1 and self.run_.workdir.name == "stopped":
      self.stop.received = "SIGTERM"
    return real_dispatch(self)

  def save(self, *arguments, meta, **options):
    if not kept:
      meta.pop("skipped", None)
    return real_save(self, *arguments, meta=meta, **options)

  def start():
    flags = ("on_bad_image=skip", f"dir={broken}")
    return run(
      *("stopped", "grain", *(f"--config.data.{flag}" for flag in flags)),
      *("--config.epochs=1", "--config.teacher.epochs=1"),
    )

  monkeypatch.setattr(train.Loop, "_dispatch", dispatch)
  monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
  assert start()[0] == 75
  # In order again: nothing is found any more.
  shutil.copytree(folder, broken, dirs_exist_ok=True)
  code, workdir = start()
  assert code == 0
  result, path = workdir_lib.result(workdir), workdir / "skipped_images.json"
  count = result["skipped_images"]["train"]
  assert bool(count) == path.exists() == kept
  if kept:
    listed = storage.read_json(path)
    assert len(listed["train"]) == count and listed["test"] == []
    assert all("class 1" in reason for reason in listed["train"])


def test_settings_of_imagenet_recipes(run):
  """Smoothing, mixing and a rate in proportion, all at once."""
  flags = (
    "--config.label_smoothing=0.1",
    "--config.data.mixup=0.2",
    "--config.data.cutmix=1.0",
    "--config.optim.reference_batch_size=16",
    "--config.optim.warmup_epochs=1",
    "--config.loss_weights.ce=1.0",
    "--config.epochs=2",
    "--config.optim.schedule=constant",
  )
  code, workdir = run("settings", "grain", *flags)
  assert code == 0
  rates = [
    r["learning_rate"]
    for r in storage.read_metrics(workdir / "metrics.jsonl")
    if r["kind"] == "train"
  ]
  # A rate of 0.1 for 16 images is 0.05 for 8, after a warm-up of one epoch.
  np.testing.assert_allclose(
    rates, [0, 0.05 / 3, 0.1 / 3, 0.05, 0.05, 0.05], atol=1e-6
  )


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--config.data.pipeline=device", "Use the pipeline 'grain'"),
    ("--config.label_smoothing=1.0", "label_smoothing: expected a share from"),
    ("--config.data.mixup=-1.0", "config.data.mixup: expected 0 or more"),
    ("--config.data.decoder=tpu", "Unknown device 'tpu'"),
    ("--config.data.on_bad_image=ignore", "Unknown on_bad_image 'ignore'"),
    ("--config.data.crop_area=(0.5, 0.1)", "crop_area must be (least, large"),
  ],
)
def test_settings_that_make_no_sense(flag, words, run, capsys):
  pipeline = "dali" if "decoder" in flag else "grain"
  code, workdir = run("refused", pipeline, flag)
  assert code == 2
  assert words in capsys.readouterr().err
  assert not workdir.exists()


def test_pairs_must_be_even(run, capsys):
  flags = ("--config.batch_size=3", "--config.data.mixup=0.2")
  assert run("refused", "grain", *flags)[0] == 2
  assert "mixes pairs: expected an even number" in capsys.readouterr().err
