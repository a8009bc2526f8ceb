"""Crops and flips against numpy, and where their randomness comes from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.data import augment

KEY = jax.random.key(7)


def images(count=16, height=8, width=6, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(1, 256, (count, height, width, 3), np.uint8)


def transcription(x, rows, columns, flips, pad):
  count, height, width, channels = x.shape
  out = np.zeros_like(x)
  for b in range(count):
    canvas = np.zeros((height + 2 * pad, width + 2 * pad, channels), x.dtype)
    canvas[pad : pad + height, pad : pad + width] = x[b]
    y, z = int(rows[b]), int(columns[b])
    cut = canvas[y : y + height, z : z + width]
    out[b] = cut[:, ::-1] if flips[b] else cut
  return out


@pytest.mark.parametrize("pad", [1, 4])
def test_augment_equals_numpy_for_the_drawn_offsets(pad):
  x = images(64)
  index = jnp.arange(64)
  row, column, flipped = augment.draw(KEY, index, pad=pad)
  got = augment.augment(KEY, jnp.asarray(x), index, pad=pad)
  assert got.dtype == jnp.uint8
  np.testing.assert_array_equal(
    got, transcription(x, row, column, np.asarray(flipped), pad)
  )


def test_every_offset_crops_as_numpy_does():
  pad, side = 4, 9
  row, column = (v.ravel() for v in np.mgrid[:side, :side])
  x = images(side * side)
  got = augment.crop(
    jnp.asarray(x), jnp.asarray(row), jnp.asarray(column), pad=pad
  )
  flips = np.zeros(side * side, bool)
  np.testing.assert_array_equal(got, transcription(x, row, column, flips, pad))
  middle = side * side // 2
  np.testing.assert_array_equal(got[middle], x[middle])


def test_draws_are_uniform_and_independent():
  count = 16200
  row, column, flipped = augment.draw(KEY, jnp.arange(count), pad=4)
  cell = (np.asarray(row) * 9 + np.asarray(column)) * 2 + np.asarray(flipped)
  counts = np.bincount(cell, minlength=162)
  assert counts.shape == (162,) and counts.min() > 0
  # Chi-squared of 161 degrees of freedom: mean 161, deviation 18.
  chi2 = ((counts - count / 162) ** 2 / (count / 162)).sum()
  assert 90 < chi2 < 232


def test_an_examples_draw_depends_on_key_and_index_only():
  x = jnp.asarray(images(12))
  index = jnp.array([5, 900, 17, 3, 4, 8, 2, 49999, 1, 0, 77, 6])
  run = jax.jit(augment.augment)
  whole = run(KEY, x, index)
  np.testing.assert_array_equal(augment.augment(KEY, x, index), whole)
  np.testing.assert_array_equal(run(KEY, x[::-1], index[::-1])[::-1], whole)
  parts = [run(KEY, x[i : i + 3], index[i : i + 3]) for i in range(0, 12, 3)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_another_step_or_index_draws_anew():
  draw = jax.jit(functools.partial(augment.draw, pad=4))
  index = jnp.arange(200)
  first, *others = (
    np.stack(draw(key, i))
    for key, i in ((KEY, index), (jax.random.key(8), index), (KEY, index + 200))
  )
  for other in others:  # equal draws by chance: 1 in 162
    assert (first == other).all(0).mean() < 0.05


def test_crop_and_flip_can_be_left_out():
  x = jnp.asarray(images(40))
  index = jnp.arange(40)
  same = augment.augment(KEY, x, index, pad=0, flip=False)
  np.testing.assert_array_equal(same, x)

  flipped = np.asarray(augment.augment(KEY, x, index, pad=0))
  mirrored = (flipped == np.asarray(x)[:, :, ::-1]).all((1, 2, 3))
  kept = (flipped == np.asarray(x)).all((1, 2, 3))
  assert mirrored.any() and kept.any() and (mirrored | kept).all()

  row, column, _ = augment.draw(KEY, index, pad=4)
  cropped = augment.augment(KEY, x, index, flip=False)
  never = np.zeros(40, bool)
  np.testing.assert_array_equal(
    cropped, transcription(np.asarray(x), row, column, never, 4)
  )


def test_normalize_equals_numpy():
  x = np.arange(256, dtype=np.uint8)
  x = np.stack([x, x[::-1], np.roll(x, 9)], axis=-1).reshape(1, 16, 16, 3)
  mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
  got = augment.normalize(jnp.asarray(x), mean, std)
  assert got.dtype == jnp.float32
  expected = (x.astype(np.float64) / 255 - mean) / std
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  half = augment.normalize(jnp.asarray(x), mean, std, jnp.bfloat16)
  np.testing.assert_array_equal(half, got.astype(jnp.bfloat16))


def test_wrong_shapes_are_refused():
  x = jnp.asarray(images(4))
  index = jnp.arange(4)
  with pytest.raises(ValueError, match=r"must be uint8 .* got float32"):
    augment.augment(KEY, x / 255, index)
  with pytest.raises(ValueError, match=r"uint8 \[B, H, W, C\], got .*\(8, 6,"):
    augment.normalize(x[0], (0.5,) * 3, (0.2,) * 3)
  with pytest.raises(ValueError, match=r"index must be \[B\] = \[4\]"):
    augment.augment(KEY, x, index[:3])
  with pytest.raises(ValueError, match=r"pad must be 0 or more .* got -1"):
    augment.augment(KEY, x, index, pad=-1)
  with pytest.raises(ValueError, match="each of the 3 channels, got 1 and 3"):
    augment.normalize(x, (0.5,), (0.2,) * 3)


def mixer(**alphas):
  """mix(seed, images), compiled once."""
  mix = jax.jit(functools.partial(augment.mix, **alphas))

  def run(seed, images):
    mixed, lam = mix(jax.random.key(seed), images)
    return np.asarray(mixed), float(lam)

  return run


@pytest.fixture(scope="module")
def ours():
  rng = np.random.default_rng(0)
  return rng.standard_normal((6, 8, 10, 3), np.float32)


@pytest.fixture(scope="module")
def others(ours):
  return ours[[1, 0, 3, 2, 5, 4]]


def test_mixup_blends_neighbours(ours, others):
  mix, lams = mixer(mixup=0.4, cutmix=0.0), set()
  for seed in range(5):
    mixed, lam = mix(seed, ours)
    expected = lam * ours + (1 - lam) * others
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    lams.add(lam)
  assert len(lams) == 5 and all(0 <= lam <= 1 for lam in lams)


def test_cutmix_replaces_a_box_of_the_neighbours(ours, others):
  mix, seen = mixer(mixup=0.0, cutmix=1.0), []
  for seed in range(20):
    mixed, lam = mix(seed, ours)
    cut = (mixed == others).all(-1)
    assert np.array_equal(mixed[~cut], ours[~cut])
    assert (cut == cut[0]).all()  # one box for the batch
    rows, columns = cut[0].any(1), cut[0].any(0)
    assert np.array_equal(cut[0], rows[:, None] & columns)  # a box
    for inside in (rows, columns):
      assert np.abs(np.diff(inside.astype(int))).sum() <= 2  # in one piece
    assert lam == pytest.approx(1 - cut[0].mean(), abs=1e-6)
    seen.append(lam)
  assert min(seen) < 0.5 < max(seen)


def test_with_both_each_takes_half_of_the_batches(ours, others):
  mix = mixer(mixup=1.0, cutmix=1.0)
  mixed = [mix(seed, ours)[0] for seed in range(40)]
  blended = sum(not ((x == ours) | (x == others)).all() for x in mixed)
  assert 10 <= blended <= 30
  labels = augment.partner(jnp.arange(6))
  assert labels.tolist() == [1, 0, 3, 2, 5, 4]


def test_what_cannot_be_mixed(ours):
  with pytest.raises(ValueError, match=r"even number of .* got 5 images"):
    augment.mix(KEY, ours[:5], mixup=1.0, cutmix=0.0)
  with pytest.raises(ValueError, match=r"mixup 0 and cutmix 0"):
    augment.mix(KEY, ours, mixup=0, cutmix=0)
