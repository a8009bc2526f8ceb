import itertools

import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 2, 4, 6)
METHOD = Method(
  losses={
    "cc_loss": LossCase((S, T), minimum=(T, T), per_example=False, ordered=True)
  },
  fields={"feat_dim": 12},
  small={"feat_dim": 8},
  reference=((r"embed_([st])", r"embed_\1.linear"),),
  weights={"ce": 1, "kd": 0, "cc": 0.02},
  relational=True,
  golden=(Golden("correlation", prefix=lambda case: "cc_"),),
  curves=(
    Curve("cc", folder="train_2"),
    Curve("cc", folder="train_2", pair=0),
  ),
)


def test_it_compares_neighbours():
  apart = np.abs(S - T)
  expected = np.mean([a @ b for a, b in itertools.pairwise(apart)])
  np.testing.assert_allclose(losses.cc_loss(S, T), expected, rtol=1e-5)
  assert losses.cc_loss(S[:1], T[:1]) == 0
