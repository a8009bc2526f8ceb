"""Drawing, scores and banks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import normal

from kd_jax import losses

LABELS = np.array([2, 0, 1, 1, 0, 2, 1, 4, 1, 4, 0, 2])  # class 3 is empty
EVERY = np.arange(12, dtype=np.int32)

draw_negatives = jax.jit(losses.draw_negatives, static_argnames="k")
draw_positives = jax.jit(losses.draw_positives)


@pytest.fixture(scope="module")
def table():
  return losses.class_table(jnp.asarray(LABELS), 5)


def test_draws_are_uniform(table):
  """Over the other classes, and over the own class."""
  draws = 6000
  key = jax.random.key(0)
  negatives = draw_negatives(key, EVERY, LABELS, table, k=draws)
  keys = jax.random.split(key, draws // len(EVERY))
  draw = jax.vmap(draw_positives, in_axes=(0, None, None, None))
  for row, label in zip(np.asarray(negatives), LABELS):
    same = np.full_like(LABELS, label)
    positives = np.asarray(draw(keys, EVERY, same, table)).ravel()
    for drawn, same_class in ((row, False), (positives, True)):
      allowed = (label == LABELS) == same_class
      counts = np.bincount(drawn, minlength=len(LABELS))
      assert np.all(counts[~allowed] == 0)
      expected = draws / allowed.sum()
      # At most 9 degrees of freedom: 34 is exceeded once in 10^4.
      assert np.sum((counts[allowed] - expected) ** 2 / expected) < 34


def test_a_draw_depends_on_key_and_position_alone(table):
  index = np.array([5, 1, 7], np.int32)

  def draw(key, index):
    key = jax.random.key(key)
    return np.asarray(draw_negatives(key, index, LABELS[index], table, k=50))

  together = draw(0, index)
  np.testing.assert_array_equal(together[1:2], draw(0, index[1:2]))
  assert not np.array_equal(together, draw(1, index))
  assert not np.array_equal(together[0], together[2])


@pytest.mark.parametrize("n", [20, 200])
def test_scores(n):
  """With the gathered vectors or the whole bank, whole or in parts."""
  bank, v = normal(0, n, 4), normal(1, 3, 4)  # the ways meet at n = 60
  indices = np.random.default_rng(2).integers(0, n, (3, 15))
  expected = np.einsum("bd,bkd->bk", v, bank[indices]) / 0.5

  def scores(v, bank=bank, **options):
    return losses.crd_scores(v, bank, indices, temperature=0.5, **options)

  found, vjp = jax.vjp(scores, v)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  (gradient,) = vjp(found)
  by_hand = np.einsum("bk,bkd->bd", expected / 0.5, bank[indices])
  np.testing.assert_allclose(gradient, by_hand, rtol=1e-4, atol=1e-4)
  parts = [scores(v, bank[i : i + 8], first_row=i) for i in range(0, n, 8)]
  np.testing.assert_allclose(sum(parts), expected, rtol=1e-5, atol=1e-6)


def test_normalizer():
  scores = jnp.log(jnp.array([[1.0, 3.0], [2.0, 6.0]]))
  for shift in (0.0, 1e4):
    log_z = losses.crd_log_normalizer(scores + shift, 10)
    np.testing.assert_allclose(log_z, np.log(30.0) + shift, rtol=1e-6)


def test_what_does_not_exist_is_not_a_number(table):
  """Under jit: neither the last class nor the last example."""
  index, labels = np.array([0, 1, 12, -1]), np.array([0, 5, 1, -1])
  key, bad = jax.random.key(0), [False, True, True, True]
  negatives = draw_negatives(key, index, labels, table, k=3)
  positives = draw_positives(key, index, labels, table)
  np.testing.assert_array_equal((negatives == -1).all(1), bad)
  np.testing.assert_array_equal(positives == -1, bad)
  for options in ({}, {"first_row": 0}):
    scores = jax.jit(
      lambda rows, o=options: losses.crd_scores(
        normal(0, 4, 2), normal(1, 12, 2), rows, temperature=1.0, **o
      )
    )(negatives)
    np.testing.assert_array_equal(np.isnan(scores).all(1), bad)
    assert np.isfinite(scores[0]).all()


@pytest.mark.parametrize("parts", [1, 3])
def test_update(parts):
  """Rows move and stay unit; the first of two updates of a row counts."""
  bank, v = normal(0, 6, 4), normal(1, 5, 4)
  index, rows = np.array([4, 1, 2, 4, 1]), 6 // parts
  moved = [
    losses.crd_update(bank[i : i + rows], v, index, momentum=0.25, first_row=i)
    for i in range(0, 6, rows)
  ]
  expected = bank.copy()
  expected[index[:3]] = 0.25 * bank[index[:3]] + 0.75 * v[:3]
  lengths = np.linalg.norm(expected[index[:3]], axis=1, keepdims=True)
  expected[index[:3]] /= lengths
  np.testing.assert_allclose(np.concatenate(moved), expected, rtol=1e-5)
