"""Hits, exact means, non-finite values."""

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.training import metrics

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  ("logits", "label", "k", "hit"),
  [
    ([3, 2, 1], 0, 1, 1),
    ([3, 2, 1], 1, 1, 0),
    ([3, 2, 1], 1, 2, 1),
    ([3, 2, 1], 2, 2, 0),
    # Ties count against the label.
    ([3, 3, 1], 0, 1, 0),
    ([3, 3, 1], 0, 2, 1),
    ([0, 0, 0], 2, 2, 0),
    # A network that has diverged has no hit.
    ([NAN, NAN, NAN], 0, 1, 0),
    ([NAN, 2, 1], 0, 1, 0),
    ([NAN, 2, 1], 1, 1, 0),
    ([NAN, NAN], 0, 5, 0),
    ([INF, 2, 1], 0, 1, 1),
    ([-INF, -INF, 1], 2, 1, 1),
    # Fewer classes than k: every class is among them.
    ([1, 2], 0, 5, 1),
  ],
)
def test_topk_correct(logits, label, k, hit):
  got = metrics.topk_correct(
    jnp.asarray([logits], jnp.float32), jnp.asarray([label]), k
  )
  assert got.dtype == jnp.float32
  assert got.tolist() == [hit]


@pytest.mark.parametrize("k", [1, 5])
def test_topk_correct_against_sorting(k):
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((64, 10)).astype(np.float32)
  labels = rng.integers(0, 10, 64)
  best = np.argsort(-logits, axis=1)[:, :k]
  got = metrics.topk_correct(jnp.asarray(logits), jnp.asarray(labels), k)
  np.testing.assert_array_equal(got, (best == labels[:, None]).any(1))


def test_means_are_exact_over_unequal_counts():
  # Two batches of 3 examples and one of 1: not the mean of means.
  sums = {
    "ce": np.array([3.0, 6.0, 10.0], np.float32),
    "top1": np.array([3.0, 0.0, 1.0], np.float32),
    "count": np.array([3.0, 3.0, 1.0], np.float32),
  }
  assert metrics.means(sums) == {"ce": 19 / 7, "top1": 100 * 4 / 7}
  scalars = {"loss": np.float32(6.0), "count": np.float32(4.0)}
  assert metrics.means(scalars) == {"loss": 1.5}
  # float32 would lose every 1 beside 2^24.
  sums = {"ce": np.array([2**24] + [1] * 1000, np.float32)}
  sums["count"] = np.ones(1001, np.float32)
  assert metrics.means(sums) == {"ce": (2**24 + 1000) / 1001}
  with pytest.raises(ValueError, match="expected images to score, got none"):
    metrics.means({"ce": np.zeros(2), "count": np.zeros(2)})


def test_global_sums_over_devices():
  devices = devices_lib.make_devices(num_devices=4)

  def chunk(carry, constants, resident, xs):
    x = xs[0]
    return metrics.global_sums(
      {"ce": jnp.sum(x)}, jnp.float32(x.size), collectives.AXIS
    )

  xs = devices.shard(np.arange(8, dtype=np.float32)[None])
  got = devices.map_chunk(chunk)({}, {}, {}, xs)
  assert {k: float(v) for k, v in got.items()} == {"ce": 28, "count": 8}


def test_first_non_finite():
  sums = {
    "loss": np.array([1.0, INF, NAN]),
    "ce": np.array([1.0, 1.0, 1.0]),
    "kd": np.array([1.0, -INF, 1.0]),
  }
  assert metrics.first_non_finite(sums) == (1, ["loss", "kd"])
  sums["loss"][:] = sums["kd"][:] = 1.0
  assert metrics.first_non_finite(sums) is None
