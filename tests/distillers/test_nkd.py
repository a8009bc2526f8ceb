import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
LABELS = np.array([0, 6, 2, 2], np.int32)
METHOD = Method(
  losses={
    "nkd_loss": LossCase(
      (S, T, LABELS),
      kwargs={"temperature": 3.0, "gamma": 1.5},
      refused={"temperature": (0.0, -1.0), "gamma": (-1.0,)},
    )
  },
  fields={"gamma": 2.0},
  weights={"ce": 1, "kd": 0, "nkd": 1},
  golden=(
    Golden(
      r"nkd_T\d", lambda case: {n: case[n] for n in ("temperature", "gamma")}
    ),
  ),
  curves=(
    Curve(
      "nkd",
      lambda curves: {"temperature": 1.0, "gamma": 1.5},
      folder="train_2",
    ),
  ),
)


def test_the_labels_logit_does_not_change_the_other_classes():
  """An early version of the authors' code leaves the label among them."""

  def others(student, teacher):
    args = (student, teacher, LABELS)
    with_others, without = (
      losses.nkd_loss(*args, temperature=2.0, gamma=g) for g in (1.0, 0.0)
    )
    return with_others - without

  moved = 2 * np.eye(7, dtype=np.float32)[LABELS]
  np.testing.assert_allclose(
    others(S + moved, T - moved), others(S, T), rtol=1e-5
  )
