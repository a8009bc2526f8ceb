"""Checkpoints: bit-exact, verified, and safe beside a program that goes on."""

import gc
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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


def save(folder, *states, keep=2, **more):
  """Saves states as steps 1, 2 and so on."""
  saver = checkpoint.Checkpointer(folder, keep=keep)
  for step, state in enumerate(states, 1):
    options = {
      "position": {"step": step, "grain": {"next": [step]}},
      "meta": {"best": {"top1": 12.5 * step}},
      **more,
    }
    saver.save(step, state, **options)
  saver.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with checkpoints of steps 1 and 2, to be copied."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  save(folder, make_state(1), make_state(2))
  return folder


# Orbax leaves the tasks that it gave up for the garbage collector to report.
damaging = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)


@pytest.fixture
def collect_garbage():
  yield
  gc.collect()


@pytest.fixture
def copied(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def test_the_newest_comes_back_bit_for_bit_and_placed(saved):
  like = devices_lib.make_devices(num_devices=2).replicate(make_state(0))
  restored = checkpoint.restore_latest(saved, like)
  assert restored.step == 2
  assert restored.position == {"step": 2, "grain": {"next": [2]}}
  assert restored.meta == {"best": {"top1": 25.0}}
  assert_same_bits(restored.state, make_state(2))
  for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like)):
    assert (a.sharding, a.committed) == (b.sharding, b.committed)
    assert a.weak_type == b.weak_type


def test_both_velocities_of_dot_come_back(tmp_path):
  params = make_state(1).params
  dot = optim.dot(
    optax.constant_schedule(0.1),
    delta=0.075,
    shared=jax.tree.map(lambda _: True, params),
  )
  twice = jax.tree.map(lambda p: 2 * p, params)
  _, state = dot.update((params, twice), dot.init(params), params)
  save(tmp_path / "checkpoints", state)
  like = dot.init(params)
  restored = checkpoint.restore_latest(tmp_path / "checkpoints", like)
  assert_same_bits(restored.state, state)


def test_without_a_template_come_plain_dicts_of_arrays(saved):
  """What an export reads: no device or class of the run is needed."""
  state, expected = checkpoint.read_latest(saved).state, make_state(2)
  bank = state["collections"]["distiller"]["memory"]["bank_s"]
  assert isinstance(bank, np.ndarray)
  assert_same_bits(bank, expected.collections["distiller"]["memory"]["bank_s"])
  kernel = state["params"]["student"]["conv"]["kernel"]
  assert_same_bits(kernel, expected.params["student"]["conv"]["kernel"])
  assert state["step"] == 2


def test_an_empty_folder_has_nothing(tmp_path):
  assert checkpoint.restore_latest(tmp_path / "none", make_state(0)) is None
  assert checkpoint.read_latest(tmp_path / "none") is None


def test_the_newest_are_kept(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, keep=2)
  for step in (3, 10, 20):
    saver.save(step, {"x": jnp.float32(step)}, position={}, meta={})
  # What is there already is not written again.
  saver.save(20, {"x": jnp.float32(0)}, position={}, meta={})
  saver.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]
  assert checkpoint.steps(tmp_path) == [10, 20]
  assert checkpoint.read_latest(tmp_path).state == {"x": 20}


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
    before = sorted(folder.parent.rglob("*"))
    assert checkpoint.read_latest(folder).step in (1, 2)
    assert sorted(folder.parent.rglob("*")) == before  # a reader's changes
    restored = checkpoint.restore_latest(folder, make_state(0))
    assert_same_bits(restored.state, make_state(restored.step))
    assert restored.position["grain"] == {"next": [restored.step]}
    assert restored.meta["best"] == {"top1": 12.5 * restored.step}
    aside = folder.with_name("checkpoints_corrupt") / "2"
    assert aside.exists() == (restored.step == 1)
    assert (folder / "2").exists() == (restored.step == 2)
    if restored.step == 1:
      seen.add(name.parts[1])
      assert f"checkpoint of step 2 in {folder} cannot be used" in caplog.text
  assert {"state", "position", "meta"} <= seen


def test_the_step_set_aside_is_made_again(copied):
  cut(copied / "2" / "meta" / "metadata")
  assert checkpoint.restore_latest(copied, make_state(0)).step == 1
  save(copied, make_state(1), make_state(2))
  restored = checkpoint.restore_latest(copied, make_state(0))
  assert_same_bits(restored.state, make_state(2))


def test_all_bad_is_an_error_and_changes_nothing(copied):
  for step in (1, 2):
    cut(copied / str(step) / "meta" / "metadata")
  for _ in range(2):  # and the second time it is no fresh start
    for read in (
      lambda: checkpoint.restore_latest(copied, make_state(0)),
      lambda: checkpoint.read_latest(copied),
    ):
      with pytest.raises(
        ValueError, match=rf"none of the 2 checkpoints of {copied} .*--workdir"
      ):
        read()
  assert checkpoint.steps(copied) == [1, 2]
  assert checkpoint.restore_latest(copied, None, required=False) is None
  assert checkpoint.steps(copied) == []


def test_another_run_cannot_be_restored(copied):
  other = make_state(0)
  other = other.replace(params={**other.params, "teacher": {"x": jnp.ones(2)}})
  with pytest.raises(ValueError, match="none of the 2 checkpoints"):
    checkpoint.restore_latest(copied, other)


def test_rows_of_zeros_fit_any_number_of_devices(tmp_path):
  """What 4 devices filled up, 3, 1 and the host read."""
  bank = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
  specs = {"bank": P(collectives.AXIS), "n": P()}

  def placed(num_devices, values):
    devices = devices_lib.make_devices(num_devices=num_devices)
    return devices.place({"bank": values, "n": np.int32(1)}, specs)

  save(tmp_path, placed(4, bank))
  for num_devices, rows in ((4, 12), (3, 12), (2, 10), (1, 10)):
    like = placed(num_devices, np.zeros_like(bank))
    read = checkpoint.restore_latest(tmp_path, like).state["bank"]
    assert read.shape == (rows, 3) and read.sharding == like["bank"].sharding
    np.testing.assert_array_equal(read[:10], bank)
    assert not np.asarray(read[10:]).any()
  with pytest.raises(ValueError, match="none of the 1 checkpoints"):
    checkpoint.restore_latest(tmp_path, placed(1, bank[:9]))


@damaging
@pytest.mark.usefixtures("collect_garbage")
@pytest.mark.parametrize("limit", [0, 4096])  # no file, or part of one
def test_a_full_disk_fails_the_save_and_leaves_the_last(tmp_path, limit):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal(20000), jnp.float32)
  saver = checkpoint.Checkpointer(tmp_path, keep=1)
  saver.save(1, {"x": x}, position={}, meta={})
  saver.wait()
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    with pytest.raises(Exception, match="File too large"):
      saver.save(2, {"x": 2 * x}, position={}, meta={})
      saver.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert checkpoint.steps(tmp_path) == [1]
  np.testing.assert_array_equal(checkpoint.read_latest(tmp_path).state["x"], x)
  # The next run finds room, and removes what was left.
  save(tmp_path, {"x": x}, {"x": 3 * x}, keep=1)
  assert [p.name for p in tmp_path.iterdir()] == ["2"]
  read = checkpoint.read_latest(tmp_path)
  np.testing.assert_array_equal(read.state["x"], 3 * x)


def test_what_is_saved_beside_the_arrays_may_change_at_once(tmp_path):
  """Orbax writes it later, in a thread: the copy must have been made."""
  saver = checkpoint.Checkpointer(tmp_path)
  meta, position = {"totals": {"loss": 1.0}}, {"next": [3]}
  write = saver._checkpointer.save

  def write_late(*arguments, **options):
    meta["totals"]["loss"] = 2.0
    position["next"].append(4)
    write(*arguments, **options)

  saver._checkpointer.save = write_late
  saver.save(1, make_state(1), position=position, meta=meta)
  saver.close()
  restored = checkpoint.read_latest(tmp_path)
  assert restored.meta == {"totals": {"loss": 1.0}}
  assert restored.position == {"next": [3]}


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
