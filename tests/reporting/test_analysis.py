"""What students have in common with their teachers."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from kd_jax import data, storage
from kd_jax.interop import card, scoring, store
from kd_jax.reporting import analysis, gather, report, runs
from kd_jax.runs import teachers
from kd_jax.runs import workdir as workdir_lib


def test_correlation_is_numpys():
  logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  found = analysis.correlation(logits)
  np.testing.assert_allclose(found, np.corrcoef(logits.T), atol=1e-12)
  logits[:, 2] = 3.0
  found = analysis.correlation(logits)
  assert not found[2].any() and not found[:, 2].any()
  np.testing.assert_allclose(found[[0, 1, 3], [0, 1, 3]], 1.0)


def test_shown_are_the_first_of_the_first_classes():
  labels = np.tile(np.arange(9), 150)
  found = analysis.shown(labels)
  assert len(found) == 7 * 100
  np.testing.assert_array_equal(found, np.sort(found))
  assert np.bincount(labels[found]).tolist() == [100] * 7
  assert found.max() == 99 * 9 + 6
  # As many as there are, and classes that the test set has.
  assert analysis.shown(np.array([5, 3, 5, 1])).tolist() == [0, 1, 2, 3]


def test_embedding_keeps_groups_together():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(3), 20)
  features = rng.normal(size=(60, 8)) + 20 * np.eye(8)[labels]
  points = analysis.embed(features.astype(np.float32))
  assert points.shape == (60, 2)
  centres = np.stack([points[labels == k].mean(axis=0) for k in range(3)])
  distances = np.linalg.norm(points[:, None] - centres, axis=-1)
  np.testing.assert_array_equal(distances.argmin(axis=1), labels)
  again = analysis.embed(features.astype(np.float32))
  np.testing.assert_array_equal(points, again)


def test_features_without_a_difference():
  assert not analysis.embed(np.ones((5, 3), np.float32)).any()


@pytest.fixture
def grid(smoke_run, fast_compile):
  """The finished grid of quickstart's smoke run, and its teacher's folder."""
  workdir = smoke_run("quickstart")
  return workdir, pathlib.Path(
    workdir_lib.result(workdir / "kd")["teacher"]["checkpoint"]
  )


def open_test_set(run):
  options = storage.read_json(run / "config.json")["data"]
  return data.load(
    "synthetic",
    split="test",
    **{name: options[name] for name in card.DATA_OPTIONS},
  )


def test_look(grid):
  run = grid[0] / "simkd"
  source, model = open_test_set(run), store.load(run)
  # A batch that the set does not fill.
  seen = analysis.look(model, source, batch_size=24)
  images = source.images
  logits = np.asarray(model.logits(images))
  np.testing.assert_array_equal(seen.choices, logits.argmax(axis=1))
  np.testing.assert_allclose(
    seen.correlation, np.corrcoef(logits.T.astype(np.float64)), atol=1e-4
  )
  few = analysis.shown(source.labels)
  np.testing.assert_array_equal(seen.labels, source.labels[few])
  pooled = model.output(model.variables, images).features["pooled"]
  np.testing.assert_allclose(seen.features, pooled[few], atol=1e-4)
  # A SimKD student's are those that its teacher's classifier reads.
  assert seen.features.shape[1] == 128


def test_a_teacher_is_like_itself(grid):
  workdir, teacher = grid
  source = open_test_set(workdir / "kd")
  model = store.load(teacher)
  pair = analysis.compare(model, {"itself": [teacher]}, source)
  assert pair.teacher == "resnet8x2"
  (student,) = pair.students.values()
  assert student.agreement.tolist() == [100.0]
  assert student.distances.tolist() == [0.0]
  assert not student.difference.any()
  np.testing.assert_array_equal(student.points, pair.points)
  assert pair.class_names == {k: f"class {k}" for k in range(7)}


def test_report_compares_all_with_the_teacher(grid, tmp_path):
  workdir, teacher = grid
  groups = runs.group(runs.collect(workdir))
  pairs = report.analyse(workdir, groups)
  ((key, pair),) = pairs.items()
  assert key == ("synthetic", "resnet8", "resnet8x2")
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
  text = report.text(groups, pairs)
  line = "| synthetic | resnet8 | resnet8x2 | kd | 1 | {:.2f} | {:.4f} |"
  kd = pair.students["kd"]
  assert line.format(kd.agreement[0], kd.distances[0]) in text
  written = report.write(workdir, tmp_path, pairs)
  drawn = [
    f"{name}.{suffix}"
    for name in ("curves", "agreement", "correlations", "features")
    for suffix in ("png", "svg")
  ]
  assert [path.name for path in written] == [
    *("table.md", "table.csv", *drawn, "report.html", "hparams")
  ]
  assert (tmp_path / "table.md").read_text() == text
  page = (tmp_path / "report.html").read_text()
  titles = re.findall(r"<h2>(.*?)</h2>", page)
  assert titles == [
    *("Accuracy", "Comparison", "Student and teacher", "Curves"),
    *("Agreement with the teacher",),
    "Correlation of logits: difference from the teacher",
    "Features before the classifier (t-SNE)",
  ]


def test_trials_are_compared_with_their_own_teacher(
  grid, tmp_path, monkeypatch
):
  workdir, teacher = grid
  # Two of which only the results know that they differ.
  model = store.load(teacher)
  monkeypatch.setattr(analysis, "open_teacher", lambda *_: model)
  for name in ("alone", "kd", "simkd"):
    shutil.copytree(workdir / name, tmp_path / name)
  for name in ("alone", "kd"):
    again = tmp_path / f"{name}_seed1"
    shutil.copytree(workdir / name, again)
    for file in ("config", "result"):
      path = again / f"{file}.json"
      content = {**storage.read_json(path), "seed": 1}
      if content["teacher"] and file == "result":
        content["teacher"]["fingerprint"] += 1
      path.write_text(json.dumps(content))
  # Of several at once, which is left out.
  path = tmp_path / "simkd" / "result.json"
  content = storage.read_json(path)
  path.write_text(json.dumps({**content, "teacher": [content["teacher"]] * 2}))
  groups = runs.group(runs.collect(tmp_path))
  pairs = report.analyse(tmp_path, groups)
  fingerprint = workdir_lib.result(workdir / "kd")["teacher"]["fingerprint"]
  assert [key[2] for key in pairs] == [
    f"resnet8x2 {fingerprint + i:08x}" for i in range(2)
  ]
  for (_, _, name), pair in pairs.items():
    trials = {k: len(s.agreement) for k, s in pair.students.items()}
    assert trials == {"none": 2, f"kd (teacher={name})": 1}


def test_a_teacher_is_looked_for_beside_the_run(grid, tmp_path):
  workdir, teacher = grid
  about = workdir_lib.result(workdir / "kd")["teacher"]
  source = open_test_set(workdir / "kd")
  run, there = tmp_path / "runs" / "kd", tmp_path / "there" / "t"
  beside = tmp_path / "runs" / "teachers" / "t"
  moved = {**about, "checkpoint": str(there)}
  words = (
    f"{run}: expected its teacher resnet8x2 at {there} or {beside}, found it at"
    " neither{}. Copy it from where the run was made to the second"
  )

  def refused(about):
    with pytest.raises(ValueError, match="expected its teacher") as caught:
      analysis.open_teacher(run, about, source)
    return str(caught.value)

  def found(about):
    return teachers.fingerprint(
      analysis.open_teacher(run, about, source).variables
    )

  assert refused(moved) == words.format("")
  # What is there now is another network, or has other weights.
  shutil.copytree(workdir / "alone", there)
  assert refused(moved) == words.format(
    f" ({there}: expected the model that was asked for, resnet8x2, got resnet8."
    " Ask for that, or for none)"
  )
  shutil.copytree(teacher, beside)
  assert found(moved) == about["fingerprint"]
  other = {**moved, "fingerprint": about["fingerprint"] ^ 1}
  assert refused(other).endswith(
    f" ({beside}: expected the weights that the run had, of fingerprint"
    f" {about['fingerprint'] ^ 1:08x}, got others, of"
    f" {about['fingerprint']:08x}). Copy it from where the run was made to the"
    " second"
  )
  # Where it was comes first; of a run without a fingerprint, unseen.
  del other["fingerprint"]
  shutil.rmtree(there)
  shutil.copytree(teacher, there)
  shutil.rmtree(beside)
  assert found(moved) == found(other) == about["fingerprint"]


def test_results_have_nothing_to_ask(grid, tmp_path, run_main, capsys):
  kept = tmp_path / "kept"
  gather.gather(grid[0], kept)
  for folder in kept.rglob("teachers/*"):
    shutil.copytree(grid[1], folder, dirs_exist_ok=True)
  assert run_main(report, kept, "--analysis") == 2
  assert capsys.readouterr().err == (
    f"{kept / 'alone'}: expected the export of a finished run"
    " (export/model.json), found none. An analysis takes the runs themselves:"
    " name the --workdir of launch.py\n"
  )
  assert not (kept / "table.md").exists()


def test_nothing_to_compare(grid, tmp_path, run_main, capsys):
  shutil.copytree(grid[0] / "alone", tmp_path / "alone")
  assert run_main(report, tmp_path, "--analysis") == 2
  assert capsys.readouterr().err == (
    f"{tmp_path}: expected a run with a teacher, to compare students with it,"
    " found none\n"
  )


def test_data_elsewhere(grid, monkeypatch, run_main, capsys):
  asked = []

  def load(name, **options):
    asked.append((name, options["split"], options["dir"]))
    raise ValueError("no such data")

  monkeypatch.setattr(data, "load", load)
  for given, folder in (([], "../data"), (["--data_dir", "there"], "there")):
    assert run_main(report, grid[0], "--analysis", *given) == 2
    assert capsys.readouterr().err == "no such data\n"
    assert asked.pop() == ("synthetic", "test", folder)
