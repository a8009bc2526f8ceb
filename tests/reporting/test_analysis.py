"""What students have in common with their teachers."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from kd_jax import data, storage
from kd_jax.cli import report as command
from kd_jax.interop import card, scoring, store
from kd_jax.reporting import analysis, gather, report, runs
from kd_jax.runs import teachers


def test_correlation_of_a_constant_is_0():
  logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  logits[:, 2] = 3.0
  found, others = analysis.correlation(logits), [0, 1, 3]
  assert not found[2].any() and not found[:, 2].any()
  expected = np.corrcoef(logits[:, others].T)
  np.testing.assert_allclose(found[np.ix_(others, others)], expected)


def test_shown_are_the_first_of_the_first_classes():
  labels = np.tile(np.arange(9), 150)
  expected = [i for i in range(9 * 100) if i % 9 < 7]
  assert analysis.shown(labels).tolist() == expected
  # As many as there are, and classes that the test set has.
  assert analysis.shown(np.array([5, 3, 5, 1])).tolist() == [0, 1, 2, 3]


def test_embedding_keeps_groups_together():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(3), 20)
  features = (rng.normal(size=(60, 8)) + 20 * np.eye(8)[labels]).astype("f4")
  points = analysis.embed(features)
  centres = np.stack([points[labels == k].mean(axis=0) for k in range(3)])
  distances = np.linalg.norm(points[:, None] - centres, axis=-1)
  np.testing.assert_array_equal(distances.argmin(axis=1), labels)
  np.testing.assert_array_equal(points, analysis.embed(features))
  assert not analysis.embed(np.ones_like(features)).any()
  features[0, 0] = np.nan
  assert np.isnan(analysis.embed(features)).all()


@pytest.fixture
def grid(smoke_run):
  """The finished grid of quickstart's smoke run, and its teacher's folder."""
  workdir = smoke_run("quickstart")
  return workdir, pathlib.Path(teacher_of(workdir / "kd")["checkpoint"])


def teacher_of(run):
  (teacher,) = runs.collect(run)[0]["teachers"]
  return teacher


def grouped(folder):
  return runs.group(runs.collect(folder))


def open_test_set(run):
  options = storage.read_json(run / "config.json")["data"]
  options = {name: options[name] for name in card.DATA_OPTIONS}
  return data.load("synthetic", split="test", **options)


def test_look(grid):
  run = grid[0] / "simkd"
  source, model = open_test_set(run), store.load(run)
  # A batch that the set does not fill.
  seen = analysis.look(model, source, batch_size=24)
  logits = np.asarray(model.logits(source.images))
  np.testing.assert_array_equal(seen.choices, logits.argmax(axis=1))
  np.testing.assert_allclose(
    seen.correlation, np.corrcoef(logits.T.astype(np.float64)), atol=1e-4
  )
  few = analysis.shown(source.labels)
  np.testing.assert_array_equal(seen.labels, source.labels[few])
  pooled = model.output(model.variables, source.images).features["pooled"]
  np.testing.assert_allclose(seen.features, pooled[few], atol=1e-4)
  # A SimKD student's are those that its teacher's classifier reads.
  assert seen.features.shape[1] == 128


def test_all_students_are_compared_with_the_teacher(grid):
  workdir, teacher = grid
  ((key, pair),) = report.analyse(workdir, grouped(workdir)).items()
  assert key == ("synthetic", "resnet8", "resnet8x2")
  assert pair.teacher == "resnet8x2"
  assert pair.class_names == {k: f"class {k}" for k in range(7)}
  assert list(pair.students) == ["none", "kd", "simkd"]
  source = open_test_set(workdir / "kd")
  for label, name in (("none", "alone"), ("kd", "kd"), ("simkd", "simkd")):
    student = pair.students[label]
    scores = scoring.evaluate(
      store.load(workdir / name), source, teacher=store.load(teacher)
    )
    assert student.agreement == pytest.approx([scores["agreement"]])
    assert student.difference.shape == (10, 10)
    assert student.distances == pytest.approx([student.difference.mean()])
    assert 0 < student.distances[0] < 2


def test_a_teacher_is_like_itself(grid):
  source = open_test_set(grid[0] / "kd")
  pair = analysis.compare(store.load(grid[1]), {"itself": [grid[1]]}, source)
  (student,) = pair.students.values()
  assert (student.agreement, student.distances) == ([100.0], [0.0])
  np.testing.assert_array_equal(student.points, pair.points)


def test_trials_are_compared_with_their_own_teacher(
  grid, tmp_path, monkeypatch
):
  workdir, teacher = grid
  # Two of which only the results know that they differ.
  model = store.load(teacher)
  monkeypatch.setattr(analysis, "open_teacher", lambda *_: model)
  for name in ("alone", "kd", "simkd"):
    shutil.copytree(workdir / name, tmp_path / name)
  fingerprint = teacher_of(workdir / "kd")["fingerprint"]

  def change(run, file, **fields):
    path = tmp_path / run / f"{file}.json"
    path.write_text(json.dumps({**storage.read_json(path), **fields}))

  for name in ("alone", "kd"):
    again = f"{name}_seed1"
    shutil.copytree(workdir / name, tmp_path / again)
    for file in ("config", "result"):
      change(again, file, seed=1)
  other = {**teacher_of(workdir / "kd"), "fingerprint": fingerprint + 1}
  change("kd_seed1", "result", teacher=other)
  # Of several at once, which is left out.
  change("simkd", "result", teacher=[other, other])
  pairs = report.analyse(tmp_path, grouped(tmp_path))
  names = [f"resnet8x2 {fingerprint + i:08x}" for i in range(2)]
  assert [key[2] for key in pairs] == names
  for name, pair in zip(names, pairs.values()):
    trials = {k: len(s.agreement) for k, s in pair.students.items()}
    assert trials == {"none": 2, f"kd (teacher={name})": 1}


def test_a_teacher_is_looked_for_beside_the_run(grid, tmp_path):
  workdir, teacher = grid
  source = open_test_set(workdir / "kd")
  run, there = tmp_path / "runs" / "kd", tmp_path / "there" / "t"
  beside = tmp_path / "runs" / "teachers" / "t"
  moved = {**teacher_of(workdir / "kd"), "checkpoint": str(there)}
  expected = moved["fingerprint"]

  def found(about):
    model = analysis.open_teacher(run, about, source)
    return teachers.fingerprint(model.variables)

  def refused(about, *facts):
    with pytest.raises(ValueError, match="expected its teacher") as caught:
      found(about)
    assert all(fact in str(caught.value) for fact in facts)

  refused(moved, f"resnet8x2 at {there} or {beside}")
  # What is there now is another network, or has other weights.
  shutil.copytree(workdir / "alone", there)
  refused(moved, f"{there}: ", "resnet8x2, got resnet8")
  shutil.copytree(teacher, beside)
  assert found(moved) == expected
  other = {**moved, "fingerprint": expected ^ 1}
  refused(other, f"{beside}: ", f"{expected ^ 1:08x}", f"{expected:08x}")
  # Where it was comes first; of a run without a fingerprint, unseen.
  del other["fingerprint"]
  shutil.rmtree(there)
  shutil.copytree(teacher, there)
  shutil.rmtree(beside)
  assert found(moved) == found(other) == expected


def test_what_cannot_be_compared(grid, tmp_path, run_main, capsys, monkeypatch):
  workdir, teacher = grid

  def error(*arguments):
    assert run_main(command, *arguments, "--analysis") == 2
    return capsys.readouterr().err

  kept = tmp_path / "kept"
  gather.gather(workdir, kept)
  for folder in kept.rglob("teachers/*"):
    shutil.copytree(teacher, folder, dirs_exist_ok=True)
  assert f"{kept / 'alone'}: expected the export of a finished" in error(kept)
  assert not (kept / "table.md").exists()
  assert "expected a run with a teacher" in error(workdir / "alone")
  asked = []

  def load(name, **options):
    asked.append((name, options["split"], options["dir"]))
    raise ValueError("no such data")

  monkeypatch.setattr(data, "load", load)
  assert error(workdir) == error(workdir, "--data_dir", "there")
  assert asked == [
    ("synthetic", "test", folder) for folder in ("../data", "there")
  ]
