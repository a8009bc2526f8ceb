"""Stages, and runs that start from given weights."""

import importlib
import shutil
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.interop import pytorch
from kd_jax.reporting import runs
from kd_jax.runs import checkpoint, errors, identity, initial, loop, train
from kd_jax.runs import workdir as workdir_lib

TINY = {
  "student.name": "_tiny",
  "teacher.name": "_tiny_wide",
  "teacher.epochs": 1,
  "data.image_size": 8,
  "data.num_examples": 32,
  "data.crop_padding": 1,
  "batch_size": 8,
  "epochs": 2,
  "checkpoint.every_steps": 3,
  "parallel.num_devices": 1,
}
# FitNet as its paper has it: the hint first, then KD.
STAGES = {
  "init": {"epochs": 1, "loss_weights": {"fitnet": 1.0}},
  "main": {"loss_weights": {"ce": 1.0, "kd": 1.0}},
}


def make(stages=STAGES, **changes):
  config = importlib.import_module("configs.fitnet_cifar").get_config("smoke")
  config.stages = ConfigDict(stages)
  named = {name.replace("__", "."): value for name, value in changes.items()}
  config.update_from_flattened_dict({**TINY, **named})
  return config.lock()


def state(workdir):
  return checkpoint.read_latest(workdir / "checkpoints").state


def assert_same_bits(ours, theirs):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours),
    jax.tree.leaves(theirs),
    strict=True,
  ):
    assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
  """Workdir of a finished run of two stages."""
  workdir = tmp_path_factory.mktemp("runs") / "staged"
  train.train_and_evaluate(make(), str(workdir))
  return workdir


def test_two_stages(staged, monkeypatch, capsys):
  """Stopped in each, with the same command again, they end the same."""
  workdir, dispatch = staged.with_name("stopped"), loop.Loop.dispatch

  def stop(self):
    if (self.step, self._parts.total_steps) in ((2, 4), (5, 8)):
      signal.raise_signal(signal.SIGTERM)
    dispatch(self)

  where = []
  with monkeypatch.context() as patch:
    patch.setattr(loop.Loop, "dispatch", stop)
    for _ in range(2):
      with pytest.raises(errors.PreemptedError) as stopped:
        train.train_and_evaluate(make(), str(workdir))
      where.append(str(stopped.value).partition(":")[0])
  assert where == [
    f"stopped by SIGTERM at step 3, saved in {workdir / 'init'}",
    f"stopped by SIGTERM at step 6, saved in {workdir}",
  ]
  out = capsys.readouterr().out
  assert out.count("training _tiny_wide first") == 0  # there is one beside it
  words = "no term of the loss trains the student's fc, layer2_0, layer3_0: its"
  assert f"{words} accuracy" in out
  words = f"initial weights: {workdir / 'init'} (the checkpoint of step 4, with"
  assert f"{words} what fitnet learned)" in out
  result = train.train_and_evaluate(make(), str(workdir))
  assert result["steps"] == 8 and result["final"]["epoch"] == 2
  for folder in ("", "init"):
    assert_same_bits(state(workdir / folder), state(staged / folder))
  # It is one run: its first stage is no trial of the second.
  assert runs.find_runs(staged) == [staged]
  assert runs.find_runs(staged / "init") == [staged / "init"]
  # Nothing is made again, also without the first stage.
  shutil.rmtree(workdir / "init")
  assert train.train_and_evaluate(make(), str(workdir)) == result
  assert not (workdir / "init").exists()


def test_a_stage_trains_what_its_terms_reach(staged):
  prepared = train.prepare(make(), staged.with_name("elsewhere"))
  fresh = train.prepare(prepared.before.config, staged.with_name("elsewhere"))
  wide = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    jax.eval_shape(
      fresh.parts.teachers[0].network.init,
      jax.random.key(0),
      np.zeros((1, 8, 8, 3), np.float32),
    ),
  )
  begun = fresh.parts.programs.initialize(0, (wide,)).params
  ended = state(staged / "init")["params"]
  assert_same_bits(ended["student"]["fc"], begun["student"]["fc"])
  moved = jax.tree.map(lambda a, b: np.any(a != b), ended, begun)
  assert all(jax.tree.leaves(moved["distiller"]))
  assert all(jax.tree.leaves(moved["student"]["conv1"]))
  # The second does not train the regressor, whose statistics rest too.
  for kind in ("params", "collections"):
    first, last = (state(staged / f)[kind]["distiller"] for f in ("init", ""))
    assert_same_bits(first, last)


def weights(prepared):
  return prepared.initial.student, prepared.initial.distiller


