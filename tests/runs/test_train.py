"""Whole runs in this process: what they leave behind, and what repeats."""

import contextlib
import dataclasses
import errno
import importlib
import json
import logging
import os
import pathlib
import re
import shutil
import signal

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import storage
from kd_jax.interop import card as card_lib
from kd_jax.interop import store
from kd_jax.models import base
from kd_jax.runs import (
  checkpoint,
  components,
  errors,
  evaluator,
  exits,
  finished,
  journal,
  limits,
  loop,
  programs,
  train,
  writers,
)
from kd_jax.runs import workdir as workdir_lib
from kd_jax.training import loss

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


def lines(workdir):
  records = storage.read_metrics(workdir / "metrics.jsonl")
  return [
    {k: v for k, v in record.items() if k != "images_per_second"}
    for record in records
  ]


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
    if p.is_file() and p.name != ".lock"
  }


GRAIN = {"data.pipeline": "grain", "parallel.num_devices": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """KD on two devices, from nothing: (workdir, result, compiled names)."""
  programs.make_programs.cache_clear()
  programs.network_eval_chunk.cache_clear()
  workdir = tmp_path_factory.mktemp("runs") / "first"
  config = make_config("kd", GRAIN)
  # Its user has set JAX_NUMPY_RANK_PROMOTION.
  with compilations() as names, jax.numpy_rank_promotion("raise"):
    result = train.train_and_evaluate(config, str(workdir))
  return workdir, result, names


def test_result_and_metrics(first):
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
  count = base.count_parameters(state["params"]["student"])
  assert result["parameters"] == count > 1000
  assert result["distiller_parameters"] == 0 and result["steps"] == TOTAL
  assert result["seconds"] > 0 and result["images_per_second"] > 0
  assert (result["student"], result["method"]) == ("_tiny", "kd")
  assert result["seed"] == 0 and "CPU" in result["hardware"]
  trained = [r for r in records if r["kind"] == "train"]
  assert [r["step"] for r in trained] == list(range(2, TOTAL + 1, 2))
  assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8, 12]
  for line in trained:
    assert line["epoch"] == line["step"] / STEPS_PER_EPOCH
    # Both terms weigh 1.
    np.testing.assert_allclose(line["loss"], line["ce"] + line["kd"], rtol=1e-5)
    assert 0 <= line["top1"] <= 100
    assert line is trained[0] or line["images_per_second"] > 0
  # Reduced after the first epoch.
  rates = [r["learning_rate"] for r in trained]
  np.testing.assert_allclose(rates, [0.05] * 2 + [0.005] * 4, rtol=1e-6)


def test_the_workdir(first):
  workdir, result, _ = first
  assert {p.name for p in workdir.iterdir()} == {
    *("config.json", "data.json", "environment.json", "result.json"),
    *("checkpoints", "best", "export", "metrics.jsonl", "teacher.json"),
    *("tensorboard", ".lock"),
  }
  config = storage.read_json(workdir / "config.json")
  assert config["optim"]["learning_rate"] == 0.05  # the resolved default
  assert checkpoint.steps(workdir / "checkpoints") == [9, 12]
  (events,) = (workdir / "tensorboard").iterdir()
  assert b"eval/top1" in events.read_bytes()
  best = [result["best"]["epoch"] * STEPS_PER_EPOCH]
  assert checkpoint.steps(workdir / "best") == best
  card = card_lib.read_card(workdir / "export")
  assert card["test"] == result["best"]
  assert card["parameters"] == result["parameters"]


def test_the_teacher(first):
  workdir, result, _ = first
  (folder,) = (workdir.parent / "teachers").iterdir()
  assert result["teacher"]["checkpoint"] == str(folder)
  assert result["teacher"]["name"] == "_tiny_wide"
  own = storage.read_json(folder / "result.json")
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


def test_another_seed_compiles_nothing(first):
  _, _, names = first
  assert names.count("train_chunk") == 2  # the teacher's run, and this one
  # The teacher at the end of its run, its own scores, and the student.
  assert names.count("eval_chunk") == 3
  workdir = first[0].with_name("seed")
  config = make_config("kd", {**GRAIN, "seed": 1})
  with compilations() as names:
    result = train.train_and_evaluate(config, str(workdir))
  assert not {"train_chunk", "eval_chunk"} & set(names)
  assert not any("lambda" in name or "init" in name for name in names)
  assert result["seed"] == 1
  # The teacher's seed is its own: it is the same teacher.
  assert result["teacher"] == first[1]["teacher"]
  ours, theirs = (
    storage.read_metrics(path / "metrics.jsonl")[0]
    for path in (workdir, first[0])
  )
  assert abs(ours["loss"] - theirs["loss"]) > 1e-3


