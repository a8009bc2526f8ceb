"""Whole runs in this process: what they leave behind, and what repeats."""

import contextlib
import importlib
import json
import logging
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import storage
from kd_jax.interop import card as card_lib
from kd_jax.interop import store
from kd_jax.models import base
from kd_jax.runs import checkpoint, errors, finished, train, writers
from kd_jax.runs import config as config_lib

STEPS_PER_EPOCH, EPOCHS = 4, 3
TOTAL = STEPS_PER_EPOCH * EPOCHS
TINY = {
  "student.name": "_tiny",
  "data.image_size": 8,
  "data.num_examples": 32,
  "data.crop_padding": 1,
  "batch_size": 8,
  "epochs": EPOCHS,
  "checkpoint.every_steps": 3,
  "log.every_steps": 2,
  "parallel.num_devices": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _compile_fast(fast_compile_module):
  """Runs of one program compile it once."""


def make_config(name, changes=()):
  config = importlib.import_module(f"configs.{name}_cifar").get_config("smoke")
  if config.teacher.name:
    config.teacher.name = "_tiny_wide"
    config.teacher.epochs = 1
  config.update_from_flattened_dict({**TINY, **dict(changes)})
  return config.lock()


@contextlib.contextmanager
def compilations():
  """Names of the functions compiled meanwhile."""
  names = []

  class Handler(logging.Handler):
    def emit(self, record):
      found = re.match(r"Compiling (?:\w+\()?(\w+)", record.getMessage())
      if found:
        names.append(found[1])

  handler, logger = Handler(), logging.getLogger("jax._src.interpreters.pxla")
  before = logger.level, logger.propagate
  logger.addHandler(handler)
  logger.setLevel(logging.DEBUG)
  logger.propagate = False
  try:
    yield names
  finally:
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.propagate = before[1]


def newest(workdir):
  return checkpoint.read_latest(workdir / "checkpoints")


def steps_saved(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def lines(workdir):
  return (workdir / "metrics.jsonl").read_text().splitlines()


def assert_same_bits(ours, theirs):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours),
    jax.tree.leaves(theirs),
    strict=True,
  ):
    assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def assert_close(ours, theirs):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours),
    jax.tree.leaves(theirs),
    strict=True,
  ):
    error = np.abs(a - b).max() / (np.abs(b).max() or 1)
    assert error < 1e-5, jax.tree_util.keystr(path)


def contents(folder):
  return {
    p: (p.stat().st_mtime_ns, p.read_bytes())
    for p in folder.rglob("*")
    if p.is_file()
  }


GRAIN = {"data.pipeline": "grain", "parallel.num_devices": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """KD on two devices, from nothing: (workdir, result, compiled names)."""
  workdir = tmp_path_factory.mktemp("runs") / "first"
  config = make_config("kd", GRAIN)
  with compilations() as names:
    result = train.train_and_evaluate(config, str(workdir))
  return workdir, result, names


def test_the_result(first):
  workdir, result, _ = first
  assert result == json.loads((workdir / "result.json").read_text())
  records = storage.read_metrics(workdir / "metrics.jsonl")
  scores = [
    {k: v for k, v in r.items() if k not in ("step", "kind")}
    for r in records
    if r["kind"] == "eval"
  ]
  assert [s["epoch"] for s in scores] == [1, 2, 3]
  assert result["final"] == scores[-1]
  assert result["best"] == max(scores, key=lambda s: s["top1"])
  assert set(result["final"]) == {"top1", "top5", "ce", "epoch"}
  state = newest(workdir).state
  assert (
    result["parameters"]
    == base.count_parameters(state["params"]["student"])
    > 1000
  )
  assert result["distiller_parameters"] == 0
  assert result["steps"] == TOTAL
  assert result["seconds"] > 0 and result["images_per_second"] > 0
  assert (result["student"], result["method"]) == ("_tiny", "kd")
  assert result["seed"] == 0 and "CPU" in result["hardware"]


def test_the_metrics(first):
  workdir, _, _ = first
  records = storage.read_metrics(workdir / "metrics.jsonl")
  trained = [r for r in records if r["kind"] == "train"]
  assert [r["step"] for r in trained] == list(range(2, TOTAL + 1, 2))
  assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8, 12]
  for record in trained:
    assert record["epoch"] == record["step"] / STEPS_PER_EPOCH
    total = record["ce"] + record["kd"]  # both weigh 1
    np.testing.assert_allclose(record["loss"], total, rtol=1e-5)
    assert 0 <= record["top1"] <= 100
  # Reduced after the first epoch.
  rates = [r["learning_rate"] for r in trained]
  np.testing.assert_allclose(rates, [0.05] * 2 + [0.005] * 4, rtol=1e-6)


