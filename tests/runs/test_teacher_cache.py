"""The teacher's logits on disk: equal to the teacher, or refused."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import normal

from kd_jax.runs import checkpoint, loop, teacher_cache, train
from kd_jax.training import cached_logits

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


def make_config(changes=(), method="kd"):
  config = importlib.import_module(f"configs.{method}_cifar").get_config(
    "smoke"
  )
  config.update_from_flattened_dict({**TINY, **dict(changes)})
  return config.lock()


def run(workdir, changes=(), **options):
  """Trains; returns the last state's arrays."""
  train.train_and_evaluate(make_config(changes, **options), str(workdir))
  return newest(workdir)


def newest(workdir):
  state = checkpoint.read_latest(workdir / "checkpoints").state
  return jax.tree.leaves(state["params"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(folder, cached run's changes, its arrays)."""
  folder = tmp_path_factory.mktemp("cache")
  changes = {
    "teacher.cache": str(folder / "cache"),
    "teacher.cache_dtype": "float32",
  }
  return folder, changes, run(folder / "first", changes)


def test_equals_the_teacher(made):
  folder, _, cached = made
  for ours, theirs in zip(run(folder / "online"), cached, strict=True):
    scale = np.abs(theirs).max() or 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


def test_later_runs_do_not_run_the_teacher(made, monkeypatch):
  """Whatever their number of devices; also one that is stopped and resumed."""
  folder, changes, cached = made

  def refuse(*_):
    raise AssertionError("the teacher runs")

  monkeypatch.setattr(teacher_cache.TeacherCache, "_compute", refuse)
  dispatch, count = loop.Loop.dispatch, []

  def stopping(self):
    dispatch(self)
    count.append(self.step)
    if len(count) == 5:
      raise KeyboardInterrupt

  monkeypatch.setattr(loop.Loop, "dispatch", stopping)
  with pytest.raises(KeyboardInterrupt):
    run(folder / "second", changes)
  for ours, theirs in zip(run(folder / "second", changes), cached, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert count[5] == 4  # saved at 3
  two = run(folder / "two", {**changes, "parallel.num_devices": 2})
  for ours, theirs in zip(two, cached, strict=True):
    scale = np.abs(theirs).max() or 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.full
def test_images_that_grain_reads(tmp_path, monkeypatch):
  changes = {"data.pipeline": "grain", "data.num_workers": 0}
  cached = {**changes, "teacher.cache": str(tmp_path / "cache")}
  cached["teacher.cache_dtype"] = "float32"
  online = run(tmp_path / "online", changes)
  first = run(tmp_path / "first", cached)
  monkeypatch.setattr(teacher_cache.TeacherCache, "_compute", None)
  later = run(tmp_path / "later", cached)
  for a, b, c in zip(online, first, later, strict=True):
    scale = np.abs(a).max() or 1
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
    np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize(
  ("field", "value", "name"),
  [
    ("batch_size", 16, "batch_size"),
    ("data.crop_padding", 2, "data.crop_padding"),
    ("teacher.seed", 1, "weights"),
    ("teacher.cache_top_k", 2, "teacher.cache_top_k"),
  ],
)
def test_another_schedule_is_refused(made, tmp_path, field, value, name):
  folder, changes, _ = made
  if name != "weights":
    (teacher,) = (folder / "teachers").iterdir()
    changes = {**changes, "teacher.checkpoint": str(teacher)}
  with pytest.raises(ValueError, match=f"was computed with {name} "):
    run(tmp_path / "run", {**changes, field: value})


@pytest.mark.parametrize(
  "damage", [lambda raw: raw[:-100], lambda raw: raw[:200] + b"x" + raw[201:]]
)
def test_a_damaged_part_is_refused(made, request, damage):
  folder, changes, _ = made
  (path,) = (folder / "cache").rglob("epoch_00002/part_*")
  whole = path.read_bytes()
  path.write_bytes(damage(whole))
  try:
    with pytest.raises(ValueError, match=rf"{path} is damaged .* Remove it"):
      run(folder / request.node.name, changes)
  finally:
    path.write_bytes(whole)


@pytest.mark.parametrize(
  ("method", "changes", "words"),
  [
    ("at", {}, r"reads the teacher's logits alone \(kd, .*got 'at'"),
    ("kd", {"data.mixup": 1.0}, "not mixed"),
    ("kd", {"teacher.cache_dtype": "bfloat16"}, "float16, float32, got 'bf"),
    ("kd", {"teacher.cache": "", "teacher.cache_top_k": 5}, "cache_top_k: ex"),
  ],
)
def test_what_has_no_cache(tmp_path, method, changes, words):
  changes = {"teacher.cache": str(tmp_path / "cache"), **changes}
  with pytest.raises(ValueError, match=words):
    train.prepare(make_config(changes, method), tmp_path / "run")


def test_what_is_kept_of_the_largest():
  logits = jnp.asarray(3 * normal(0, 2, 4, 20))
  whole = jax.nn.log_softmax(logits)
  errors = []
  for k in (1, 5, 19, 20):
    kept = cached_logits.compress(logits, top_k=k, dtype=jnp.float32)
    made = jax.nn.log_softmax(cached_logits.expand(kept, 20).logits)
    largest = jnp.argsort(-logits, axis=-1)[..., :k]
    np.testing.assert_allclose(
      *(jnp.take_along_axis(x, largest, -1) for x in (made, whole)), rtol=1e-4
    )
    errors.append(float(jnp.sum(jnp.exp(whole) * (whole - made), -1).max()))
  assert errors[0] > errors[1] > 1e-3
  np.testing.assert_allclose(errors[2:], 0, atol=1e-6)
