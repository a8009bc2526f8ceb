"""Files written whole."""

import gzip
import json
import math
import os
import socket
from typing import Any

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
  storage.write_json(path, {"a": 1, "b": [math.nan, math.inf]})
  with pytest.raises(TypeError):
    storage.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1, "b": [None, None]}
  found = storage.read_json(path, dict[str, int | list[storage.Score]])
  assert found["a"] == 1 and np.isnan(found["b"]).all()
  # As an older version wrote it.
  path.write_text('{"a": 1, "b": [NaN, 1e999]}')
  assert np.isnan(storage.read_json(path, dict[str, Any])["b"][0] or math.nan)


@pytest.mark.parametrize(
  ("content", "problem"),
  [
    (b'{"a": 1, "a": 2}', "expected JSON, got two fields 'a'"),
    (b'{"a": "\xff"}', "expected JSON, got a file that is not UTF-8"),
    (b'{"a": "\\ud800"}', "expected JSON, got a file that is not UTF-8"),
    (b"[" * 100 + b"]" * 100, "got more than 64 levels of brackets"),
    (b"[" * 10**6, "got more than 64 levels of brackets"),
    (b"1" + b" " * (16 << 20), "expected at most 16,777,216 bytes"),
    (b'{"a": [0, "1"]}', r"a\.json, at \[\.\.\.\]\[1\]: expected `int`"),
  ],
)
def test_json_of_another_kind_is_refused_in_a_line(tmp_path, content, problem):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=problem) as caught:
    storage.read_json(path, dict[str, list[int]], "Copy it again")
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
  assert str(caught.value).endswith(". Copy it again")


def test_only_a_last_line_that_was_cut_short_may_go(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  line = '{"step": 1, "kind": "train", "loss": null}\n'
  path.write_text(2 * line + line[:20])
  (first, _) = storage.read_metrics(path)
  assert first["step"] == 1 and math.isnan(first["loss"])
  assert "cut short" in caplog.text
  for broken in (line[:20] + "\n", line[:20] + line, '{"step": 1}\n', "[1]\n"):
    path.write_text(line + broken + line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2") as caught:
      storage.read_metrics(path)
    assert "\n" not in str(caught.value)
  packed = path.with_suffix(".jsonl.gz")
  packed.write_bytes(gzip.compress(line.encode())[:-9])
  with pytest.raises(ValueError, match="damaged or cut short"):
    storage.read_metrics(packed)


def test_drafts_of_ended_processes_are_removed(tmp_path):
  path, host = tmp_path / "a.json", socket.gethostname()
  with storage.drafted(path) as ours:
    ours.write_text("1")
    ended, elsewhere, old = (
      tmp_path / f".a.json.{name}.draft"
      for name in (f"{host}-99999999", "other-1", "other-2")
    )
    ended.mkdir()
    elsewhere.touch()
    old.touch()
    os.utime(old, (1e9, 1e9))
    assert storage.draft(path) == ours
    assert {*tmp_path.iterdir()} == {ours, elsewhere}
  assert {*tmp_path.iterdir()} == {path, elsewhere}
  with pytest.raises(OSError, match="Not a directory") as caught:
    storage.write_whole(path / "below", "1")  # a.json is no folder
  assert str(path / "below") in str(caught.value)
