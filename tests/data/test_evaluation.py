"""Evaluation counts every example exactly once."""

import json
import pathlib

import jax
import numpy as np
import pytest

from kd_jax import data
from kd_jax.data import evaluation, images, skipped

TYPES = {
  "image": np.uint8,
  "label": np.int32,
  "index": np.int32,
  "mask": np.bool_,
}


def memory(count):
  return data.load("synthetic", split="test", num_examples=count, image_size=4)


@pytest.fixture
def files(tmp_path, write_images):
  """Loads 37 pictures of many sizes."""
  write_images(tmp_path, "val", 37)

  def load(**options):
    return data.load(
      "folder", split="test", dir=tmp_path, image_size=4, **options
    )

  return load


def stack(batches):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def side_by_side(shares):
  """The batches of all processes, as one process would have them."""
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *shares)


def check(shares, source, pixels):
  """Checks the processes' shares of the batches, stacked: [n, B, ...]."""
  batches = -(-len(source) // 8)
  shape = (batches, 8 // len(shares))
  for share in shares:
    assert {name: value.dtype for name, value in share.items()} == TYPES
    assert share["image"].shape == (*shape, 4, 4, 3)
    assert all(share[name].shape == shape for name in ("label", "mask"))
  whole = side_by_side(shares)
  mask = whole["mask"]
  np.testing.assert_array_equal(whole["index"][mask], np.arange(len(source)))
  np.testing.assert_array_equal(whole["label"][mask], source.labels)
  np.testing.assert_array_equal(whole["image"][mask], pixels)
  assert not any(whole[name][~mask].any() for name in TYPES)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_sets_in_memory(count, processes):
  source = memory(count)
  before = source.images.copy()
  everyone = [(source, 8, p, processes) for p in range(processes)]
  at_once = [data.eval_batches(*arguments) for arguments in everyone]
  check(at_once, source, before)
  for arguments, expected in zip(everyone, at_once):
    stream = data.eval_stream(*arguments)
    found = list(stream)
    assert len(found) == len(stream)
    jax.tree.map(np.testing.assert_array_equal, stack(found), expected)
  np.testing.assert_array_equal(source.images, before)


@pytest.mark.parametrize("processes", [1, 4])
def test_image_files(files, processes):
  source = files()
  shares = [
    stack(data.eval_stream(source, 8, process, processes))
    for process in range(processes)
  ]
  decoded = [images.decode(source.read_bytes(i), "x") for i in range(37)]
  crops = [images.evaluate_crop(image, size=4, resize=5) for image in decoded]
  check(shares, source, np.stack(crops))


def test_a_bad_file_is_an_error_or_left_out(files, tmp_path, caplog):
  source = files(on_bad_image="skip")
  expected = stack(data.eval_stream(source, 8))
  (tmp_path / "val" / "class 1" / "10.png").write_bytes(b"")
  (tmp_path / "val" / "class 4" / "33.png").write_bytes(b"no image")
  stream = data.eval_stream(source, 8)
  for _ in range(2):  # a second evaluation counts them only once
    caplog.clear()
    got = stack(stream)
    bad = [
      i for i, p in enumerate(source.paths) if p.endswith(("10.png", "33.png"))
    ]
    rows = np.isin(expected["index"], bad) & expected["mask"]
    np.testing.assert_array_equal(got["mask"], expected["mask"] & ~rows)
    for name in ("image", "label", "index"):
      assert not got[name][rows].any()
      np.testing.assert_array_equal(got[name][~rows], expected[name][~rows])
    first, second = stream.skipped.reasons()
    assert "10.png" in first and "33.png" in second
  assert not caplog.records  # logged in the first round
  with pytest.raises(data.BadImageError, match=r"class 1/10\.png"):
    list(data.eval_stream(files(), 8))


def test_a_missing_file_is_always_an_error(files, tmp_path):
  stream = data.eval_stream(files(on_bad_image="skip"), 8)
  (tmp_path / "val" / "class 1" / "10.png").unlink()
  with pytest.raises(
    data.UnreadableError, match=r"class 1/10\.png does not ex"
  ):
    list(stream)


def test_many_bad_images_in_a_row_are_an_error(files, monkeypatch):
  monkeypatch.setattr(skipped, "MOST_IN_A_ROW", 6)
  source = files(on_bad_image="skip")
  # Over the border of a batch, and not reached by the next ones.
  for i in (*range(4, 9), *range(10, 15)):
    pathlib.Path(source.paths[i]).write_bytes(b"")
  stream = data.eval_stream(source, 8)
  for _ in range(2):
    assert sum(found["mask"].sum() for found in stream) == 27
  pathlib.Path(source.paths[9]).write_bytes(b"")
  with pytest.raises(
    data.BadImageError, match=r"^6 images in a row .* the last: .*/09\.png: .*"
  ):
    list(stream)


def test_skipped_images_of_several_processes_count_once(caplog):
  ours, theirs = skipped.Skipped(), skipped.Skipped()
  for one, found in ((ours, {7: "a", 1: "b"}), (theirs, {1: "b", 12: "c"})):
    for index, reason in found.items():
      one.add(index, reason)
  assert theirs.get_state() == {"1": "b", "12": "c"}
  ours.merge(json.loads(json.dumps(theirs.get_state())))
  caplog.clear()
  ours.add(12, "c")  # merged already
  assert ours.reasons() == ["b", "a", "c"] and len(ours) == 3
  assert not caplog.records


def test_a_stream_reads_only_a_little_ahead(files, monkeypatch):
  read = []
  real = images.read_file
  monkeypatch.setattr(
    images, "read_file", lambda path: read.append(path) or real(path)
  )
  stream = iter(data.eval_stream(files(), 4))
  next(stream)
  assert 4 <= len(read) <= 12
  stream.close()
  assert len(read) <= 12


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((6, 0, 4), "a multiple of the 4 processes, got 6"),
    ((0, 0, 1), "a multiple of the 1 processes, got 0"),
    ((8, 2, 2), r"process_index must be in 0\.\.1, got 2"),
  ],
)
def test_wrong_sizes_are_refused(arguments, words):
  for make in (data.eval_batches, data.eval_stream):
    with pytest.raises(ValueError, match=words):
      make(memory(9), *arguments)
  with pytest.raises(ValueError, match="num_threads must be 0 or more, got -1"):
    evaluation.EvalStream(memory(9), 4, num_threads=-1)
