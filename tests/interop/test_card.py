"""Model cards: their classes, and what was changed in them."""

import json

import pytest

from kd_jax.interop import card as card_lib
from scripts import fuzz

NAMES = ("cat", "dog", "red fox")


@pytest.mark.parametrize(
  ("got", "order"),
  [
    (NAMES, None),
    (("Cat", "dog", "red_fox"), None),
    (("red-fox", "cat", "dog"), [2, 0, 1]),
    (("0", "1", "2"), None),
    (("class 0", "class 1", "class 2"), None),
    (("n01440764", "n01443537", "n01484850"), None),
  ],
)
def test_classes_are_matched_by_name(got, order, caplog):
  with caplog.at_level("INFO"):
    matched = card_lib.match_classes(NAMES, got, "x")
  assert (None if matched is None else list(matched)) == order
  assert ("another order" in caplog.text) == (order is not None)
  assert card_lib.match_classes(got, got, "x") is None


@pytest.mark.parametrize(
  "got", [("cat", "dog", "wolf"), ("cat", "cat", "dog"), ("cat", "fox", "dog")]
)
def test_other_classes_are_refused(got):
  with pytest.raises(ValueError, match=r"x on y: .* differ \([12]: 'dog|red f"):
    card_lib.match_classes(NAMES, got, "x on y")


@pytest.mark.parametrize("weights", [[0.0], [0.0, 0.0], [-1.0, 1.0], []])
def test_weights_of_teachers_are_above_0(weights):
  content = json.loads(fuzz.TARGETS["card"].make())
  content["head"]["weights"] = weights
  with pytest.raises(ValueError, match=r"^x, at head\.weights: .* 0, got"):
    card_lib.check(content, "x")