def test_the_workdir(first):
  workdir, result, _ = first
  assert {p.name for p in workdir.iterdir()} == {
    *("config.json", "environment.json", "result.json", "teacher.json"),
    *("metrics.jsonl", "tensorboard", "checkpoints", "best", "export"),
  }
  config = json.loads((workdir / "config.json").read_text())
  assert config["optim"]["learning_rate"] == 0.05  # as settled
  environment = json.loads((workdir / "environment.json").read_text())
  assert environment["versions"]["jax"] == jax.__version__
  assert environment["command"]
  assert steps_saved(workdir) == [9, 12]
  events = list((workdir / "tensorboard").iterdir())
  assert len(events) == 1 and b"eval/top1" in events[0].read_bytes()
  best = {p.name for p in (workdir / "best").iterdir()}
  assert best == {str(result["best"]["epoch"] * STEPS_PER_EPOCH)}
  card = card_lib.read_card(workdir / "export")
  assert card["test"] == result["best"]
  assert card["parameters"] == result["parameters"]


def test_the_teacher(first):
  workdir, result, _ = first
  (folder,) = (workdir.parent / "teachers").iterdir()
  assert result["teacher"]["checkpoint"] == str(folder)
  assert result["teacher"]["name"] == "_tiny_wide"
  own = json.loads((folder / "result.json").read_text())
  assert own["steps"] == STEPS_PER_EPOCH and own["method"] == "none"
  assert own["teacher"] == {}
  # Evaluated again, by the student's run, before it was used.
  for name in ("top1", "top5", "ce"):
    np.testing.assert_allclose(
      result["teacher"][name], own["best"][name], rtol=1e-5
    )
  # And no part of the student's checkpoint.
  wide = set(store.load(folder).variables["params"])
  state = newest(workdir).state
  assert set(state["params"]) == {"student"}
  shapes = {x.shape for x in jax.tree.leaves(state)}
  assert wide and (32, 10) not in shapes and (8, 10) in shapes


def test_one_compilation(first):
  _, _, names = first
  assert names.count("train_chunk") == 2  # the teacher's run, and this one
  # The teacher at the end of its run, its own scores, and the student.
  assert names.count("eval_chunk") == 3


def test_a_finished_run_is_not_repeated(first, monkeypatch):
  workdir, result, _ = first
  before = contents(workdir.parent)
  monkeypatch.setattr(train, "Run", None)
  again = train.train_and_evaluate(make_config("kd", GRAIN), str(workdir))
  assert again == result
  assert contents(workdir.parent) == before


def test_another_teacher_is_refused(first):
  workdir, _, _ = first
  copy = workdir.with_name("another_teacher")
  shutil.copytree(workdir, copy)
  (copy / "result.json").unlink()
  made = copy / "teacher.json"
  about = json.loads(made.read_text())
  made.write_text(
    json.dumps({**about, "fingerprint": about["fingerprint"] ^ 1})
  )
  before = contents(copy)
  with pytest.raises(ValueError, match=r"expected the weights that .* began"):
    train.train_and_evaluate(make_config("kd", GRAIN), str(copy))
  assert contents(copy) == before