def test_a_finished_run_is_not_repeated(first, monkeypatch):
  workdir, result, _ = first
  before = contents(workdir.parent)
  monkeypatch.setattr(components, "build", None)
  again = train.train_and_evaluate(make_config("kd", GRAIN), str(workdir))
  assert again == result
  assert contents(workdir.parent) == before


def test_another_teacher_is_refused(first):
  workdir, _, _ = first
  copy = shutil.copytree(workdir, workdir.with_name("another_teacher"))
  (copy / "result.json").unlink()
  about = storage.read_json(copy / "teacher.json")
  about["fingerprint"] ^= 1
  storage.write_json(copy / "teacher.json", about)
  before = contents(copy)
  with pytest.raises(ValueError, match=r"expected the weights that .* began"):
    train.train_and_evaluate(make_config("kd", GRAIN), str(copy))
  assert contents(copy) == before


class PowerCutError(BaseException):
  pass


@pytest.fixture
def interrupt(first, monkeypatch):
  """interrupt(name) -> workdir of a run that lost its power at step 5."""
  dispatch = loop.Loop.dispatch

  def cut(self):
    if self.step == 5:
      self._journal.wait()
      raise PowerCutError
    dispatch(self)

  def make(name):
    workdir = first[0].with_name(name)
    with monkeypatch.context() as patch:
      patch.setattr(loop.Loop, "dispatch", cut)
      with pytest.raises(PowerCutError):
        train.train_and_evaluate(make_config("kd", GRAIN), str(workdir))
    # Within an epoch, and between two lines of metrics.
    assert checkpoint.steps(workdir / "checkpoints") == [3]
    assert lines(workdir)[-1]["step"] == 4
    return workdir

  return make


def test_an_interrupted_run_ends_the_same(first, interrupt, capsys):
  """Same seed, same bits; steps that are made twice are noted once."""
  first_workdir, first_result, _ = first
  teachers = contents(first_workdir.parent / "teachers")
  workdir = interrupt("interrupted")
  out = capsys.readouterr().out
  assert "teacher _tiny_wide: reusing" in out and "training" not in out
  result = train.train_and_evaluate(make_config("kd", GRAIN), str(workdir))
  assert f"resuming from step 3 of {TOTAL}" in capsys.readouterr().out
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


def test_it_resumes_on_other_hardware(first, interrupt):
  """As on GPUs: other devices, and an epoch to a dispatch."""
  workdir = interrupt("moved")
  changes = {
    "data.pipeline": "grain",
    "parallel.num_devices": 4,
    "parallel.mapping": "pmap",
    "steps_per_dispatch": 4,
    "eval.batch_size": 20,
  }
  train.train_and_evaluate(make_config("kd", changes), str(workdir))
  # Another program, with other roundings.
  ours, theirs = (newest(path).state for path in (workdir, first[0]))
  assert_close(ours["params"], theirs["params"])
  records = storage.read_metrics(workdir / "metrics.jsonl")
  assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8, 12]


def test_evaluation_does_not_stop_the_devices(first, monkeypatch):
  """They have the next epoch's work before anybody waits for its scores."""
  events = []
  build, begin = components.build, evaluator.Evaluator.begin

  def noted_build(*arguments):
    parts = build(*arguments)
    train_chunk = parts.programs.train_chunk

    def noted(*arguments):
      events.append("train")
      return train_chunk(*arguments)

    made = dataclasses.replace(parts.programs, train_chunk=noted)
    return dataclasses.replace(parts, programs=made)

  def noted_begin(self, *arguments):
    scores = begin(self, *arguments)
    events.append("evaluate")

    def wait():
      events.append("score")
      return scores()

    return wait

  monkeypatch.setattr(components, "build", noted_build)
  monkeypatch.setattr(evaluator.Evaluator, "begin", noted_begin)
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
  # A worse one must not take its place.
  with pytest.raises(
    ValueError,
    match=rf"best: expected .* of epoch {EPOCHS} \(top-1 100\.00 %\)",
  ) as caught:
    train.train_and_evaluate(config, str(workdir))
  assert "\n" not in str(caught.value)
  assert not (workdir / "result.json").exists()


