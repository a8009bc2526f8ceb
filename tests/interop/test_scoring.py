"""Scores and predictions against their definitions, and images as read."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.data import images
from kd_jax.interop import card as card_lib
from kd_jax.interop import scoring


@pytest.fixture(scope="module")
def source():
  return data.load("synthetic", split="test", image_size=16, num_examples=30)


@pytest.fixture(scope="module")
def card(source):
  return card_lib.make(
    "_tiny",
    num_classes=10,
    image_shape=source.image_shape,
    class_names=source.class_names,
    mean=source.mean,
    std=source.std,
    trained_on="synthetic",
    data_options={},
  )


def model_of(card, logits):
  return types.SimpleNamespace(card=card, logits=logits)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 100])
def test_scores(batch_size, card, source):
  weights = np.random.default_rng(0).standard_normal((2, 768, 10), np.float32)
  weights[1] += weights[0]

  def logits(x, seed=0):
    return (x.reshape(len(x), -1) / 255 - 0.5).astype("f4") @ weights[seed] / 9

  model = model_of(card, logits)
  teacher = model_of(card, lambda x: logits(x, 1))
  got = scoring.evaluate(model, source, teacher=teacher, batch_size=batch_size)
  z = logits(source.images).astype(np.float64)
  p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
  chosen, labels = p.argmax(1), source.labels
  theirs = logits(source.images, 1).argmax(1)
  place = np.argsort(np.argsort(-p, axis=1), axis=1)[range(30), labels]
  assert 0 < np.mean(chosen == theirs) < 1
  assert 0 < np.mean(place == 0) < np.mean(place < 5) < 1
  assert got == pytest.approx(
    {
      "ce": -np.log(p[range(30), labels]).mean(),
      "top1": 100 * np.mean(place == 0),
      "top5": 100 * np.mean(place < 5),
      "ece": 100 * scoring.calibration_error(p.max(1), chosen == labels),
      "agreement": 100 * np.mean(chosen == theirs),
      "teacher_top1": 100 * np.mean(theirs == labels),
      "examples": 30,
    },
    rel=1e-5,
  )


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_ties_and_nans_are_no_hits(value, card, source):
  model = model_of(card, lambda x: np.full((len(x), 10), value, np.float32))
  got = scoring.evaluate(model, source)
  assert (got["top1"], got["top5"]) == (0, 0)


def test_labels_are_matched_by_class_name(card, source, caplog):
  """The folders of the same classes may be sorted in another way."""
  names = tuple("abcdefghij")
  card = {**card, "class_names": list(names)}

  def logits(x):
    return np.random.default_rng(len(x)).standard_normal((len(x), 10))

  model, order = (
    model_of(card, logits),
    np.random.default_rng(1).permutation(10),
  )
  known = dataclasses.replace(source, class_names=names)
  expected = scoring.evaluate(model, known, teacher=model)
  moved = dataclasses.replace(
    source,
    labels=np.argsort(order)[source.labels].astype(np.int32),
    class_names=tuple(names[i] for i in order),
  )
  got = scoring.evaluate(model, moved, teacher=model)
  assert got == pytest.approx(expected) and 0 < got["top1"] < 100
  other = dataclasses.replace(source, class_names=(*names[:9], "z"))
  with pytest.raises(ValueError, match="9: 'j' and 'z'"):
    scoring.evaluate(model, other)


def test_calibration_error_of_three_bins():
  confidence = np.array([0.1, 0.3, 0.9, 1.0, 1 / 3])
  correct = np.array([False, True, True, False, False])
  # Bins (0, 1/3], (1/3, 2/3], (2/3, 1]: three, none and two examples.
  first = abs(1 / 3 - (0.1 + 0.3 + 1 / 3) / 3) * 3 / 5
  last = abs(1 / 2 - 1.9 / 2) * 2 / 5
  got = scoring.calibration_error(confidence, correct, bins=3)
  assert got == pytest.approx(first + last)
  assert scoring.calibration_error(np.ones(4), np.ones(4, bool)) == 0


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"image_size": 16, "num_classes": 5}, "classes: the model takes 10, syn"),
    (
      {"image_size": 8},
      r"image shape: the model takes \[16, 16, 3\], synthetic has \[8, 8, 3\]\."
      " It was trained on synthetic; choose data like it",
    ),
  ],
)
def test_other_data_is_refused(options, words, card):
  source = data.load("synthetic", split="test", num_examples=10, **options)
  with pytest.raises(ValueError, match=words):
    scoring.evaluate(model_of(card, None), source)


def test_top_classes_of_few_classes():
  model = model_of(
    {"class_names": ["cat", "dog"]}, lambda x: np.log([[0.25, 0.75]] * len(x))
  )
  (best,) = scoring.top_classes(model, np.zeros((1, 4, 4, 3), np.uint8))
  assert [name for name, _ in best] == ["dog", "cat"]
  assert [p for _, p in best] == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("resize", [None, 16, 18])
def test_images_are_read_as_evaluation_does(resize, tmp_path):
  rng = np.random.default_rng(0)
  for shape in ((16, 16), (40, 20)):
    picture = rng.integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    card = {"image_shape": [16, 16, 3], "resize": resize}
    got = scoring.read_image(tmp_path / "x.png", card)
    crop = images.evaluate_crop(picture, size=16, resize=resize or 16)
    np.testing.assert_array_equal(got, crop)
    if shape == (16, 16) and resize != 18:  # of data without image files
      np.testing.assert_array_equal(got, picture)
