"""Fingerprints: every bit counts, and no device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.runs.fingerprint import fingerprint


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
    prints = {fingerprint([variant])[0] for variant in variants}
    assert len(prints) == len(variants)


def test_the_fingerprint_sees_two_changes_that_are_alike():
  x = np.ones(512, np.float32)
  x[:3] = (2, -1, 0)
  changed = [x.copy() for _ in range(4)]
  changed[0][[0, 256]] = x[[256, 0]]  # 2 and 1 change places
  changed[1][[1, 300]] = x[[300, 1]]  # -1 and 1 change places
  changed[2][[5, 6]] *= -1  # two signs
  changed[3][2] = -0.0  # equal, but other bits
  prints = fingerprint([x, *changed])
  assert len(set(prints)) == 5


def test_the_fingerprint_does_not_depend_on_the_devices():
  x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
  mesh = devices_lib.make_devices(num_devices=4).mesh
  for spec in (P(), P(collectives.AXIS)):
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    assert fingerprint({"a": placed, "b": 2 * placed}) == (
      fingerprint({"a": x, "b": 2 * x})
    )
  assert fingerprint({}) == []
