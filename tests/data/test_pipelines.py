"""The contract that every pipeline keeps."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import data
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
# DALI's order depends on the number of shards; see test_dali.py.
each_of_ours = pytest.mark.parametrize(("name", "kind"), CASES[1:])


@pytest.fixture(scope="module")
def sources(tmp_path_factory, write_images):
  memory = data.load(
    "synthetic", split="train", num_examples=COUNT, image_size=4, num_classes=7
  )
  root = write_images(tmp_path_factory.mktemp("images"), "train", COUNT)
  files = data.load("folder", split="train", dir=root, image_size=4)
  return {"memory": memory, "files": files}


@pytest.fixture
def source(sources, kind):
  return sources[kind]


@pytest.fixture
def make(name, source):
  def create(**options):
    options = {"batch_size": BATCH, "seed": 0, **options}
    return data.create(name, source, **options)

  return create


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


def expected_images(source, seed, epoch, index):
  if isinstance(source, data.Source):
    return source.images[index]
  return np.stack(
    [
      images.random_resized_crop(
        images.decode(source.read_bytes(i), "x"),
        np.random.default_rng((seed, epoch, i, 1)),
        size=4,
      )
      for i in index.tolist()
    ]
  )


@each_pipeline
def test_batches_keep_the_contract(name, source, make):
  assert {case for case, _ in CASES} == set(data.names())
  pipeline = make()
  assert pipeline.steps_per_epoch == STEPS
  for step, batch in enumerate(batches(pipeline, [1, 3, 1, 2])):
    assert {key: (v.dtype, v.shape) for key, v in batch.items()} == {
      "image": (np.uint8, (BATCH, 4, 4, 3)),
      "label": (np.int32, (BATCH,)),
      "index": (np.int32, (BATCH,)),
      "mask": (np.bool_, (BATCH,)),
    }
    index = batch["index"]
    assert batch["mask"].all()
    np.testing.assert_array_equal(batch["label"], source.labels[index])
    if name != "dali":
      np.testing.assert_array_equal(
        batch["image"], expected_images(source, 0, step // STEPS, index)
      )


@each_pipeline
def test_epochs_hold_no_example_twice_and_differ(make):
  pipeline = make()
  epochs = [indices(pipeline, [STEPS]).ravel() for _ in range(3)]
  for i, epoch in enumerate(epochs):
    assert epoch.min() >= 0 and epoch.max() < COUNT
    assert len(np.unique(epoch)) == STEPS * BATCH
    assert all((epoch == other).mean() < 0.5 for other in epochs[:i])
  # Another permutation, not a rotation: other examples are dropped.
  dropped = {tuple(sorted(set(range(COUNT)) - set(e))) for e in epochs}
  assert len(dropped) > 1
  np.testing.assert_array_equal(
    indices(make(), [STEPS] * 3).ravel(), np.concatenate(epochs)
  )
  assert (indices(make(seed=4), [STEPS]).ravel() != epochs[0]).mean() > 0.5


@each_pipeline
def test_without_shuffling_the_sets_order_is_kept(make):
  pipeline = make(shuffle=False)
  for _ in range(2):
    order = indices(pipeline, [2, 3]).ravel()
    np.testing.assert_array_equal(order, np.arange(STEPS * BATCH))


@each_pipeline
def test_chunks_of_any_size_give_the_same_batches(make, assert_equal):
  assert_equal(batches(make(), [2, 3, 4, 1]), batches(make(), [1] * 10))


@each_pipeline
@pytest.mark.parametrize("position", [0, 3, STEPS, STEPS + 2])
def test_a_position_is_restored_exactly(position, make, assert_equal):
  pipeline = make(seed=9)
  batches(pipeline, [1] * position)
  state = json.loads(json.dumps(pipeline.get_state()))
  expected = batches(pipeline, [1] * (STEPS + 1))
  restored = make(seed=9)
  batches(restored, [2])  # not where it was
  for other in (restored, pipeline):
    other.set_state(state)
    assert (other.step, other.epoch) == (position, position // STEPS)
    assert other.get_state() == state
    assert_equal(batches(other, [1] * (STEPS + 1)), expected)


@each_of_ours
def test_an_epochs_order_does_not_depend_on_the_batch_size(make):
  orders = []
  for batch_size in (8, 5):
    pipeline = make(batch_size=batch_size)
    pipeline.next_chunk(pipeline.steps_per_epoch)
    orders.append(indices(pipeline, [pipeline.steps_per_epoch]).ravel())
  np.testing.assert_array_equal(orders[0], orders[1][: STEPS * BATCH])


@each_of_ours
@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_shares_make_up_the_batch(processes, make, assert_equal):
  alone = make()
  expected = batches(alone, [2, 3, 4])
  state = alone.get_state()
  after = batches(alone, [1])
  joined, joined_after = [], []
  for process in range(processes):
    share = make(process_index=process, process_count=processes)
    joined.append(batches(share, [2, 3, 4]))
    # One process's position holds for any number of processes.
    share.set_state(state)
    joined_after.append(batches(share, [1]))
  assert joined[0][0]["index"].shape == (BATCH // processes,)
  for parts, whole in ((joined, expected), (joined_after, after)):
    assert_equal(
      jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), whole
    )


@each_pipeline
def test_what_is_refused(make, assert_equal):
  pipeline = make()
  for field, value in {
    **{"seed": 1, "batch_size": 4, "shuffle": False, "num_examples": 44},
    "pipeline": "other",
  }.items():
    state = {**pipeline.get_state(), field: value}
    with pytest.raises(ValueError, match=rf"expected {field} .* got {value!r}"):
      pipeline.set_state(state)
  for options, words in (
    ({"batch_size": 46}, "batch_size 46 is more than the 45 examples"),
    ({"batch_size": 0}, "a multiple of the 1 processes, got 0"),
    ({"process_count": 3}, "a multiple of the 3 processes, got 8"),
    ({"process_index": 1}, r"process_index must be in 0\.\.0, got 1"),
    ({"seed": -1}, "seed must be 0 or more, got -1"),
  ):
    with pytest.raises(ValueError, match=words):
      make(**options)
  # A chunk must not cross the end of an epoch; the position stays.
  pipeline.next_chunk(3)
  for k in (0, 3, STEPS):
    with pytest.raises(ValueError, match=rf"k in 1\.\.2 \(2 of 5 .* got {k}"):
      pipeline.next_chunk(k)
  assert pipeline.step == 3
  assert_equal(batches(pipeline, [2]), batches(make(), [3, 2])[3:])


@each_pipeline
def test_load_works_inside_a_compiled_scan(make, assert_equal):
  pipeline = make()
  expected = batches(make(), [STEPS, STEPS])
  traces = []

  @jax.jit
  def epoch(resident, chunk):
    traces.append(1)
    load = pipeline.load
    return jax.lax.scan(lambda c, x: (c, load(resident, x)), 0, chunk)[1]

  for start in (0, STEPS):
    stacked = epoch(pipeline.resident, pipeline.next_chunk(STEPS))
    got = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(STEPS)]
    assert_equal(got, expected[start : start + STEPS])
  assert len(traces) == 1


def test_only_the_device_pipeline_keeps_the_set_on_the_device(sources):
  options = {"batch_size": BATCH, "seed": 0}
  resident = data.create("device", sources["memory"], **options).resident
  assert {key: (v.shape, v.dtype) for key, v in resident.items()} == {
    "image": ((COUNT, 4, 4, 3), jnp.uint8),
    "label": ((COUNT,), jnp.int32),
  }
  for name in ("grain", "dali"):
    assert data.create(name, sources["files"], **options).resident == {}


@pytest.mark.parametrize(
  ("name", "kind", "options", "words"),
  [
    ("device", "files", {}, r"got folder, which has image files.*'grain'"),
    ("dali", "memory", {}, r"'dali' reads image files.*synthetic.*'grain'"),
    ("grain", "memory", {"num_workers": 2}, "synthetic is in memory"),
    ("grian", "files", {}, r"pipeline 'grian'\. Did you mean grain"),
  ],
)
def test_what_does_not_fit_is_refused(make, options, words):
  with pytest.raises(ValueError, match=words):
    make(**options)


def test_a_name_may_be_a_class_of_the_users_own(sources):
  own, options = "kd_jax.data.grain:GrainPipeline", {"batch_size": 8, "seed": 0}
  pipeline = data.create(own, sources["memory"], **options)
  assert pipeline.next_chunk(1)["index"].shape == (1, 8)
  stream = data.eval_stream(sources["files"], 8, pipeline=own)
  assert type(stream) is data.EvalStream


@pytest.mark.parametrize(
  ("name", "package", "kind"),
  [("grain", "grain", "files"), ("dali", "nvidia.dali", "files")],
)
def test_a_missing_package_is_named(name, package, make, monkeypatch):
  monkeypatch.delitem(sys.modules, f"kd_jax.data.{name}", raising=False)
  monkeypatch.setitem(sys.modules, package, None)  # as if not installed
  with pytest.raises(ImportError, match=rf"pip install .*{name}.*device"):
    make()