def test_stopped_while_the_last_epoch_is_evaluated(tmp_path, monkeypatch):
  config = make_config("teacher", {"epochs": 1, "checkpoint.every_steps": 0})
  begin = journal.Journal.begin_evaluation

  def signalled(self, *arguments):
    signal.raise_signal(signal.SIGTERM)
    begin(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(journal.Journal, "begin_evaluation", signalled)
    with pytest.raises(errors.PreemptedError, match="SIGTERM at step 4, saved"):
      train.train_and_evaluate(config, str(tmp_path))
  assert not (tmp_path / "result.json").exists()
  assert train.train_and_evaluate(config, str(tmp_path))["steps"] == 4


@pytest.mark.parametrize("what", ["metrics", "checkpoint", "last checkpoint"])
def test_what_cannot_be_saved_ends_the_run(tmp_path, monkeypatch, what):
  changes = {"epochs": 2, "checkpoint.every_steps": 3, "log.every_steps": 1}
  config = make_config("teacher", changes)
  of, name = {
    "metrics": (writers.Writer, "write"),
    "checkpoint": (checkpoint.Checkpointer, "save"),
  }[what.removeprefix("last ")]
  whole = getattr(of, name)
  stopped = what == "last checkpoint"
  kind = errors.StoppedUnsavedError if stopped else errors.UnsavedError

  def fail(self, step, *arguments, **more):
    if step == 6:
      if stopped:
        signal.raise_signal(signal.SIGTERM)
      raise OSError(28, "No space left on device")
    whole(self, step, *arguments, **more)

  with monkeypatch.context() as patch:
    patch.setattr(of, name, fail)
    with pytest.raises(
      kind, match=r"No space left .* resumes from step 3$"
    ) as raised:
      train.train_and_evaluate(config, str(tmp_path))
  assert raised.type is kind
  assert checkpoint.steps(tmp_path / "checkpoints") == [3]
  assert train.train_and_evaluate(config, str(tmp_path))["steps"] == 8


@pytest.mark.parametrize("when", ["save", "wait"])
def test_a_best_that_could_not_be_saved_is_made_good(
  when, tmp_path, monkeypatch
):
  """Epoch 2 of 3 is the best one; the disk is full when it is saved."""
  changes = {"checkpoint.every_steps": 2}
  config, top1 = make_config("teacher", changes), {1: 10.0, 2: 40.0, 3: 30.0}
  begin = journal.Journal.begin_evaluation

  def scored(self, step, epoch, state):
    begin(self, step, epoch, state)
    scores = {"top1": top1[epoch], "top5": 50.0, "ce": 1.0}
    self._unscored = self._unscored._replace(scores=lambda: scores)

  monkeypatch.setattr(journal.Journal, "begin_evaluation", scored)
  whole = checkpoint.Checkpointer.save
  full = OSError(28, "No space left on device")

  def save(self, step, *arguments, **more):
    if self._directory.name == "best" and step == 8:
      if when == "save":
        raise full
      self._checkpointer.wait_until_finished = fail  # of Orbax's own thread
      return
    whole(self, step, *arguments, **more)

  def fail():
    raise full

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, "save", save)
    with pytest.raises(errors.UnsavedError, match=r"No space left .* step 6$"):
      train.train_and_evaluate(config, str(tmp_path))
  result = train.train_and_evaluate(config, str(tmp_path))
  assert (result["best"]["epoch"], result["best"]["top1"]) == (2, 40.0)
  assert card_lib.read_card(tmp_path / "export")["test"] == result["best"]
  assert checkpoint.steps(tmp_path / "best") == [8]


def test_scores_that_are_not_finite_are_never_the_best(tmp_path, monkeypatch):
  ce = {1: 2.0, 2: np.nan, 3: np.inf}
  begin = journal.Journal.begin_evaluation

  def scored(self, step, epoch, state):
    begin(self, step, epoch, state)
    scores = {"top1": 10.0 * epoch, "top5": 50.0, "ce": ce[epoch]}
    self._unscored = self._unscored._replace(scores=lambda: scores)

  monkeypatch.setattr(journal.Journal, "begin_evaluation", scored)
  config = make_config("teacher")
  result = train.train_and_evaluate(config, str(tmp_path / "a"))
  assert (result["best"]["epoch"], result["final"]["epoch"]) == (1, 3)
  assert storage.read_json(tmp_path / "a/result.json")["final"]["ce"] is None
  ce[1] = np.nan
  with pytest.raises(errors.NonFiniteLossError, match="no evaluation"):
    train.train_and_evaluate(config, str(tmp_path / "b"))


