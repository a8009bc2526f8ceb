"""One battery for every pipeline that `create` knows."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.data import batch as batch_lib
from kd_jax.data import images

COUNT, BATCH, STEPS = 45, 8, 5

# A pipeline, and what its images lie in: the parameter of `source`.
CASES = [
  ("dali", "files"),
  ("device", "memory"),
  ("grain", "memory"),
  ("grain", "files"),
]
each_pipeline = pytest.mark.parametrize(("name", "kind"), CASES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  memory = data.load(
    "synthetic", split="train", num_examples=COUNT, image_size=4, num_classes=7
  )
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(COUNT):
    folder = root / "train" / f"class {i // 7}"
    folder.mkdir(parents=True, exist_ok=True)
    image = rng.integers(0, 256, (9 + i % 4, 12 - i % 5, 3), np.uint8)
    Image.fromarray(image).save(folder / f"{i:02d}.png")
  files = data.load("folder", split="train", dir=root, image_size=4)
  return {"memory": memory, "files": files}


@pytest.fixture
def kind():
  return "memory"


@pytest.fixture
def source(sources, kind):
  return sources[kind]


def expected_images(source, seed, epoch, index, **settings):
  if not isinstance(source, data.FolderSource):
    return source.images[index]
  # By way of whole pictures, which the pipeline does not make.
  return np.stack(
    [
      images.random_resized_crop(
        images.decode(source.read_bytes(i), "x"),
        np.random.default_rng((seed, epoch, i, 1)),
        size=4,
        **settings,
      )
      for i in index.tolist()
    ]
  )


def batches(pipeline, chunks):
  """The batches of the next chunks, in numpy."""
  out = []
  for k in chunks:
    chunk = pipeline.next_chunk(k)
    assert all(len(leaf) == k for leaf in jax.tree.leaves(chunk))
    for i in range(k):
      x = jax.tree.map(lambda leaf, i=i: leaf[i], chunk)
      batch = pipeline.load(pipeline.resident, x)
      out.append(jax.tree.map(np.asarray, batch))
  return out


def indices(pipeline, chunks):
  return np.stack([batch["index"] for batch in batches(pipeline, chunks)])


def assert_equal(got, expected):
  assert len(got) == len(expected)
  for one, other in zip(got, expected):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def test_the_battery_is_of_every_pipeline():
  assert {name for name, _ in CASES} == set(data.names())


@each_pipeline
def test_batches_keep_the_contract(name, source):
  pipeline = data.create(name, source, batch_size=BATCH, seed=0)
  assert pipeline.steps_per_epoch == STEPS
  for step, batch in enumerate(batches(pipeline, [1, 3, 1, 2])):
    assert {key: value.dtype for key, value in batch.items()} == {
      "image": np.uint8,
      "label": np.int32,
      "index": np.int32,
      "mask": np.bool_,
    }
    assert batch["image"].shape == (BATCH, 4, 4, 3)
    for key in ("label", "index", "mask"):
      assert batch[key].shape == (BATCH,)
    assert batch["mask"].all()
    index = batch["index"]
    assert index.min() >= 0 and index.max() < COUNT
    if name != "dali":  # not Pillow's pixels; see test_dali.py
      np.testing.assert_array_equal(
        batch["image"], expected_images(source, 0, step // STEPS, index)
      )
    np.testing.assert_array_equal(batch["label"], source.labels[index])


@each_pipeline
def test_epochs_are_different_and_hold_no_example_twice(name, source):
  pipeline = data.create(name, source, batch_size=BATCH, seed=0)
  epochs = [indices(pipeline, [STEPS]).ravel() for _ in range(4)]
  for epoch in epochs:
    assert len(np.unique(epoch)) == STEPS * BATCH
  for i in range(4):
    for j in range(i):
      assert (epochs[i] == epochs[j]).mean() < 0.5
  # Another permutation, not another start in one: what is dropped differs.
  dropped = {tuple(sorted(set(range(COUNT)) - set(e))) for e in epochs}
  assert len(dropped) > 1


@each_pipeline
def test_the_seed_decides_the_order(name, source):
  def order(seed):
    pipeline = data.create(name, source, batch_size=BATCH, seed=seed)
    return indices(pipeline, [STEPS, STEPS])

  np.testing.assert_array_equal(order(3), order(3))
  assert (order(3) != order(4)).mean() > 0.5


@each_pipeline
def test_an_epochs_order_does_not_depend_on_the_batch_size(name, source):
  orders = []
  for batch_size in (8, 5):
    pipeline = data.create(name, source, batch_size=batch_size, seed=1)
    pipeline.next_chunk(pipeline.steps_per_epoch)
    orders.append(indices(pipeline, [pipeline.steps_per_epoch]).ravel())
  np.testing.assert_array_equal(orders[0], orders[1][: STEPS * BATCH])


@each_pipeline
def test_without_shuffling_the_sets_order_is_kept(name, source):
  pipeline = data.create(name, source, batch_size=BATCH, seed=0, shuffle=False)
  for _ in range(2):
    np.testing.assert_array_equal(
      indices(pipeline, [2, 3]).ravel(), np.arange(STEPS * BATCH)
    )


@each_pipeline
@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_shares_make_up_the_batch(name, processes, source):
  chunks = [2, 3, 4]
  alone = batches(data.create(name, source, batch_size=BATCH, seed=5), chunks)
  shares = [
    batches(
      data.create(
        name,
        source,
        batch_size=BATCH,
        seed=5,
        process_index=process,
        process_count=processes,
      ),
      chunks,
    )
    for process in range(processes)
  ]
  assert shares[0][0]["index"].shape == (BATCH // processes,)
  joined = [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*shares)
  ]
  assert_equal(joined, alone)


@each_pipeline
def test_chunks_of_any_size_give_the_same_batches(name, source):
  def run(chunks):
    return batches(data.create(name, source, batch_size=BATCH, seed=2), chunks)

  singles = run([1] * 2 * STEPS)
  assert_equal(run([STEPS, STEPS]), singles)
  assert_equal(run([2, 3, 4, 1]), singles)


@each_pipeline
@pytest.mark.parametrize("position", [0, 1, 3, STEPS, STEPS + 2, 3 * STEPS])
def test_a_position_is_restored_exactly(name, position, source):
  def fresh():
    return data.create(name, source, batch_size=BATCH, seed=9)

  pipeline = fresh()
  batches(pipeline, [1] * position)
  assert pipeline.step == position
  assert pipeline.epoch == position // STEPS
  state = json.loads(json.dumps(pipeline.get_state()))
  expected = batches(pipeline, [1] * (STEPS + 1))

  restored = fresh()
  batches(restored, [2])  # not where it was
  restored.set_state(state)
  assert (restored.step, restored.epoch) == (position, position // STEPS)
  assert restored.get_state() == state
  assert_equal(batches(restored, [1] * (STEPS + 1)), expected)
  pipeline.set_state(state)  # and back
  assert_equal(batches(pipeline, [1] * (STEPS + 1)), expected)


@each_pipeline
def test_a_position_holds_for_another_number_of_processes(name, source):
  def make(process, processes):
    return data.create(
      name,
      source,
      batch_size=BATCH,
      seed=9,
      process_index=process,
      process_count=processes,
    )

  alone = make(0, 1)
  batches(alone, [3])
  half = make(1, 2)
  half.set_state(alone.get_state())
  expected = indices(alone, [2])[:, BATCH // 2 :]
  np.testing.assert_array_equal(indices(half, [2]), expected)


@each_pipeline
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("seed", 1),
    ("batch_size", 4),
    ("shuffle", False),
    ("num_examples", 44),
    ("pipeline", "other"),
  ],
)
def test_a_position_of_another_order_is_refused(name, field, value, source):
  pipeline = data.create(name, source, batch_size=BATCH, seed=0)
  state = {**pipeline.get_state(), field: value}
  with pytest.raises(
    ValueError,
    match=rf"of another order: expected {field} .* got {value!r} \(saved\)",
  ):
    pipeline.set_state(state)


@each_pipeline
def test_a_chunk_must_not_cross_an_epochs_end(name, source):
  pipeline = data.create(name, source, batch_size=BATCH, seed=0)
  pipeline.next_chunk(3)
  for k in (0, 3, STEPS):
    with pytest.raises(
      ValueError, match=rf"not cross .* k in 1\.\.2 \(2 of 5 .* got {k}"
    ):
      pipeline.next_chunk(k)
  assert pipeline.step == 3
  expected = data.create(name, source, batch_size=BATCH, seed=0)
  assert_equal(batches(pipeline, [2]), batches(expected, [3, 2])[3:])


@each_pipeline
@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"batch_size": 46}, "batch_size 46 is more than the 45 examples"),
    ({"batch_size": 0}, "a multiple of the 1 processes, got 0"),
    ({"process_count": 3}, "a multiple of the 3 processes, got 8"),
    ({"process_index": 1}, r"process_index must be in 0\.\.0, got 1"),
    ({"seed": -1}, "seed must be 0 or more, got -1"),
  ],
)
def test_wrong_options_are_refused(name, options, words, source):
  with pytest.raises(ValueError, match=words):
    data.create(name, source, **{"batch_size": BATCH, "seed": 0, **options})


@each_pipeline
def test_load_works_inside_a_compiled_scan(name, source):
  pipeline = data.create(name, source, batch_size=BATCH, seed=0)
  expected = batches(
    data.create(name, source, batch_size=BATCH, seed=0), [STEPS, STEPS]
  )
  traces = []

  @jax.jit
  def epoch(resident, chunk):
    traces.append(1)

    def body(total, x):
      batch = pipeline.load(resident, x)
      return total + batch["image"].astype(jnp.int32).sum(), batch

    return jax.lax.scan(body, 0, chunk)

  for start in (0, STEPS):
    chunk = pipeline.next_chunk(STEPS)
    total, stacked = epoch(pipeline.resident, chunk)
    got = [
      {key: np.asarray(value[i]) for key, value in stacked.items()}
      for i in range(STEPS)
    ]
    assert_equal(got, expected[start : start + STEPS])
    assert total == sum(batch["image"].sum(dtype=np.int64) for batch in got)
  assert len(traces) == 1


def test_what_each_pipeline_keeps_on_the_device(source):
  resident = data.create("device", source, batch_size=BATCH, seed=0).resident
  assert {key: value.shape for key, value in resident.items()} == {
    "image": (COUNT, 4, 4, 3),
    "label": (COUNT,),
  }
  assert resident["image"].dtype == jnp.uint8
  assert data.create("grain", source, batch_size=BATCH, seed=0).resident == {}


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_grains_threads_change_nothing(num_threads, kind, source):
  def make(**options):
    return data.create("grain", source, batch_size=BATCH, seed=4, **options)

  threaded = make(num_threads=num_threads, prefetch=7)
  expected = batches(make(), [STEPS, 3, 2, STEPS])
  assert_equal(batches(threaded, [STEPS, 3]), expected[:8])
  # What was fetched ahead is not part of the position.
  state = threaded.get_state()
  assert state["step"] == 8
  restored = make()
  restored.set_state(state)
  assert_equal(batches(restored, [2, STEPS]), expected[8:])
  assert_equal(batches(threaded, [2, STEPS]), expected[8:])


def test_grain_refuses_a_negative_number_of_threads(source):
  with pytest.raises(
    ValueError, match=r"num_threads and num_workers must be 0 or more .* -1"
  ):
    data.create("grain", source, batch_size=BATCH, seed=0, num_threads=-1)
  with pytest.raises(ValueError, match="prefetch 1 or more, got 1, 0 and 0"):
    data.create(
      "grain", source, batch_size=BATCH, seed=0, num_threads=1, prefetch=0
    )


def test_another_epoch_and_another_seed_have_other_crops(sources):
  def image(seed, steps):
    pipeline = data.create(
      "grain", sources["files"], batch_size=1, seed=seed, shuffle=False
    )
    for _ in range(steps):
      pipeline.next_chunk(1)
    return pipeline.next_chunk(1)["image"]

  first = image(0, 0)
  np.testing.assert_array_equal(image(0, 0), first)
  assert (image(0, COUNT) != first).mean() > 0.5  # an epoch later
  assert (image(1, 0) != first).mean() > 0.5


def test_the_crops_settings_are_obeyed(sources):
  source = sources["files"]
  pipeline = data.create(
    "grain",
    source,
    batch_size=BATCH,
    seed=0,
    shuffle=False,
    crop_area=(0.9, 1),
    crop_aspect=(0.5, 2),
  )
  got = pipeline.next_chunk(1)["image"][0]
  settings = {"area": (0.9, 1), "aspect": (0.5, 2)}
  expected = expected_images(source, 0, 0, np.arange(BATCH), **settings)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"num_workers": -1}, "num_workers must be 0 or more .*got 0, -1 and 4"),
    ({"crop_area": (0.5, 0.2)}, r"crop_area must be .*largest <= 1, got \(0.5"),
    ({"crop_area": (0, 1)}, "crop_area must be .*0 < least"),
    ({"crop_area": (0.5, 1.5)}, "crop_area must be"),
    ({"crop_aspect": (-1, 1)}, "crop_aspect must be"),
  ],
)
def test_wrong_options_of_image_files_are_refused(options, words, sources):
  with pytest.raises(ValueError, match=words):
    data.create("grain", sources["files"], batch_size=8, seed=0, **options)


def test_where_image_files_do_not_fit(sources):
  with pytest.raises(
    ValueError, match=r"'device' keeps .*folder is image files.*'grain'"
  ):
    data.create("device", sources["files"], batch_size=BATCH, seed=0)
  with pytest.raises(
    ValueError, match=r"num_workers is of image files; synthetic is in memory"
  ):
    data.create(
      "grain", sources["memory"], batch_size=BATCH, seed=0, num_workers=2
    )


def damaged(source, positions, on_bad_image):
  """The same set with files of zero bytes at these positions."""
  paths = list(source.paths)
  for i in positions:
    paths[i] += ".bad"
    pathlib.Path(paths[i]).touch()
  return dataclasses.replace(
    source, paths=tuple(paths), on_bad_image=on_bad_image
  )


def test_the_next_image_stands_in_for_a_bad_one(sources):
  source = damaged(sources["files"], [3, 4, 44], "skip")
  options = {"batch_size": 9, "seed": 0}
  good = data.create("grain", sources["files"], **options)
  pipeline = data.create("grain", source, **options)
  for epoch in range(2):
    expected = indices(good, [5])
    stand_in = {3: 5, 4: 5, 44: 0}
    for batch, wanted in zip(batches(pipeline, [5]), expected, strict=True):
      index = np.array([stand_in.get(i, i) for i in wanted.tolist()])
      np.testing.assert_array_equal(batch["index"], index)
      np.testing.assert_array_equal(batch["label"], source.labels[index])
      np.testing.assert_array_equal(
        batch["image"], expected_images(source, 0, epoch, index)
      )
      assert batch["mask"].all()
    # Counted once, however often they come up.
    assert len(pipeline.skipped) == 3
  reasons = pipeline.skipped.reasons()
  assert [reason.split(": expected")[0] for reason in reasons] == [
    source.paths[i] for i in (3, 4, 44)
  ]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_file_that_is_gone_is_an_error(on_bad_image, sources):
  source = damaged(sources["files"], [17], on_bad_image)
  pathlib.Path(source.paths[17]).unlink()
  pipeline = data.create(
    "grain", source, batch_size=BATCH, seed=0, shuffle=False
  )
  pipeline.next_chunk(2)
  with pytest.raises(data.UnreadableError, match=r"/17\.png\.bad does not ex"):
    pipeline.next_chunk(3)
  # The position stays: the file may come back.
  assert pipeline.step == 2
  expected = data.create(
    "grain", sources["files"], batch_size=BATCH, seed=0, shuffle=False
  )
  expected.next_chunk(2)
  pathlib.Path(source.paths[17]).write_bytes(sources["files"].read_bytes(17))
  try:
    assert_equal(batches(pipeline, [3]), batches(expected, [3]))
  finally:
    pathlib.Path(source.paths[17]).unlink()


def test_data_that_are_gone_are_not_skipped_forever(sources, monkeypatch):
  monkeypatch.setattr(batch_lib, "_MOST_SKIPPED", 6)
  source = damaged(sources["files"], range(10, 20), "skip")
  pipeline = data.create(
    "grain", source, batch_size=BATCH, seed=0, shuffle=False
  )
  pipeline.next_chunk(1)
  with pytest.raises(
    data.BadImageError, match=r"^6 images in a row .* the last: .*/1\d\.png"
  ):
    pipeline.next_chunk(1)


def test_worker_processes_change_nothing(sources):
  """Order, crops, resume, skips; an error; a signal; a death."""
  source = damaged(sources["files"], [3], "skip")

  def make(source=source, **options):
    return data.create("grain", source, batch_size=BATCH, seed=4, **options)

  alone = make()
  expected = batches(alone, [STEPS, 3, 2, STEPS])
  workers = make(num_workers=2, prefetch=3)
  try:
    assert_equal(batches(workers, [STEPS, 1, 2]), expected[:8])
    state = json.loads(json.dumps(workers.get_state()))
    assert state == {**state, "step": 8}
    children = [
      child
      for child in multiprocessing.active_children()
      if "grain" in child.name
    ]
    assert len(children) == 2
    # Sent to all processes of a job, to be answered by the training process.
    for child in children:
      os.kill(child.pid, signal.SIGINT)
      os.kill(child.pid, signal.SIGTERM)
    assert_equal(batches(workers, [2, STEPS]), expected[8:])
    assert workers.skipped.reasons() == alone.skipped.reasons() != []
    assert all(child.is_alive() for child in children)
    restored = make()
    restored.set_state(state)
    assert_equal(batches(restored, [2, STEPS]), expected[8:])
    os.kill(children[0].pid, signal.SIGKILL)
    step = workers.step
    with pytest.raises(
      RuntimeError, match=r"worker process .*died: .*code -9.*/dev/shm.*num_thr"
    ):
      while True:
        workers.next_chunk(1)
    assert workers.step >= step
    workers.set_state(state)  # starts others
    assert_equal(batches(workers, [2]), expected[8:10])
  finally:
    workers.close()
  assert not any(child.is_alive() for child in children)

  source = damaged(sources["files"], [9], "error")
  broken = make(source, num_workers=1, shuffle=False)
  try:
    broken.next_chunk(1)
    with pytest.raises(data.BadImageError, match=r"/09\.png\.bad: .* 0 bytes"):
      broken.next_chunk(1)
    assert broken.step == 1
  finally:
    broken.close()


def test_an_unknown_pipeline_names_the_nearest(source):
  with pytest.raises(
    ValueError,
    match=r"Unknown pipeline 'grian'. Did you mean grain.*: dali, device, gra",
  ):
    data.create("grian", source, batch_size=BATCH, seed=0)


def test_without_grain_the_error_says_what_to_do(monkeypatch, source):
  monkeypatch.delitem(sys.modules, "kd_jax.data.grain", raising=False)
  monkeypatch.setitem(sys.modules, "grain", None)  # as if not installed
  with pytest.raises(
    ImportError, match=r"package grain, .*pip install grain.*'device'"
  ):
    data.create("grain", source, batch_size=BATCH, seed=0)
  data.create("device", source, batch_size=BATCH, seed=0)


def test_importing_the_package_imports_no_optional_one(repo):
  code = (
    "import sys, kd_jax.data, kd_jax.data.device;"
    "print(sorted({'grain', 'nvidia.dali', 'sklearn', 'tensorflow', 'torch',"
    " 'tensorflow_datasets'} & set(sys.modules)))"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=repo,
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.strip() == "[]"
