import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal, softmax

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
LABELS = np.array([0, 6, 2, 2], np.int32)
FIELDS = ("temperature", "alpha", "beta")
SETTINGS = {"temperature": 4.0, "alpha": 1.0, "beta": 8.0}


def golden_fields(case):
  return {name: case[name] for name in FIELDS}


METHOD = Method(
  losses={
    "dkd_loss": LossCase(
      (S, T, LABELS),
      kwargs=SETTINGS,
      refused={"temperature": (0.0, -1.0), "alpha": (-1.0,), "beta": (-1.0,)},
      minimum=(T, T, LABELS),
    )
  },
  fields={"alpha": 2.0, "beta": 4.0},
  weights={"ce": 1, "kd": 0, "dkd": 1},
  golden=(
    Golden("dkd(_T1)?", golden_fields),
    Golden(
      "lskd_dkd", lambda case: {**golden_fields(case), "standardize": True}
    ),
  ),
  curves=(
    Curve("dkd", lambda curves: SETTINGS, folder="train_2"),
    Curve(
      "lskd_dkd",
      lambda curves: {
        **{"temperature": 2.0, "alpha": 9.0, "beta": 72.0},
        "standardize": True,
      },
      folder="train_2",
    ),
  ),
)


def test_kd_is_its_sum_weighted_per_example():
  """KD = T^2 (KL about the label + (1 - p_label) KL among the others)."""
  about, among = (
    losses.dkd_loss(S, T, LABELS, temperature=2.0, alpha=a, beta=1.0 - a)
    for a in (1.0, 0.0)
  )
  p = softmax(T / 2.0)[np.arange(4), LABELS]
  expected = losses.kd_loss(S, T, temperature=2.0)
  np.testing.assert_allclose(about + (1 - p) * among, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["dkd_loss"])
def test_two_classes_are_refused(name):
  with pytest.raises(ValueError, match="at least 3 classes, got 2"):
    getattr(losses, name)(S[:, :2], T[:, :2], LABELS // 6, **SETTINGS)