class _PowerCutError(BaseException):
  pass


def test_an_interrupted_run_ends_the_same(first, monkeypatch, capsys):
  """Same seed, same bits; steps that are made twice are noted once."""
  first_workdir, first_result, _ = first
  workdir = first_workdir.with_name("interrupted")
  config = make_config("kd", GRAIN)
  teachers = contents(first_workdir.parent / "teachers")
  dispatch = train.Loop._dispatch

  def cut(self):
    if self.step == 5:
      self.trial.checkpoints.wait()
      raise _PowerCutError
    dispatch(self)

  with monkeypatch.context() as patch:
    patch.setattr(train.Loop, "_dispatch", cut)
    with pytest.raises(_PowerCutError):
      train.train_and_evaluate(config, str(workdir))
  # Within an epoch, and between two lines of metrics.
  assert steps_saved(workdir) == [3]
  assert not (workdir / "result.json").exists()
  assert json.loads(lines(workdir)[-1])["step"] == 4
  out = capsys.readouterr().out
  assert "teacher _tiny_wide: reusing" in out and "training" not in out

  with compilations() as names:
    result = train.train_and_evaluate(config, str(workdir))
  assert f"going on from step 3 of {TOTAL}" in capsys.readouterr().out
  assert names.count("train_chunk") == 1
  assert_same_bits(newest(workdir).state, newest(first_workdir).state)
  assert lines(workdir) == lines(first_workdir)
  for name in ("final", "best", "teacher", "parameters", "steps"):
    assert result[name] == first_result[name]
  assert contents(first_workdir.parent / "teachers") == teachers
  exported = [
    storage.restore_tree(folder / "export" / "checkpoint")
    for folder in (workdir, first_workdir)
  ]
  assert_same_bits(*exported)


def test_evaluation_does_not_stop_the_devices(first, monkeypatch):
  """They have the next epoch's work before anybody waits for its scores."""
  events = []
  dispatch, evaluator = train.Loop._dispatch, train.Run._evaluator

  def noted_dispatch(self):
    map_chunk = self.run_.train_chunk

    def chunk(*arguments):
      events.append("train")
      return map_chunk(*arguments)

    with monkeypatch.context() as patch:
      patch.setattr(self.run_, "train_chunk", chunk)
      dispatch(self)

  def noted_evaluator(self, *networks):
    begin = evaluator(self, *networks)

    def noted(*variables):
      scores = begin(*variables)
      events.append("evaluate")

      def wait():
        events.append("score")
        return scores()

      return wait

    return noted

  monkeypatch.setattr(train.Loop, "_dispatch", noted_dispatch)
  monkeypatch.setattr(train.Run, "_evaluator", noted_evaluator)
  workdir = first[0].with_name("beside")
  changes = {
    "steps_per_dispatch": STEPS_PER_EPOCH,
    "checkpoint.every_steps": 0,
    "teacher.checkpoint": first[1]["teacher"]["checkpoint"],
  }
  result = train.train_and_evaluate(
    make_config("kd", {**GRAIN, **changes}), str(workdir)
  )
  # The teacher's, then that of three epochs.
  assert events == ["evaluate", "score", "train", "evaluate"] + (
    ["train", "score", "evaluate"] * 2 + ["score"]
  )
  for name in ("final", "best"):
    assert result[name] == pytest.approx(first[1][name], rel=1e-5)
  # The best was kept though its arrays had been given away.
  best, other = (
    finished.run_model(path).variables for path in (workdir, first[0])
  )
  assert_close(best, other)


