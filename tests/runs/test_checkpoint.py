"""Checkpoints: bit-exact, verified, and safe beside a program that goes on."""

import gc
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import storage
from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.runs import checkpoint
from kd_jax.training import optim
from kd_jax.training import state as state_lib


def make_state(seed):
  """A state with every kind of leaf and container that runs have."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  student = {
    "params": {
      "conv": {"kernel": normal(3, 3, 3, 8)},
      "fc": {"kernel": normal(8, 5), "bias": jnp.float32([0, -0.0, 1, 2, 3])},
    },
    "batch_stats": {"bn": {"mean": normal(8), "var": jnp.ones(8)}},
  }
  distiller = {
    "params": {},
    "memory": {
      "bank_s": normal(40, 16),
      "z_s": jnp.float32(rng.random()),
      "order": jnp.asarray(rng.permutation(40), jnp.int32),
      "half": normal(7).astype(jnp.bfloat16),
      "flags": jnp.asarray(rng.random(9) < 0.5),
      "bytes": jnp.asarray(rng.integers(0, 256, 11), jnp.uint8),
    },
  }
  optimizer = optim.sgd(
    optax.constant_schedule(0.1),
    weight_decay=0.1,
    decay_mask={
      "student": {
        "conv": {"kernel": True},
        "fc": {"kernel": True, "bias": False},
      },
      "distiller": {},
    },
    gradient_clip=1.0,
  )
  state = state_lib.create(student, distiller, optimizer)
  return state.replace(step=jnp.int32(seed))


def assert_same_bits(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)
  ):
    name = jax.tree_util.keystr(path)
    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with checkpoints of steps 1 and 2, to be copied."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  saver = checkpoint.Checkpointer(folder, keep=2)
  for step in (1, 2):
    saver.save(
      step,
      make_state(step),
      position={"step": step, "grain": {"next": [step]}},
      meta={"best": {"top1": 12.5 * step}, "totals": {}},
    )
  saver.close()
  return folder


# Orbax leaves the tasks that it gave up for the garbage collector to report.
damaging = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def collect_garbage():
  yield
  gc.collect()


@pytest.fixture
def copied(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, like, **options):
  reader = checkpoint.Checkpointer(folder, keep=2, **options)
  try:
    return reader.restore_latest(like)
  finally:
    reader.close()


def test_the_newest_comes_back_bit_for_bit(saved):
  restored = restore(saved, make_state(0))
  assert restored.step == 2
  assert restored.position == {"step": 2, "grain": {"next": [2]}}
  assert restored.meta == {"best": {"top1": 25.0}, "totals": {}}
  assert_same_bits(restored.state, make_state(2))


def test_without_a_template_come_plain_dicts_of_arrays(saved):
  """What an export reads: no device or class of the run is needed."""
  state = restore(saved, None, read_only=True).state
  expected = make_state(2)
  bank = state["collections"]["distiller"]["memory"]["bank_s"]
  assert isinstance(bank, np.ndarray)
  assert_same_bits(bank, expected.collections["distiller"]["memory"]["bank_s"])
  kernel = state["params"]["student"]["conv"]["kernel"]
  assert_same_bits(kernel, expected.params["student"]["conv"]["kernel"])
  assert state["step"] == 2


def test_it_is_placed_as_the_template_says(saved):
  devices = devices_lib.make_devices(num_devices=2)
  like = devices.replicate(make_state(0))
  restored = restore(saved, like).state
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like)):
    assert a.sharding == b.sharding
    assert a.committed == b.committed and a.weak_type == b.weak_type
  assert_same_bits(restored, make_state(2))


def test_an_empty_folder_has_nothing(tmp_path):
  assert restore(tmp_path / "none", make_state(0)) is None


def test_the_newest_are_kept(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, keep=2)
  for step in (3, 10, 20):
    saver.save(step, {"x": jnp.float32(step)}, position={}, meta={})
  # What is there already is not written again.
  saver.save(20, {"x": jnp.float32(0)}, position={}, meta={})
  saver.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]
  assert restore(tmp_path, {"x": jnp.float32(0)}).state == {"x": 20}


def cut(path):
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGES = {"cut": cut, "flip": flip, "remove": lambda path: path.unlink()}


@damaging
@pytest.mark.usefixtures("collect_garbage")
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_harmless_or_seen(saved, tmp_path, how, caplog):
  names = [
    path.relative_to(saved)
    for path in sorted((saved / "2").rglob("*"))
    if path.is_file()
  ]
  assert len(names) > 8
  seen = set()
  for i, name in enumerate(names):
    folder = shutil.copytree(saved, tmp_path / str(i) / "checkpoints")
    DAMAGES[how](folder / name)
    caplog.clear()
    restored = restore(folder, make_state(0))
    assert_same_bits(restored.state, make_state(restored.step))
    assert restored.position == {
      "step": restored.step,
      "grain": {"next": [restored.step]},
    }
    assert restored.meta["best"] == {"top1": 12.5 * restored.step}
    aside = folder.with_name("checkpoints_corrupt") / "2"
    assert aside.exists() == (restored.step == 1)
    assert (folder / "2").exists() == (restored.step == 2)
    if restored.step == 1:
      seen.add(name.parts[1])
      assert (
        f"checkpoint of step 2 in {folder} cannot be used" in caplog.text
        and "the one before it is tried" in caplog.text
      )
  assert {"state", "position", "meta"} <= seen


def test_later_steps_are_taken_back(copied):
  assert checkpoint.steps(copied) == [1, 2]
  runner = checkpoint.Checkpointer(copied, keep=2)
  assert runner.restore_latest(make_state(0), up_to=1).step == 1
  assert checkpoint.steps(copied) == [runner.newest] == [1]
  assert not copied.with_name("checkpoints_corrupt").exists()
  # Another 2: the one that was there would be left as it is.
  runner.save(2, make_state(3), position={}, meta={})
  runner.close()
  assert_same_bits(restore(copied, make_state(0)).state, make_state(3))
  runner = checkpoint.Checkpointer(copied, keep=2)
  assert runner.restore_latest(make_state(0), up_to=0) is None
  runner.close()
  assert checkpoint.steps(copied) == []
  assert checkpoint.steps(copied / "nothing") == []


def test_after_that_the_run_goes_on(copied):
  """The step set aside is made, and saved, again."""
  cut(copied / "2" / "meta" / "metadata")
  runner = checkpoint.Checkpointer(copied, keep=2)
  assert runner.restore_latest(make_state(0)).step == 1
  runner.save(2, make_state(2), position={}, meta={})
  runner.close()
  assert_same_bits(restore(copied, make_state(0)).state, make_state(2))


def test_all_bad_is_an_error_and_changes_nothing(copied, caplog):
  for step in (1, 2):
    cut(copied / str(step) / "meta" / "metadata")
  for _ in range(2):  # and the second time it is no fresh start
    with pytest.raises(
      ValueError,
      match=rf"none of the 2 checkpoints of {copied} can be read.*"
      "Start again in another --workdir",
    ):
      restore(copied, make_state(0))
  assert sorted(p.name for p in copied.iterdir()) == ["1", "2"]
  assert "checkpoint of step 1 in" in caplog.text


def test_a_reader_changes_nothing(copied):
  cut(copied / "2" / "meta" / "metadata")
  before = sorted(copied.parent.rglob("*"))
  assert restore(copied, None, read_only=True).step == 1
  assert sorted(copied.parent.rglob("*")) == before


def test_the_fingerprint_sees_every_bit():
  rng = np.random.default_rng(0)
  for x in (
    rng.standard_normal(6).astype(np.float32),
    rng.standard_normal(6).astype(jnp.bfloat16),
    rng.integers(-5, 5, 6, np.int32),
    rng.integers(0, 255, 6, np.uint8),
  ):
    width = 8 * x.dtype.itemsize
    variants = np.stack([x] * (x.size * width + 1))
    words = variants.view(f"u{x.dtype.itemsize}")
    for i in range(x.size * width):
      words[i, i // width] ^= np.array(1 << (i % width), words.dtype)
    prints = {storage.fingerprint([variant])[0] for variant in variants}
    assert len(prints) == len(variants)


def test_the_fingerprint_sees_two_changes_that_are_alike():
  x = np.ones(512, np.float32)
  x[:3] = (2, -1, 0)
  changed = [x.copy() for _ in range(4)]
  changed[0][[0, 256]] = x[[256, 0]]  # 2 and 1 change places
  changed[1][[1, 300]] = x[[300, 1]]  # -1 and 1 change places
  changed[2][[5, 6]] *= -1  # two signs
  changed[3][2] = -0.0  # equal, but other bits
  prints = storage.fingerprint([x, *changed])
  assert len(set(prints)) == 5


def test_the_fingerprint_does_not_depend_on_the_devices():
  x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
  mesh = devices_lib.make_devices(num_devices=4).mesh
  for spec in (P(), P(collectives.AXIS)):
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    assert storage.fingerprint({"a": placed, "b": 2 * placed}) == (
      storage.fingerprint({"a": x, "b": 2 * x})
    )
  assert storage.fingerprint({}) == []


def test_rows_of_zeros_fit_any_number_of_devices(tmp_path):
  """What 4 devices filled up, 3, 1 and the host read."""
  bank = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
  specs = {"bank": P(collectives.AXIS), "n": P()}

  def placed(num_devices, values):
    devices = devices_lib.make_devices(num_devices=num_devices)
    return devices.place({"bank": values, "n": np.int32(1)}, specs)

  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(1, placed(4, bank), position={}, meta={})
  saver.close()
  for num_devices, rows in ((4, 12), (3, 12), (2, 10), (1, 10)):
    like = placed(num_devices, np.zeros_like(bank))
    read = restore(tmp_path, like).state["bank"]
    assert read.shape == (rows, 3) and read.sharding == like["bank"].sharding
    np.testing.assert_array_equal(read[:10], bank)
    assert not np.asarray(read[10:]).any()
  with pytest.raises(ValueError, match="none of the 1 checkpoints"):
    restore(tmp_path, placed(1, bank[:9]))


class _FullDisk:
  """No file may grow beyond some bytes, as long as the context lasts."""

  def __init__(self, limit):
    self.limit = limit

  def __enter__(self):
    self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

  def __exit__(self, *exception):
    resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@damaging
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.usefixtures("collect_garbage")
@pytest.mark.parametrize("limit", [0, 4096])  # seen before, and while writing
def test_a_full_disk_is_told_once_and_tried_again(tmp_path, limit, caplog):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal(20000), jnp.float32)
  saver = checkpoint.Checkpointer(tmp_path, keep=1)
  assert saver.save(1, {"x": x}, position={}, meta={})
  assert saver.wait() and saver.newest == 1
  with _FullDisk(limit):
    started = saver.save(2, {"x": 2 * x}, position={}, meta={})
    assert started == (limit > 0)
    assert saver.wait() != started
  assert saver.newest == 1 and saver.wait()
  (record,) = [r for r in caplog.records if r.name == "kd_jax.checkpoint"]
  assert f"the checkpoint of step 2 could not be written to {tmp_path}" in (
    record.getMessage()
  )
  assert "File too large" in record.getMessage()
  assert "The one of step 1 is kept; training goes on" in record.getMessage()
  assert [p.name for p in tmp_path.iterdir()] == ["1"]
  assert saver.save(3, {"x": 3 * x}, position={}, meta={})
  saver.close()
  assert [p.name for p in tmp_path.iterdir()] == ["3"]
  np.testing.assert_array_equal(restore(tmp_path, None).state["x"], 3 * x)


def test_a_disk_with_too_little_room(tmp_path, monkeypatch, caplog):
  saver = checkpoint.Checkpointer(tmp_path)
  usage = shutil.disk_usage(tmp_path)._replace(free=7999)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  state = {"x": jnp.zeros(2000)}
  assert not saver.save(1, state, position={}, meta={})
  assert "8,000 bytes are needed and 7,999 are free" in caplog.text
  assert "There is none before it" in caplog.text
  saver.close()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, num_devices):
  """Donated memory is written over at once: the copy must have been made."""
  devices = devices_lib.make_devices(num_devices=num_devices)
  step = devices.map_chunk(
    lambda carry, constants, resident, xs: jax.tree.map(
      lambda x: x * -1.5 + 1, carry
    ),
    donate=True,
  )
  xs = devices.shard({"x": np.zeros((1, 2), np.float32)})
  rng = np.random.default_rng(0)
  start = {
    name: rng.standard_normal((256, 1024)).astype(np.float32) for name in "abcd"
  }
  # Read from a twin: an array that the host has looked at is not donated.
  state, twin = (step(devices.replicate(start), {}, {}, xs) for _ in range(2))
  saver = checkpoint.Checkpointer(tmp_path, keep=3)
  expected = {}
  for number in (1, 2, 3):
    expected[number] = jax.tree.map(np.array, twin)
    saver.save(number, state, position={}, meta={})
    for _ in range(20):
      state, twin = (step(tree, {}, {}, xs) for tree in (state, twin))
  jax.block_until_ready(state)
  saver.close()
  for number in (1, 2, 3):
    read = storage.restore_tree(tmp_path / str(number) / "state")
    assert_same_bits(read, expected[number])
  assert restore(tmp_path, start).step == 3


def test_a_tree_alone_comes_back(tmp_path):
  tree = {"a": {"b": np.arange(3, dtype=np.int32)}, "c": np.float32([1, 2])}
  storage.save_tree(tmp_path / "tree", tree)
  assert_same_bits(storage.restore_tree(tmp_path / "tree"), tree)


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match="expected an Orbax checkpoint, got one"):
    storage.restore_tree(tmp_path)


def test_json_appears_whole(tmp_path):
  path = tmp_path / "a.json"
  storage.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    storage.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
