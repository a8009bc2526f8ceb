"""Drawing, scores and banks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses

LABELS = np.array([2, 0, 1, 1, 0, 2, 1, 4, 1, 4, 0, 2])  # class 3 is empty


draw_negatives = jax.jit(losses.draw_negatives, static_argnames="k")
draw_positives = jax.jit(losses.draw_positives)


@pytest.fixture(scope="module")
def table():
  return losses.class_table(jnp.asarray(LABELS), 5)


def test_class_table(table):
  np.testing.assert_array_equal(LABELS[table.order], np.sort(LABELS))
  np.testing.assert_array_equal(table.class_count, [3, 4, 3, 0, 2])
  np.testing.assert_array_equal(table.class_start, [0, 3, 7, 10, 10])


def test_class_table_refuses_labels():
  with pytest.raises(ValueError, match=r"classes in \[0, 4\), got values from"):
    losses.class_table(jnp.asarray(LABELS), 4)
  with pytest.raises(ValueError, match=r"at least two classes.*class 1"):
    losses.class_table(jnp.ones(6, jnp.int32), 5)
  with pytest.raises(ValueError, match="train_labels: expected an integer"):
    losses.class_table(jnp.ones((6, 1)), 5)


def test_parts_of_a_bank_add_up():
  rng = np.random.default_rng(0)
  bank, v = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((12, 4), (3, 4))
  )
  for k in (2, 40):  # by gathering, and by products with the whole bank
    indices = rng.integers(0, 12, (3, k))
    whole = losses.crd_scores(v, bank, indices, temperature=0.5)
    parts = [
      losses.crd_scores(
        v, bank[i : i + 5], indices, temperature=0.5, first_row=i
      )
      for i in (0, 5, 10)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5, atol=1e-6)
  index = np.array([11, 0, 6])
  moved = losses.crd_update(bank, v, index, momentum=0.5)
  parts = [
    losses.crd_update(bank[i : i + 5], v, index, momentum=0.5, first_row=i)
    for i in (0, 5, 10)
  ]
  np.testing.assert_array_equal(np.concatenate(parts), moved)
  changed = np.any(np.asarray(moved) != bank, axis=1)
  assert list(np.flatnonzero(changed)) == [0, 6, 11]


def chi_square(counts, expected):
  return np.sum((counts - expected) ** 2 / expected)


def test_negatives_are_uniform_over_the_other_classes(table):
  k = 6000
  index = np.arange(len(LABELS), dtype=np.int32)
  negatives = np.asarray(
    draw_negatives(jax.random.key(0), index, jnp.asarray(LABELS), table, k=k)
  )
  assert negatives.shape == (len(LABELS), k)
  for row, label in zip(negatives, LABELS):
    counts = np.bincount(row, minlength=len(LABELS))
    others = label != LABELS
    assert np.all(counts[~others] == 0)
    # At most 9 degrees of freedom: 34 is exceeded once in 10^4.
    assert chi_square(counts[others], k / others.sum()) < 34


def test_positives_are_uniform_over_the_own_class(table):
  draws = 3000
  index = np.arange(draws, dtype=np.int32)
  for label in (0, 1, 2, 4):
    labels = jnp.full(draws, label)
    drawn = draw_positives(jax.random.key(1), index, labels, table)
    counts = np.bincount(drawn, minlength=len(LABELS))
    own = label == LABELS
    assert np.all(counts[~own] == 0)
    assert chi_square(counts[own], draws / own.sum()) < 22


def test_a_draw_depends_on_key_and_position_alone(table):
  index = np.array([5, 1, 7], np.int32)
  labels = jnp.asarray(LABELS)[index]

  def draw(key, i, y):
    key = jax.random.key(key)
    return np.asarray(draw_negatives(key, i, y, table, k=50))

  together = draw(0, index, labels)
  np.testing.assert_array_equal(together[1:2], draw(0, index[1:2], labels[1:2]))
  assert not np.array_equal(together, draw(1, index, labels))
  assert not np.array_equal(together[0], together[2])


def test_scores_with_and_without_the_gathered_bank():
  """The two ways to compute them agree; the bank's size chooses."""
  rng = np.random.default_rng(0)
  for n in (20, 200):  # below and above (1 + k) * d = 15 * 4
    bank = rng.standard_normal((n, 4)).astype(np.float32)
    v = rng.standard_normal((3, 4)).astype(np.float32)
    indices = rng.integers(0, n, (3, 15))
    expected = np.einsum("bd,bkd->bk", v, bank[indices]) / 0.5

    def mean(v, bank=bank, indices=indices):
      scores = losses.crd_scores(
        v, jnp.asarray(bank), jnp.asarray(indices), temperature=0.5
      )
      return jnp.mean(jnp.square(scores)), scores

    gradient, scores = jax.grad(mean, has_aux=True)(jnp.asarray(v))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    by_hand = 2 * np.einsum("bk,bkd->bd", expected / 0.5, bank[indices]) / 45
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-4, atol=1e-5)


def test_normalizer():
  scores = jnp.log(jnp.array([[1.0, 3.0], [2.0, 6.0]]))
  np.testing.assert_allclose(losses.crd_normalizer(scores, 10), 30.0, rtol=1e-6)


def test_update_moves_rows_and_keeps_them_unit():
  bank = jnp.eye(3)
  v = jnp.array([[0.0, 0.0, 1.0]])
  moved = losses.crd_update(bank, v, jnp.array([1]), momentum=0.25)
  expected = np.array([0.0, 0.25, 0.75]) / np.hypot(0.25, 0.75)
  np.testing.assert_allclose(moved[1], expected, rtol=1e-6)
  np.testing.assert_array_equal(moved[jnp.array([0, 2])], bank[::2])


@pytest.mark.parametrize("parts", [1, 3])
def test_the_first_of_two_updates_of_a_row_counts(parts):
  """Wherever the row lies; the order of writes is no device's choice."""
  rng = np.random.default_rng(0)
  bank, v = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((6, 4), (5, 4))
  )
  update = jax.jit(losses.crd_update)
  expected = update(bank, v[:3], jnp.array([4, 1, 2]), momentum=0.5)
  rows = 6 // parts
  moved = [
    update(
      bank[i : i + rows],
      v,
      jnp.array([4, 1, 2, 4, 1]),
      momentum=0.5,
      first_row=i,
    )
    for i in range(0, 6, rows)
  ]
  np.testing.assert_array_equal(np.concatenate(moved), expected)


def test_a_nearer_positive_and_farther_negatives_lower_the_loss():
  scores = jnp.array([[1.0, 0.5, 0.2]])

  def loss(student):
    return losses.crd_loss(student, scores, 3.0, 3.0, num_examples=9)[0]

  gradient = jax.grad(loss)(scores)
  assert gradient[0, 0] < 0
  assert np.all(gradient[0, 1:] > 0)


def test_a_low_temperature_does_not_overflow():
  scores = jnp.array([[1.0, -1.0, 0.5]]) / 0.005
  value = losses.crd_loss(scores, scores, 30.0, 30.0, num_examples=9)
  assert np.all(np.isfinite(value))
