"""Files written whole and verified when read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import storage
from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib


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


def test_a_tree_comes_back(tmp_path):
  tree = {"a": {"b": np.arange(3, dtype=np.int32)}, "c": np.float32([1, -0.0])}
  storage.save_tree(tmp_path / "tree", tree)
  read = storage.restore_tree(tmp_path / "tree")
  assert storage.fingerprint(read) == storage.fingerprint(tree)
  assert read["a"]["b"].dtype == np.int32
  with pytest.raises(ValueError, match="expected an Orbax checkpoint, got one"):
    storage.restore_tree(tmp_path)


def test_json_appears_whole(tmp_path):
  path = tmp_path / "a.json"
  assert storage.read_json(path) is None
  storage.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    storage.write_json(path, {"a": object()})
  assert storage.read_json(path) == json.loads(path.read_text()) == {"a": 1}