def test_the_best_is_what_is_on_disk(first):
  """A restart finds one of after its checkpoint; another finds none."""
  workdir = first[0].with_name("best_on_disk")
  ends = shutil.ignore_patterns("export", "result.json")
  shutil.copytree(first[0], workdir, ignore=ends)
  shutil.rmtree(workdir / "checkpoints" / str(TOTAL))
  kept = checkpoint.read_latest(workdir / "best")
  shutil.rmtree(workdir / "best")
  # An epoch that the restart makes again, and scores otherwise.
  scores = {**first[1]["best"], "top1": 100.0, "epoch": EPOCHS}
  card = {**kept.meta["card"], "test": scores}
  writer = checkpoint.Checkpointer(workdir / "best")
  writer.save(TOTAL, kept.state, position={}, meta={"card": card})
  writer.close()
  config = make_config("kd", GRAIN)
  result = train.train_and_evaluate(config, str(workdir))
  assert result["best"] == scores
  assert card_lib.read_card(workdir / "export")["test"] == scores
  assert result["final"] == first[1]["final"]

  # After the last step, the best cannot be read.
  (workdir / "result.json").unlink()
  shutil.rmtree(workdir / "export")
  (step,) = (workdir / "best").iterdir()
  for path in (step / "state").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  result = train.train_and_evaluate(config, str(workdir))
  assert result["best"] == result["final"] == first[1]["final"]
  assert card_lib.read_card(workdir / "export")["test"] == result["best"]
  assert (workdir / "best_corrupt" / step.name).exists()


def test_other_devices_and_dispatches_give_the_same_run(first):
  workdir = first[0].with_name("others")
  changes = {
    "data.pipeline": "grain",
    "parallel.num_devices": 4,
    "parallel.mapping": "pmap",
    "steps_per_dispatch": 4,
  }
  train.train_and_evaluate(make_config("kd", changes), str(workdir))
  ours, theirs = (newest(path).state for path in (workdir, first[0]))
  assert_close(ours["params"], theirs["params"])


