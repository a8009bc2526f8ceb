"""Evaluation counts every example exactly once."""

import numpy as np
import pytest

from kd_jax.data import batch, sources


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
