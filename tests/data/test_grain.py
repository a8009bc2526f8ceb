"""grain's threads, workers, crops and bad images."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal

import numpy as np
import pytest

from kd_jax import data
from kd_jax.data import images, skipped

COUNT, BATCH, STEPS = 45, 8, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_images):
  root = write_images(tmp_path_factory.mktemp("images"), "train", COUNT)
  return data.load("folder", split="train", dir=root, image_size=4)


@pytest.fixture(scope="module")
def memory():
  return data.load("synthetic", split="train", num_examples=COUNT, image_size=4)


def make(source, **options):
  options = {"batch_size": BATCH, "seed": 4, **options}
  return data.create("grain", source, **options)


def batches(pipeline, chunks):
  out = []
  for k in chunks:
    chunk = pipeline.next_chunk(k)
    out += [{key: leaf[i] for key, leaf in chunk.items()} for i in range(k)]
  return out


def damaged(source, positions, on_bad_image):
  """The same set with files of zero bytes at these positions."""
  paths = list(source.paths)
  for i in positions:
    paths[i] += ".bad"
    pathlib.Path(paths[i]).write_bytes(b"")
  return dataclasses.replace(
    source, paths=tuple(paths), on_bad_image=on_bad_image
  )


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_threads_change_nothing(kind, request, assert_equal):
  source = request.getfixturevalue(kind)
  expected = batches(make(source), [STEPS, 3, 2, STEPS])
  threaded = make(source, num_threads=3, prefetch=7)
  assert_equal(batches(threaded, [STEPS, 3]), expected[:8])
  # What was fetched ahead is not part of the position.
  state = threaded.get_state()
  assert state["step"] == 8
  restored = make(source)
  restored.set_state(state)
  assert_equal(batches(restored, [2, STEPS]), expected[8:])


def test_crops_depend_on_epoch_seed_and_settings(files):
  def image(seed=0, steps=0, **settings):
    pipeline = make(files, batch_size=1, seed=seed, shuffle=False, **settings)
    for _ in range(steps):
      pipeline.next_chunk(1)
    return pipeline.next_chunk(1)["image"][0, 0]

  first = image()
  assert (image(steps=COUNT) != first).mean() > 0.5  # an epoch later
  assert (image(seed=1) != first).mean() > 0.5
  expected = images.random_resized_crop(
    images.decode(files.read_bytes(0), "x"),
    np.random.default_rng((0, 0, 0, 1)),
    size=4,
    area=(0.9, 1),
    aspect=(0.5, 2),
  )
  got = image(crop_area=(0.9, 1), crop_aspect=(0.5, 2))
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"num_threads": -1}, "0 or more .* got -1, 0 and 4"),
    ({"num_workers": -1}, "0 or more .* got 0, -1 and 4"),
    ({"num_threads": 1, "prefetch": 0}, "1 or more, got 1, 0 and 0"),
    ({"crop_area": (0.5, 0.2)}, r"crop_area must be .*<= 1, got \(0.5"),
    ({"crop_area": (0, 1)}, "crop_area must be .*0 < least"),
    ({"crop_area": (0.5, 1.5)}, "crop_area must be"),
    ({"crop_aspect": (-1, 1)}, "crop_aspect must be"),
  ],
)
def test_wrong_options_are_refused(options, words, files):
  with pytest.raises(ValueError, match=words):
    make(files, **options)


def test_the_next_image_stands_in_for_a_bad_one(files):
  source = damaged(files, [3, 4, 44], "skip")
  good, pipeline = (make(s, batch_size=9, seed=0) for s in (files, source))
  for epoch in range(2):
    stand_in = {3: 5, 4: 5, 44: 0}
    expected = [batch["index"] for batch in batches(good, [5])]
    for batch, wanted in zip(batches(pipeline, [5]), expected, strict=True):
      index = np.array([stand_in.get(i, i) for i in wanted.tolist()])
      np.testing.assert_array_equal(batch["index"], index)
      np.testing.assert_array_equal(batch["label"], source.labels[index])
      crops = [
        images.random_resized_crop(
          images.decode(source.read_bytes(i), "x"),
          np.random.default_rng((0, epoch, i, 1)),
          size=4,
        )
        for i in index.tolist()
      ]
      np.testing.assert_array_equal(batch["image"], np.stack(crops))
      assert batch["mask"].all()
    # Counted once, however often they come up.
    reasons = pipeline.skipped.reasons()
    assert len(pipeline.skipped) == 3
  assert [reason.split(": expected")[0] for reason in reasons] == [
    source.paths[i] for i in (3, 4, 44)
  ]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_missing_file_is_an_error_and_the_position_stays(
  on_bad_image, files, assert_equal
):
  source = damaged(files, [17], on_bad_image)
  path = pathlib.Path(source.paths[17])
  path.unlink()
  pipeline = make(source, shuffle=False)
  pipeline.next_chunk(2)
  with pytest.raises(data.UnreadableError, match=r"/17\.png\.bad does not ex"):
    pipeline.next_chunk(3)
  assert pipeline.step == 2
  path.write_bytes(files.read_bytes(17))  # the file comes back
  expected = batches(make(files, shuffle=False), [5])[2:]
  assert_equal(batches(pipeline, [3]), expected)


def test_many_bad_images_in_a_row_are_an_error(files, monkeypatch):
  monkeypatch.setattr(skipped, "MOST_IN_A_ROW", 6)
  pipeline = make(damaged(files, range(10, 20), "skip"), shuffle=False)
  pipeline.next_chunk(1)
  with pytest.raises(
    data.BadImageError, match=r"^6 images in a row .* the last: .*/1\d\.png"
  ):
    pipeline.next_chunk(1)


def test_worker_processes_change_nothing(files, assert_equal):
  """Order, crops, resume, skips; an error; a signal; a death."""
  source = damaged(files, [3], "skip")
  alone = make(source)
  expected = batches(alone, [STEPS, 3, 2, STEPS])
  workers = make(source, num_workers=2, prefetch=3)
  try:
    assert_equal(batches(workers, [STEPS, 1, 2]), expected[:8])
    state = json.loads(json.dumps(workers.get_state()))
    children = [
      child
      for child in multiprocessing.active_children()
      if "grain" in child.name
    ]
    assert len(children) == 2
    # Sent to all processes of a job; only the training process acts on it.
    for child in children:
      for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child.pid, number)
    assert_equal(batches(workers, [2, STEPS]), expected[8:])
    assert workers.skipped.reasons() == alone.skipped.reasons() != []
    assert all(child.is_alive() for child in children)
    restored = make(source)
    restored.set_state(state)
    assert_equal(batches(restored, [2, STEPS]), expected[8:])
    os.kill(children[0].pid, signal.SIGKILL)
    with pytest.raises(
      RuntimeError, match=r"worker process .*died: .*code -9.*/dev/shm.*num_thr"
    ):
      while True:
        workers.next_chunk(1)
    workers.set_state(state)  # starts others
    assert_equal(batches(workers, [2]), expected[8:10])
  finally:
    workers.close()
  assert not any(child.is_alive() for child in children)

  broken = make(damaged(files, [9], "error"), num_workers=1, shuffle=False)
  try:
    broken.next_chunk(1)
    with pytest.raises(data.BadImageError, match=r"/09\.png\.bad: .* 0 bytes"):
      broken.next_chunk(1)
    assert broken.step == 1
  finally:
    broken.close()
