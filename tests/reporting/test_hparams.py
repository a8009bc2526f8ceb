"""TensorBoard's HParams view of finished runs."""

import shutil

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from kd_jax.reporting import hparams
from kd_jax.reporting import runs as runs_lib


def read(folder):
  """(settings, scores, names in the experiment, ended) of a session."""
  (path,) = folder.glob("*tfevents*")
  raw, settings, scores, names, ended = path.read_bytes(), {}, {}, [], False
  while raw:  # records of length, checksum, bytes, checksum
    size = int.from_bytes(raw[:8], "little")
    event = event_pb2.Event.FromString(raw[12 : 12 + size])
    raw = raw[16 + size :]
    for value in event.summary.value:
      if not value.tag.startswith("_hparams_/"):
        scores[value.tag] = (value.simple_value, event.step)
        continue
      content = plugin_hparams_pb2.HParamsPluginData.FromString(
        value.metadata.plugin_data.content
      )
      names += [info.name for info in content.experiment.hparam_infos]
      for name, setting in content.session_start_info.hparams.items():
        settings[name] = getattr(setting, setting.WhichOneof("kind"))
      ended |= content.HasField("session_end_info")
  return settings, scores, names, ended


@pytest.fixture
def runs(tmp_path, write):
  folder = tmp_path / "runs"
  write(folder / "alone", 70.0, age=3)
  for seed, heat in enumerate((4.0, 8.0)):
    write(
      folder / f"kd{seed}",
      74.0 + seed,
      seed=seed,
      method="kd",
      teacher={"name": "resnet32x4"},
      changes={
        "distiller": {"name": "kd", "temperature": heat},
        "optim": {"milestones": [1, 2 + seed], "nesterov": bool(seed)},
      },
    )
  return folder


def test_a_session_for_each_run(runs, tmp_path):
  hparams.write(runs_lib.collect(runs), tmp_path / "hparams")
  settings, scores, names, ended = read(tmp_path / "hparams" / "kd1")
  assert ended
  assert settings["distiller.temperature"] == 8.0
  assert settings["optim.milestones"] == "[1, 3]"
  assert settings["optim.nesterov"] is True
  assert settings["seed"] == 1.0
  # All runs have the same batch size.
  assert "batch_size" not in settings and "student.name" in settings
  assert scores["last_epoch/top1"] == (75.0, 3)
  assert scores["best_epoch/top1"] == (76.25, 3)
  assert scores["best_epoch/epoch"] == (2, 3)
  assert scores["last_epoch/ce"] == (1.5, 3)
  alone, _, columns, _ = read(tmp_path / "hparams" / "alone")
  assert columns == names == sorted(settings) == sorted(alone)
  assert alone["distiller.temperature"] == ""
  assert alone["distiller.name"] == "none"


def test_one_run_has_its_own_settings(runs, tmp_path):
  hparams.write(runs_lib.collect(runs / "alone"), tmp_path / "hparams")
  settings, scores, _, ended = read(tmp_path / "hparams" / "run")
  assert ended and scores
  assert settings == {
    **{"distiller.name": "none", "seed": 0.0},
    **{"student.name": "resnet8x4", "teacher.name": ""},
  }


def test_sessions_of_removed_runs_go_but_no_run(runs, tmp_path):
  folder = tmp_path / "hparams"
  hparams.write(runs_lib.collect(runs), folder)
  shutil.rmtree(runs / "kd0")
  hparams.write(runs_lib.collect(runs), folder)
  assert {path.name for path in folder.iterdir() if path.is_dir()} == {
    *("alone", "kd1")
  }
  shutil.copytree(runs, folder / "mine")
  with pytest.raises(ValueError, match="expected only TensorBoard's events"):
    hparams.write(runs_lib.collect(runs), folder)
  assert (folder / "mine" / "kd1" / "result.json").exists()
