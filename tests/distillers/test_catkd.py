import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses
from kd_jax.distillers import base

S, T = normal(0, 4, 4, 4, 7), normal(1, 4, 8, 8, 7)
METHOD = Method(
  losses={
    "catkd_loss": LossCase(
      (S, T),
      kwargs={"resolution": 2},
      refused={"resolution": (0, -1, 2.5)},
      minimum=(T, T),
    )
  },
  fields={"resolution": 4, "normalize": True},
  weights={"ce": 1, "kd": 0, "catkd": 15},
  golden=(
    Golden(
      r"catkd_\d+(_normalised)?",
      lambda case: {
        "resolution": case["resolution"],
        "normalize": case["normalised"],
      },
    ),
  ),
  curves=(
    Curve("catkd", folder="train_2"),
    Curve("catkd", folder="train_2", pair=0),
    Curve(
      "catkd_normalised", lambda curves: {"normalize": True}, folder="train_2"
    ),
  ),
)


def test_the_scale_of_a_normalised_map_does_not_count():
  value, scaled = (
    losses.catkd_loss(s, T, resolution=2, normalize=True)
    for s in (S, S * np.arange(1.0, 8.0, dtype=np.float32))
  )
  np.testing.assert_allclose(value, scaled, rtol=1e-5)


def test_a_classifier_without_its_bias():
  weights, x = normal(2, 7, 3), S[:2]
  found = base.without_bias(lambda x: x @ weights + 5.0, x)
  np.testing.assert_allclose(found, x @ weights, rtol=1e-5, atol=1e-5)


def test_the_student_needs_a_classifier(tiny):
  with pytest.raises(ValueError, match=r"student_head.*got None"):
    tiny.create("catkd").apply({}, **{**tiny.given(), "student_head": None})