def test_a_cpu_run_goes_on_where_a_dispatch_is_an_epoch(first, monkeypatch):
  """As on a GPU, from a checkpoint of within an epoch."""
  workdir = first[0].with_name("moved")
  config = make_config("kd", GRAIN)
  assert config.steps_per_dispatch == 0
  save = train.Trial.save

  def cut(self, step, *arguments):
    if step == 6:
      raise _PowerCutError
    save(self, step, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(train.Trial, "save", cut)
    with pytest.raises(_PowerCutError):
      train.train_and_evaluate(config, str(workdir))
  assert steps_saved(workdir) == [3]
  monkeypatch.setattr(config_lib, "steps_per_dispatch", lambda *_, **__: 4)
  train.train_and_evaluate(config, str(workdir))
  # Another program, of other roundings.
  ours, theirs = (newest(path).state for path in (workdir, first[0]))
  assert_close(ours["params"], theirs["params"])
  evals = [
    r["step"]
    for r in storage.read_metrics(workdir / "metrics.jsonl")
    if r["kind"] == "eval"
  ]
  assert evals == [4, 8, 12]


def test_stopped_while_the_last_epoch_is_evaluated(tmp_path, monkeypatch):
  config = make_config("teacher", {"epochs": 1, "checkpoint.every_steps": 0})
  begin = train.Trial.begin_evaluation

  def signalled(self, *arguments):
    signal.raise_signal(signal.SIGTERM)
    begin(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(train.Trial, "begin_evaluation", signalled)
    with pytest.raises(errors.PreemptedError, match="step 4, saved in"):
      train.train_and_evaluate(config, str(tmp_path))
  assert not (tmp_path / "result.json").exists()
  assert train.train_and_evaluate(config, str(tmp_path))["steps"] == 4


@pytest.mark.parametrize("what", ["metrics", "checkpoint"])
def test_what_cannot_be_saved_ends_the_run(tmp_path, monkeypatch, what):
  changes = {"epochs": 2, "checkpoint.every_steps": 3, "log.every_steps": 1}
  config = make_config("teacher", changes)
  full = OSError(28, "No space left on device")
  of, name = {
    "metrics": (writers.Writer, "write"),
    "checkpoint": (checkpoint.Checkpointer, "save"),
  }[what]
  whole = getattr(of, name)

  def fail(self, step, *arguments, **more):
    if step == 6:
      raise full
    whole(self, step, *arguments, **more)

  with monkeypatch.context() as patch:
    patch.setattr(of, name, fail)
    with pytest.raises(
      errors.UnsavedError, match=r"No space left .* resumes from step 3$"
    ):
      train.train_and_evaluate(config, str(tmp_path))
  assert steps_saved(tmp_path) == [3]
  assert train.train_and_evaluate(config, str(tmp_path))["steps"] == 8


def test_another_seed_is_another_run(first):
  workdir = first[0].with_name("seed")
  config = make_config("kd", {**GRAIN, "seed": 1, "epochs": 1})
  result = train.train_and_evaluate(config, str(workdir))
  assert result["seed"] == 1
  # The teacher's seed is its own: it is the same teacher.
  assert result["teacher"] == first[1]["teacher"]
  ours, theirs = (
    next(r for r in storage.read_metrics(p / "metrics.jsonl") if r["step"] == 2)
    for p in (workdir, first[0])
  )
  assert abs(ours["loss"] - theirs["loss"]) > 1e-3


def build(tmp_path, name, changes):
  config = make_config(name, changes)
  sources = train._sources(config)
  return train.Run(
    config_lib.resolve_defaults(config, sources[0]), tmp_path, *sources
  )


def test_data_depend_on_the_seed_alone(tmp_path):
  """Whatever the networks, the method and the devices."""
  runs = [
    build(tmp_path, "kd", {"parallel.num_devices": 2}),
    build(tmp_path, "teacher", {"student.name": "_tiny_wide"}),
    build(tmp_path, "teacher", {"seed": 1}),
    build(tmp_path, "kd", {"seed": 1, "data.seed": 0}),
  ]
  orders, images = [], []
  for run in runs:
    rows = [run.pipeline.next_chunk(4)["index"] for _ in range(3)]
    orders.append(np.concatenate(rows))
    batch = run.pipeline.load(run.pipeline.resident, {"index": jnp.arange(8)})
    images.append(run._transform(jax.random.key(3), batch))
  np.testing.assert_array_equal(orders[0], orders[1])
  np.testing.assert_array_equal(images[0], images[1])
  assert (orders[0] != orders[2]).any()
  np.testing.assert_array_equal(orders[0], orders[3])
  # Augmented: not what the normalisation alone makes of them.
  assert np.abs(images[0] - runs[0].normalize(batch["image"])).max() > 0.1


def diverge(workdir, **changes):
  """Makes a run whose second step cannot be finite; returns the error."""
  changes = {"optim.learning_rate": 1e30, **changes}
  with pytest.raises(errors.NonFiniteLossError) as caught:
    train.train_and_evaluate(make_config("teacher", changes), str(workdir))
  assert not (workdir / "result.json").exists()
  records = storage.read_metrics(workdir / "metrics.jsonl")
  assert all(np.isfinite(r["loss"]) for r in records)
  return str(caught.value)


def test_a_loss_that_is_not_finite(tmp_path):
  workdir = tmp_path / "run"
  said = diverge(workdir, **{"checkpoint.every_steps": 1})
  assert re.search(
    r"step 2: the loss is not finite \(terms: ce\)\. The last checkpoint, of"
    r" step 1, is from before it\. Lower config\.optim\.learning_rate \(now"
    r" 1e\+30\)",
    said,
  )
  assert steps_saved(workdir) == [1]
  assert newest(workdir).step == 1


def test_it_is_not_kept(tmp_path):
  """Four steps to a dispatch: when it is seen, two more have been made."""
  workdir = tmp_path / "run"
  changes = {"steps_per_dispatch": 4, "checkpoint.every_steps": 4}
  said = diverge(workdir, **changes)
  assert re.search(r"step 2: .* No checkpoint had been written\. Lower", said)
  assert steps_saved(workdir) == []
