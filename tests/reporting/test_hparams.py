"""What TensorBoard's HParams view is made of."""

import json
import shutil

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from kd_jax.reporting import hparams
from kd_jax.reporting import runs as runs_lib


def events(path):
  """The events of a file: records of length, checksum, bytes, checksum."""
  raw, found = path.read_bytes(), []
  while raw:
    size = int.from_bytes(raw[:8], "little")
    found.append(event_pb2.Event.FromString(raw[12 : 12 + size]))
    raw = raw[16 + size :]
  return found


def read(folder):
  """(experiment, settings, scores, ended) of a folder's only file."""
  (path,) = [p for p in folder.iterdir() if p.is_file()]
  assert "tfevents" in path.name
  first, *rest = events(path)
  assert first.file_version == "brain.Event:2"
  experiment, settings, scores, ended = None, {}, {}, False
  for event in rest:
    (value,) = event.summary.value
    if not value.tag.startswith("_hparams_/"):
      scores[value.tag] = (value.simple_value, event.step)
      continue
    plugin = value.metadata.plugin_data
    assert plugin.plugin_name == "hparams"
    content = plugin_hparams_pb2.HParamsPluginData.FromString(plugin.content)
    if content.HasField("experiment"):
      experiment = content.experiment
    elif content.HasField("session_start_info"):
      for name, setting in content.session_start_info.hparams.items():
        kind = setting.WhichOneof("kind")
        settings[name] = getattr(setting, kind)
    else:
      ended = content.HasField("session_end_info")
  return experiment, settings, scores, ended


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
  experiment, settings, scores, _ = read(tmp_path / "hparams")
  assert (settings, scores) == ({}, {})
  names = [info.name for info in experiment.hparam_infos]
  assert names == sorted(names)
  # What all have alike, as the batch size, is not shown.
  assert {*names} == {
    *("distiller.name", "distiller.temperature", "loss_weights.kd", "seed"),
    *("optim.milestones", "optim.nesterov", "student.name", "teacher.name"),
    *(n for n in names if n.startswith("optim.")),
  }
  assert "batch_size" not in names and "data.name" not in names
  tags = [info.name.tag for info in experiment.metric_infos]
  _, settings, scores, ended = read(tmp_path / "hparams" / "kd1")
  assert ended
  assert settings.keys() <= {*names}
  assert settings["distiller.temperature"] == 8.0
  assert settings["optim.milestones"] == "[1, 3]"
  assert settings["optim.nesterov"] is True
  assert settings["seed"] == 1.0
  assert list(scores) == tags
  assert scores["last_epoch/top1"] == (75.0, 3)
  assert scores["best_epoch/top1"] == (76.25, 2)
  assert scores["last_epoch/ce"] == (1.5, 3)
  _, settings, _, _ = read(tmp_path / "hparams" / "alone")
  assert "distiller.temperature" not in settings
  assert settings["distiller.name"] == "none"


def test_one_run_has_its_own_settings(runs, tmp_path):
  hparams.write(runs_lib.collect(runs / "alone"), tmp_path)
  files = [path for path in tmp_path.iterdir() if path.is_file()]
  assert len(files) == 1
  experiment, settings, scores, ended = read(tmp_path)
  assert ended and scores and experiment.metric_infos
  assert settings == {
    **{"distiller.name": "none", "seed": 0.0},
    **{"student.name": "resnet8x4", "teacher.name": ""},
  }


def test_sessions_of_removed_runs_are_cleared(runs, tmp_path):
  folder = tmp_path / "hparams"
  hparams.write(runs_lib.collect(runs), folder)
  foreign = folder / "kd0" / "events.out.tfevents.1.another"
  foreign.touch()
  shutil.rmtree(runs / "kd0")
  hparams.write(runs_lib.collect(runs), folder)
  assert {p for p in folder.rglob("*") if p.is_file()} == {
    foreign,
    *(folder / name / hparams._FILE for name in ("", "alone", "kd1")),
  }


def test_the_same_runs_give_the_same_files(runs, tmp_path):
  for name in "ab":
    hparams.write(runs_lib.collect(runs), tmp_path / name)
  one, two = (
    {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in files}
    for n, files in (
      (n, [p for p in (tmp_path / n).rglob("*") if p.is_file()]) for n in "ab"
    )
  )
  assert one == two
  assert len(one) == 4
  assert str(tmp_path) not in json.dumps([*one])