def test_a_run_starts_from_given_weights(staged, tmp_path):
  """From a run its last checkpoint, from an export the student alone."""
  kept = state(staged)
  whole = make({}, init_from=str(staged))
  student, learned = weights(train.prepare(whole, tmp_path / "a"))
  assert_same_bits(student["params"], kept["params"]["student"])
  assert_same_bits(
    student["batch_stats"], kept["collections"]["student"]["batch_stats"]
  )
  assert_same_bits(learned["params"], kept["params"]["distiller"])
  # Of another method, or without one.
  config = make({}, init_from=str(staged))
  with config.unlocked():
    config.distiller = ConfigDict({"name": "kd"})
    config.loss_weights = ConfigDict({"kd": 1.0})
  assert weights(train.prepare(config, tmp_path / "a"))[1] == {}
  export = make({}, init_from=str(staged / "export"))
  prepared = train.prepare(export, tmp_path / "a")
  assert weights(prepared)[1] == {}
  best = storage.restore_tree(staged / "export" / "checkpoint")
  assert_same_bits(weights(prepared)[0], best)
  # A file of weights.
  file = tmp_path / "weights.npz"
  np.savez(file, **pytorch.to_state_dict("_tiny", best))
  prepared = train.prepare(make({}, init_from=str(file)), tmp_path / "a")
  file.unlink()
  assert_same_bits(weights(prepared)[0], best)
  assert prepared.initial.what == "a network of 10 classes"
  # Other classes: all but the classifier.
  fewer = make({}, init_from=str(staged), data__num_classes=7)
  with fewer.unlocked():
    fewer.distiller = ConfigDict({"name": "kd"})
    fewer.loss_weights = ConfigDict({"kd": 1.0})
  prepared = train.prepare(fewer, tmp_path / "a")
  trunk = weights(prepared)[0]["params"]
  assert set(kept["params"]["student"]) - set(trunk) == {"fc"}
  assert prepared.initial.what.endswith("the classifier of 7 is new")
  assert list(tmp_path.iterdir()) == []


def test_the_state_begins_with_them(staged, tmp_path):
  prepared = train.prepare(make({}, init_from=str(staged)), tmp_path / "a")
  programs = prepared.parts.programs
  teacher = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    jax.eval_shape(
      prepared.parts.teachers[0].network.init,
      jax.random.key(0),
      np.zeros((1, 8, 8, 3), np.float32),
    ),
  )
  made = programs.initialize(0, (teacher,), weights(prepared))
  assert_same_bits(made.variables("student"), weights(prepared)[0])
  assert_same_bits(made.variables("distiller"), weights(prepared)[1])
  assert not any(np.any(x) for x in jax.tree.leaves(made.opt_state))


def test_other_weights_are_another_run(staged, tmp_path):
  config = make({}, init_from=str(staged))
  found = initial.read(
    staged, config, train.prepare(config, tmp_path / "a").parts
  )
  initial.keep(found, tmp_path)
  # The path is free, the content is not.
  initial.keep(found._replace(path=tmp_path), tmp_path)
  other = jax.tree.map(lambda x: x + 1, found.student)
  with pytest.raises(ValueError, match=r"expected the weights that .* began"):
    initial.keep(found._replace(student=other), tmp_path)
  prints = [
    identity.config_fingerprint(make({}, init_from=path))
    for path in ("", "a", "b")
  ]
  assert prints[0] != prints[1] == prints[2]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"init_from": "/no/such"}, r"config\.init_from: /no/such does not exist"),
    (
      {"student__name": "_tiny_wide"},
      r"config\.init_from: expected weights of _tiny_wide .*, got _tiny in",
    ),
    (
      {"distiller__hint_layer": "stage2"},
      r"config\.init_from: .*, fitnet: expected .* differ \(batch_stats/regr",
    ),
    (
      {"stages": {"init": {"epoch": 1}}},
      r"config\.stages\.init\.epoch: no such field\. Did you mean epochs",
    ),
    ({"stages": {"best": {}}}, r"config\.stages: expected names .*'best'"),
    ({"stages": {"a/b": {}}}, r"config\.stages: expected names .*'a/b'"),
    (
      {"stages": {"init": {"loss_weights": {"hint": 1.0}}}},
      r"config\.stages\.init: loss_weights: 'hint' is not a term",
    ),
    (
      {
        "init_from": "",
        "stages": {"init": {"student": {"name": "_tiny_wide"}}},
      },
      r"config\.stages\.init: student: expected arrays .* differ \(batch_stat",
    ),
  ],
)
def test_refused_before_anything_is_written(changes, words, staged, tmp_path):
  stages = changes.pop("stages", {})
  config = make(stages, **{"init_from": str(staged), **changes})
  with pytest.raises(ValueError, match=words) as caught:
    train.train_and_evaluate(config, str(tmp_path / "a"))
  assert "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_three_stages_follow_each_other():
  """In the order of their names; the first takes config.init_from."""
  config = make(
    {"b": {"seed": 2}, "a": {"seed": 1}, "main": {"seed": 3}}, init_from="x"
  )
  main, before = initial.split(config)
  assert (main.seed, before.name, before.config.seed) == (3, "b", 2)
  middle, first = initial.split(before.config)
  assert (middle.seed, first.name, first.config.seed) == (2, "a", 1)
  assert initial.split(first.config) == (first.config, None)
  assert first.config.init_from == "x"


def test_another_first_stage_is_another_run(staged):
  before = (staged / "config.json").read_bytes()
  with pytest.raises(ValueError, match=r"init\.epochs: 1 there, 2 here"):
    train.train_and_evaluate(
      make({**STAGES, "init": {**STAGES["init"], "epochs": 2}}), str(staged)
    )
  assert (staged / "config.json").read_bytes() == before
  assert workdir_lib.result(staged)
