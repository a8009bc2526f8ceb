"""Evaluation counts every example exactly once."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.data import batch, images, sources


def source(count):
  return sources.load(
    "synthetic", split="test", num_examples=count, image_size=4
  )


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 37, 40])
def test_every_example_counts_once(count, processes):
  test = source(count)
  shares = [
    batch.eval_batches(test, 8, process, processes)
    for process in range(processes)
  ]
  batches = -(-count // 8)
  for share in shares:
    assert share["image"].shape == (batches, 8 // processes, 4, 4, 3)
    assert {name: value.dtype for name, value in share.items()} == {
      "image": np.uint8,
      "label": np.int32,
      "index": np.int32,
      "mask": np.bool_,
    }
    for name in ("label", "index", "mask"):
      assert share[name].shape == (batches, 8 // processes)
    assert not share["image"][~share["mask"]].any()
  # Side by side, the shares are the set in its order.
  whole = {
    name: np.concatenate([share[name] for share in shares], axis=1)
    for name in shares[0]
  }
  mask = whole["mask"]
  assert mask.sum() == count
  np.testing.assert_array_equal(whole["index"][mask], np.arange(count))
  np.testing.assert_array_equal(whole["image"][mask], test.images)
  np.testing.assert_array_equal(whole["label"][mask], test.labels)


def test_the_source_stays_as_it_was():
  test = source(5)
  before = test.images.copy()
  batch.eval_batches(test, 4)
  np.testing.assert_array_equal(test.images, before)


@pytest.fixture
def files(tmp_path):
  """37 pictures of many sizes, in class folders."""
  rng = np.random.default_rng(0)
  for i in range(37):
    folder = tmp_path / "val" / f"{i % 3}"
    folder.mkdir(parents=True, exist_ok=True)
    image = rng.integers(0, 256, (9 + i % 4, 12 - i % 5, 3), np.uint8)
    Image.fromarray(image).save(folder / f"{i:02d}.png")

  def load(**options):
    return sources.load(
      "folder", split="test", dir=tmp_path, image_size=4, **options
    )

  return load


each_decoder = pytest.mark.parametrize("pipeline", ["grain", "dali"])


def stack(batches):
  return {
    name: np.stack([batch[name] for batch in batches]) for name in batches[0]
  }


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_stream_has_the_batches_that_eval_batches_has(processes):
  test = source(37)
  for process in range(processes):
    stream = data.eval_stream(test, 8, process, processes)
    got = list(stream)
    assert len(got) == len(stream) == 5
    expected = batch.eval_batches(test, 8, process, processes)
    for name, value in stack(got).items():
      np.testing.assert_array_equal(value, expected[name])
      assert value.dtype == expected[name].dtype


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_stream_of_files_counts_every_one_once(files, processes):
  test = files()
  shares = [
    stack(list(data.eval_stream(test, 8, process, processes)))
    for process in range(processes)
  ]
  whole = {
    name: np.concatenate([share[name] for share in shares], axis=1)
    for name in shares[0]
  }
  assert {name: value.dtype for name, value in whole.items()} == {
    "image": np.uint8,
    "label": np.int32,
    "index": np.int32,
    "mask": np.bool_,
  }
  assert whole["image"].shape == (5, 8, 4, 4, 3)
  mask = whole["mask"]
  np.testing.assert_array_equal(whole["index"][mask], np.arange(37))
  np.testing.assert_array_equal(whole["label"][mask], test.labels)
  for i, image in enumerate(whole["image"][mask]):
    expected = images.evaluate_crop(
      images.decode(test.read_bytes(i), "x"), size=4, resize=5
    )
    np.testing.assert_array_equal(image, expected)
  for name in ("image", "label", "index"):
    assert not whole[name][~mask].any()


def test_a_bad_file_ends_the_stream_with_its_name(files, tmp_path):
  test = files()
  (tmp_path / "val" / "1" / "10.png").write_bytes(b"")
  with pytest.raises(images.BadImageError, match=r"val/1/10\.png: .*0 bytes"):
    list(data.eval_stream(test, 8))


def test_a_bad_file_is_left_out_and_listed(files, tmp_path, caplog):
  test = files(on_bad_image="skip")
  expected = stack(list(data.eval_stream(test, 8)))
  (tmp_path / "val" / "1" / "10.png").write_bytes(b"")
  (tmp_path / "val" / "0" / "33.png").write_bytes(b"no image")
  stream = data.eval_stream(test, 8)
  for _ in range(2):  # a second evaluation finds them again, counts them once
    caplog.clear()
    got = stack(list(stream))
    bad = [
      i for i, p in enumerate(test.paths) if p.endswith(("10.png", "33.png"))
    ]
    rows = np.isin(expected["index"], bad) & expected["mask"]
    np.testing.assert_array_equal(got["mask"], expected["mask"] & ~rows)
    for name in ("image", "label", "index"):
      assert not got[name][rows].any()
      np.testing.assert_array_equal(got[name][~rows], expected[name][~rows])
    assert len(stream.skipped) == 2
  first, second = stream.skipped.reasons()
  assert "33.png: expected an image file, got one that cannot be de" in first
  assert "10.png: expected an image file, got one that cannot be de" in second
  assert not caplog.records  # logged in the first round


def test_what_several_processes_left_out_counts_once(caplog):
  ours, theirs = batch.Skipped(), batch.Skipped()
  for skipped, found in ((ours, {7: "a", 1: "b"}), (theirs, {1: "b", 12: "c"})):
    for index, reason in found.items():
      skipped.add(index, reason)
  ours.unite(json.loads(json.dumps(theirs.get_state())))
  assert len(ours) == 3 and ours.reasons() == ["b", "a", "c"]
  caplog.clear()
  ours.add(12, "c")  # told of already
  assert len(ours) == 3 and not caplog.records
  assert theirs.get_state() == {"1": "b", "12": "c"}


@each_decoder
def test_a_file_that_is_gone_is_never_left_out(files, tmp_path, pipeline):
  stream = data.eval_stream(files(on_bad_image="skip"), 8, pipeline=pipeline)
  (tmp_path / "val" / "1" / "10.png").unlink()
  with pytest.raises(data.UnreadableError, match=r"val/1/10\.png does not ex"):
    list(stream)


@each_decoder
def test_of_images_in_a_row_not_all_are_left_out(
  files, tmp_path, pipeline, monkeypatch
):
  monkeypatch.setattr(batch, "_MOST_SKIPPED", 6)
  test = files(on_bad_image="skip")
  # Over the border of a batch, and not reached by the next ones.
  for i in (*range(4, 9), *range(10, 15)):
    pathlib.Path(test.paths[i]).write_bytes(b"")
  stream = data.eval_stream(test, 8, pipeline=pipeline)
  for _ in range(2):
    assert sum(found["mask"].sum() for found in stream) == 27
  pathlib.Path(test.paths[9]).write_bytes(b"")
  with pytest.raises(
    data.BadImageError, match=r"^6 images in a row .* the last: .*/27\.png: .*"
  ):
    list(stream)


def test_a_stream_reads_only_a_little_ahead(files, monkeypatch):
  test = files()
  read = []
  real = images.read_file
  monkeypatch.setattr(
    images, "read_file", lambda path: read.append(path) or real(path)
  )
  stream = iter(data.eval_stream(test, 4))
  next(stream)
  assert 4 <= len(read) <= 12
  stream.close()
  assert len(read) <= 12


def test_a_negative_number_of_threads_is_refused():
  with pytest.raises(ValueError, match="num_threads must be 0 or more, got -1"):
    batch.EvalStream(source(9), 4, num_threads=-1)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((6, 0, 4), "a multiple of the 4 processes, got 6"),
    ((0, 0, 1), "a multiple of the 1 processes, got 0"),
    ((8, 2, 2), r"process_index must be in 0\.\.1, got 2"),
  ],
)
def test_wrong_sizes_are_refused(arguments, words):
  with pytest.raises(ValueError, match=words):
    batch.eval_batches(source(9), *arguments)
  with pytest.raises(ValueError, match=words):
    data.eval_stream(source(9), *arguments)
