"""Files written whole."""

import json

import numpy as np
import pytest

from kd_jax import storage


def test_flatten():
  tree = {"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}], "f": [{"g": None}]}
  assert storage.flatten(tree) == {
    "a.b": 1,
    "a.c": {},
    "d": [1, {"e": 2}],
    "f.0.g": None,
  }
  assert storage.flatten({}) == {"": {}}


def test_a_tree_comes_back(tmp_path):
  tree = {"a": {"b": np.arange(3, dtype=np.int32)}, "c": np.float32([1, -0.0])}
  storage.save_tree(tmp_path / "tree", tree)
  read = storage.restore_tree(tmp_path / "tree")
  np.testing.assert_array_equal(read["c"], tree["c"])
  assert read["a"]["b"].dtype == np.int32
  with pytest.raises(ValueError, match="expected an Orbax checkpoint, got one"):
    storage.restore_tree(tmp_path)


def test_json_appears_whole(tmp_path):
  path = tmp_path / "a.json"
  assert storage.read_json(path) is None
  storage.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    storage.write_json(path, {"a": object()})
  assert storage.read_json(path) == json.loads(path.read_text()) == {"a": 1}