@pytest.mark.parametrize("lost", ["", "best", "checkpoints", "read-only"])
def test_files_lost_under_a_run_end_it(lost, tmp_path, monkeypatch, capfd):
  config = make_config("teacher", {"checkpoint.every_steps": 4})
  workdir, dispatch = tmp_path / "a", loop.Loop.dispatch

  def lose(self):
    if self.step == 9:
      self._journal.wait()
      if lost == "read-only":  # as the kernel says, also to root
        patch.setattr(pathlib.Path, "mkdir", refuse)
        patch.setattr(os, "makedirs", refuse)
        patch.setattr(os, "mkdir", refuse)
      else:
        shutil.rmtree(workdir / lost)
    dispatch(self)

  def refuse(path, *arguments, **more):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

  with monkeypatch.context() as patch:
    patch.setattr(loop.Loop, "dispatch", lose)
    with pytest.raises(SystemExit) as ended, exits.explained_errors():
      train.train_and_evaluate(config, str(workdir))
  assert ended.value.code == 1
  err = capfd.readouterr().err
  assert err.count("\n") == 1 and str(workdir) in err, err
  assert ("Read-only" if lost == "read-only" else "is gone") in err


def test_one_run_at_a_time_uses_a_workdir(first, tmp_path, monkeypatch):
  config = make_config("teacher", {"epochs": 1})
  with workdir_lib.locked(tmp_path / "a"):
    # As another process: a lock of its own.
    own = filelock.FileLock
    monkeypatch.setattr(filelock, "FileLock", lambda path, **_: own(path))
    before = contents(tmp_path)
    with pytest.raises(
      ValueError, match=rf"in use by another run \(process {os.getpid()} on "
    ) as caught:
      train.train_and_evaluate(config, str(tmp_path / "a"))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    # A finished run needs no lock.
    again = train.train_and_evaluate(make_config("kd", GRAIN), str(first[0]))
    assert again == first[1]


def test_data_depend_on_the_seed_alone(tmp_path, monkeypatch):
  """Whatever the networks, the method and the devices."""
  transforms, make_loss_fn = [], loss.make_loss_fn

  def noted(*, transform, **arguments):
    transforms.append(transform)
    return make_loss_fn(transform=transform, **arguments)

  monkeypatch.setattr(loss, "make_loss_fn", noted)
  orders, images = [], []
  for name, changes in (
    ("kd", {"parallel.num_devices": 2, "data.flip": True}),
    ("teacher", {"student.name": "_tiny_wide"}),
    ("teacher", {"seed": 1}),
    ("kd", {"seed": 1, "data.seed": 0}),
  ):
    programs.make_programs.cache_clear()
    parts = train.prepare(make_config(name, changes), tmp_path).parts
    rows = [parts.pipeline.next_chunk(4)["index"] for _ in range(3)]
    orders.append(np.concatenate(rows))
    batch = parts.pipeline.load(
      parts.pipeline.resident, {"index": jnp.arange(8)}
    )
    images.append(transforms[-1](jax.random.key(3), batch))
    assert list(parts.seeds) == [
      changes.get("seed", 0),
      changes.get("data.seed", changes.get("seed", 0)),
    ]
  np.testing.assert_array_equal(orders[0], orders[1])
  np.testing.assert_array_equal(images[0], images[1])
  assert (orders[0] != orders[2]).any()
  np.testing.assert_array_equal(orders[0], orders[3])
  # Augmented: another key gives other images.
  other = transforms[-1](jax.random.key(4), batch)
  assert np.abs(images[-1] - other).max() > 0.1


@pytest.mark.parametrize(
  ("changes", "kept", "steps"),
  [
    (
      {"checkpoint.every_steps": 1},
      r"The last checkpoint, of step 1, is from before it",
      [1],
    ),
    # Four steps to a dispatch: when it is seen, two more have been made.
    (
      {"steps_per_dispatch": 4, "checkpoint.every_steps": 4},
      r"No checkpoint had been written",
      [],
    ),
  ],
)
def test_a_loss_that_is_not_finite_is_not_kept(
  tmp_path, changes, kept, steps, monkeypatch
):
  rate = limits.LIMITS["optim.learning_rate"]._replace(high=1e30)
  monkeypatch.setitem(limits.LIMITS, "optim.learning_rate", rate)
  config = make_config("teacher", {"optim.learning_rate": 1e30, **changes})
  with pytest.raises(
    errors.NonFiniteLossError,
    match=rf"step 2: .* \(terms: ce\)\. {kept}\. .*rate \(now 1e\+30\)"
    r" or a weight \(config.loss_weights: ce 1\)",
  ):
    train.train_and_evaluate(config, str(tmp_path))
  assert checkpoint.steps(tmp_path / "checkpoints") == steps
  assert not (tmp_path / "result.json").exists()
  records = storage.read_metrics(tmp_path / "metrics.jsonl")
  assert all(np.isfinite(r["loss"]) for r in records)
