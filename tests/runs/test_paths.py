"""Paths of runs and exports: characters that libraries take for something."""

import jax
import numpy as np
import pytest

from kd_jax import storage
from kd_jax.cli import convert, evaluate, export, predict, report, results
from kd_jax.runs import checkpoint, grid, train

TREE = {"a": {"b": np.arange(12.0).reshape(3, 4)}, "c": np.arange(5)}


def assert_same(ours):
  assert jax.tree.structure(ours) == jax.tree.structure(TREE)
  jax.tree.map(np.testing.assert_array_equal, ours, TREE)


@pytest.mark.parametrize(
  "name",
  ["kd[T=4]", "[2026] thesis", "a*b", "a?", "a#b%20 c", "été{1,2}", "~x"],
)
def test_checkpoints_and_exports_below_any_folder(name, tmp_path):
  # Whatever a wildcard would find beside it is not its own.
  (tmp_path / "a_longer_b" / "checkpoints").mkdir(parents=True)
  storage.save_tree(tmp_path / name / "export", TREE)
  assert_same(storage.restore_tree(tmp_path / name / "export"))
  folder = tmp_path / name / "checkpoints"
  saver = checkpoint.Checkpointer(folder)
  saver.save(1, TREE, position={}, meta={})
  saver.close()
  assert_same(checkpoint.restore_latest(folder, None).state)


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("gs://bucket/runs/a", "a mounted file system, got the URL gs://bucket"),
    ("s3:/bucket/a", "a mounted file system, got the URL s3:/bucket"),
    ("runs\\kd", r"a path without a backslash, .*runs\\kd"),
    ("~nobody-of-this-name/a", "no home folder for ~nobody"),
  ],
)
@pytest.mark.parametrize("start", [train.train_and_evaluate, grid.run_grid])
def test_a_workdir_that_cannot_hold_a_run(path, words, start, tmp_path):
  with (
    pytest.MonkeyPatch.context() as patch,
    pytest.raises(ValueError, match=rf"^--workdir: .*{words}") as caught,
  ):
    patch.chdir(tmp_path)
    start(None, path)
  assert "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert storage.local_path("~/a", "--workdir") == tmp_path / "a"


def test_commands_find_the_home_folder(tmp_path, monkeypatch, run_main, capsys):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  for command, *given in (
    (evaluate, "--model", "~/x"),
    (predict, "--model", "~/x", "~/y.png"),
    (export, "--workdir", "~/x", "--to", "~/y"),
    (convert, "--from", "~/x.pth", "--to", "~/y"),
    (report, "~/x"),
    (results, "~/x", "--to", "~/y"),
  ):
    assert run_main(command, *given) == 2
    assert f"{tmp_path}/x" in capsys.readouterr().err
    assert run_main(command, *given[:-1], "gs://bucket/y") == 2
    assert "mounted file system, got the URL" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []
