"""Collectives, placement, and the mapping of a function over devices."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.models import layers

AXIS = collectives.AXIS


def test_without_an_axis_nothing_happens():
  x = {"a": jnp.arange(3.0)}
  for collective in (
    collectives.axis_mean,
    collectives.axis_mean_of_gradients,
    collectives.axis_sum,
    collectives.axis_gather,
    collectives.axis_sum_rows,
  ):
    assert collective(x, None) is x
  assert collectives.axis_size(None) == 1
  assert int(collectives.axis_index(None)) == 0


def everything(carry, constants, resident, xs):
  """Uses every collective on a [k, B] input."""
  x = xs["x"][0]
  gathered = collectives.axis_gather(x, AXIS)
  where = collectives.axis_gather(collectives.axis_index(AXIS)[None], AXIS)
  return carry + 1, {
    "mean": collectives.axis_mean(jnp.mean(x), AXIS),
    "sum": collectives.axis_sum({"x": jnp.sum(x)}, AXIS),
    "gathered": gathered,
    "where": where,
    "size": jnp.int32(collectives.axis_size(AXIS)),
    "others": constants + resident["r"],
  }


@pytest.mark.parametrize(
  ("num_devices", "mapping"),
  [(1, "shard_map"), (4, "shard_map"), (1, "pmap"), (4, "pmap")],
)
def test_map_chunk(num_devices, mapping):
  devices = devices_lib.make_devices(num_devices=num_devices, mapping=mapping)
  x = np.arange(16, dtype=np.float32).reshape(2, 8) ** 2
  carry, out = devices.map_chunk(everything)(
    *devices.replicate((jnp.zeros(2), jnp.ones(()), {"r": jnp.ones(())})),
    devices.shard({"x": x}),
  )
  np.testing.assert_array_equal(carry, [1, 1])
  np.testing.assert_array_equal(out["gathered"], x[0])
  np.testing.assert_array_equal(out["where"], range(num_devices))
  assert out["mean"] == x[0].mean()
  assert out["sum"]["x"] == x[0].sum()
  assert out["size"] == num_devices
  assert out["others"] == 2


def test_shard_and_replicate_place_what_they_say():
  devices = devices_lib.make_devices(num_devices=4)
  x = np.arange(24, dtype=np.int32).reshape(2, 4, 3)
  for given in (x, jnp.asarray(x)):  # from the host, or on a device already
    placed = devices.shard({"x": given})["x"]
    np.testing.assert_array_equal(placed, x)
    shards = {
      s.device.id: np.asarray(s.data) for s in placed.addressable_shards
    }
    for i, device in enumerate(devices.mesh.devices.flat):
      np.testing.assert_array_equal(shards[device.id], x[:, i : i + 1])
  copies = devices.replicate(x).addressable_shards
  assert len(copies) == 4
  for copy in copies:
    np.testing.assert_array_equal(copy.data, x)


def test_rows_are_split_and_filled_up():
  devices = devices_lib.make_devices(num_devices=4)
  x = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
  placed = devices.place({"x": x, "y": x}, {"x": P(AXIS), "y": P()})
  assert placed["x"].shape == (8, 2) and placed["y"].shape == (6, 2)
  np.testing.assert_array_equal(placed["x"][:6], x)
  np.testing.assert_array_equal(placed["x"][6:], 0)
  assert {s.data.shape for s in placed["x"].addressable_shards} == {(2, 2)}

  def add(carry, constants, resident, xs):
    rows = collectives.axis_index(AXIS) * 10 + jnp.zeros((2, 2))
    return {"x": carry["x"] + rows, "y": carry["y"]}, carry["y"][0]

  specs = {"x": P(AXIS), "y": P()}
  carry, first = devices.map_chunk(add, carry_specs=specs)(
    placed, {}, {}, devices.shard({"x": np.zeros((1, 4), np.float32)})
  )
  np.testing.assert_array_equal(carry["x"][4:6], x[4:6] + 20)
  np.testing.assert_array_equal(first, x[0])


def test_sums_of_rows_come_back_to_their_device():
  devices = devices_lib.make_devices(num_devices=2)

  def fn(carry, constants, resident, xs):
    own = 1.0 + collectives.axis_index(AXIS)
    rows = collectives.axis_sum_rows(own * jnp.arange(4.0), AXIS)
    return collectives.axis_gather(rows, AXIS)

  xs = devices.shard({"x": np.zeros((1, 2), np.float32)})
  np.testing.assert_array_equal(
    devices.map_chunk(fn)({}, {}, {}, xs), 3 * np.arange(4.0)
  )


@pytest.mark.parametrize("least_axes", [0, 2])
def test_the_mean_of_packed_gradients_is_that_of_each(least_axes):
  made = devices_lib.make_devices(num_devices=4)

  def both(carry, constants, resident, xs):
    x = xs["x"][0, 0]
    tree = {
      **{"vector": x[0, 0] ** 3, "scalar": x[0, 0, 0], "matrix": x[0]},
      **{"half": x[0, 1].astype(jnp.bfloat16), "map": x, "none": x[0, :0, 0]},
    }
    tree = {name: x for name, x in tree.items() if x.ndim >= least_axes}
    means = collectives.axis_mean(tree, AXIS)
    return carry, (means, collectives.axis_mean_of_gradients(tree, AXIS))

  x = np.random.default_rng(0).standard_normal((1, 4, 5, 6, 7))
  xs = made.shard({"x": x.astype(np.float32)})
  _, (expected, found) = made.map_chunk(both, donate=False)(
    made.replicate(jnp.zeros(())), {}, {}, xs
  )
  assert {k: x.dtype for k, x in found.items()} == {
    k: x.dtype for k, x in expected.items()
  }
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_flags_are_counted():
  devices = devices_lib.make_devices(num_devices=2)
  assert list(devices.count(True, False)) == [1, 0]


def test_donation_gives_up_the_carry_alone():
  devices = devices_lib.make_devices(num_devices=2)
  fn = devices.map_chunk(
    lambda carry, constants, resident, xs: carry + constants, donate=True
  )
  carry, constants = devices.replicate((jnp.zeros(8), jnp.ones(8)))
  xs = devices.shard({"x": np.zeros((1, 2), np.float32)})
  assert float(fn(carry, constants, {}, xs)[0]) == 1
  assert carry.is_deleted()
  assert not constants.is_deleted()


def test_zero_devices_are_all():
  assert devices_lib.make_devices().mesh.devices.size == jax.device_count() == 4


@pytest.mark.parametrize("num_devices", [5, -1])
def test_too_many_devices(num_devices):
  with pytest.raises(
    ValueError,
    match=rf"num_devices: expected 0 \(all\) to 4 \(cpu.*got {num_devices}",
  ):
    devices_lib.make_devices(num_devices=num_devices)


def test_unknown_mapping():
  with pytest.raises(
    ValueError, match="expected 'shard_map' or 'pmap', got 'vmap'"
  ):
    devices_lib.make_devices(mapping="vmap")


@pytest.mark.parametrize(
  ("cores", "batches", "count"),
  [
    (2, [64], 2),
    (4, [64, 96], 4),
    (6, [64], 4),
    (64, [64], 8),
    (4, [63], 3),
    (4, [64, 65], 1),
    (1, [64], 1),
  ],
)
def test_a_cpu_is_cut_into_devices_that_divide_the_batches(
  cores, batches, count, monkeypatch
):
  config = Config(-1)
  monkeypatch.setattr(jax, "config", config)
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
  monkeypatch.setenv("XLA_FLAGS", "")
  devices_lib.split_cpu(*batches)
  assert config.jax_num_cpu_devices == count


def test_a_cpu_is_left_as_the_user_has_cut_it(monkeypatch):
  config = Config(3)
  monkeypatch.setattr(jax, "config", config)
  monkeypatch.setenv("XLA_FLAGS", "")
  devices_lib.split_cpu(64)
  assert config.jax_num_cpu_devices == 3
  monkeypatch.setattr(jax, "config", config := Config(-1))
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
  devices_lib.split_cpu(64)
  assert config.jax_num_cpu_devices == -1


class Config:
  """What `split_cpu` reads and sets of JAX's, which a process may set once."""

  def __init__(self, jax_num_cpu_devices):
    self.jax_num_cpu_devices = jax_num_cpu_devices

  def update(self, name, value):
    assert name == "jax_num_cpu_devices"
    self.jax_num_cpu_devices = value


def _norm_over(devices: int):
  """BatchNorm's result and gradients on so many devices, of [B, C] on one."""
  norm = layers.BatchNorm(axis_name=AXIS)
  placed = devices_lib.make_devices(num_devices=devices)
  variables = layers.BatchNorm().init(
    jax.random.key(0), jnp.zeros((2, 3)), train=True
  )

  def program(_, weights, x):
    def loss(x, weights):
      y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
      return jnp.sum(weights * y), (y, new)

    (_, (y, new)), dx = jax.value_and_grad(loss, has_aux=True)(x, weights)
    return y, dx, new["batch_stats"]

  axis = P(AXIS)
  return jax.jit(
    jax.shard_map(
      program,
      mesh=placed.mesh,
      in_specs=(P(), axis, axis),
      out_specs=(axis, axis, P()),
      check_vma=False,
    )
  )


def test_batch_norm_over_devices_is_of_all_examples_in_one_exchange_each_way():
  rng = np.random.default_rng(0)
  # Far from zero, where a difference of squares would lose every digit, and
  # of another mean on each device.
  x = 1e3 + rng.standard_normal((8, 3)) + np.arange(8)[:, None]
  weights = rng.standard_normal((8, 3))
  arguments = (
    0,
    jnp.asarray(weights, jnp.float32),
    jnp.asarray(x, jnp.float32),
  )
  alone = _norm_over(1)(*arguments)
  program = _norm_over(4)
  y, dx, stats = program(*arguments)
  kept = np.asarray(x, np.float64)
  np.testing.assert_allclose(
    y, (kept - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5), atol=2e-4
  )
  np.testing.assert_allclose(
    stats["var"], 0.9 + 0.1 * kept.var(0, ddof=1), rtol=2e-4
  )
  np.testing.assert_allclose(y, alone[0], atol=2e-4)
  np.testing.assert_allclose(dx, alone[1], atol=2e-4)
  text = program.lower(*arguments).as_text()
  exchanges = ("all_gather", "reduce_scatter", "all_reduce")
  counts = [text.count(f"stablehlo.{name}") for name in exchanges]
  assert counts == [1, 0, 1]
