import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = 3 * normal(0, 4, 4, 4, 7), 3 * normal(1, 4, 8, 8, 7)
LABELS = np.array([0, 6, 2, 2], np.int32)
METHOD = Method(
  losses={
    "sdd_loss": LossCase(
      (S, T, LABELS),
      kwargs={"temperature": 4.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T, LABELS),
    )
  },
  fields={"scales": (1, 2), "alpha": None, "beta": None, "gamma": 1.5},
  weights={"ce": 0.1, "kd": 0, "sdd": 0.9},
  golden=tuple(
    Golden(
      rf"sdd_{inner}_\d+",
      lambda case, names=names: {
        **{name: case[name] for name in ("temperature", *names)},
        "scales": tuple(case["scales"]),
      },
    )
    for inner, names in (
      ("kd", ()),
      ("dkd", ("alpha", "beta")),
      ("nkd", ("gamma",)),
    )
  ),
  curves=(
    Curve("sdd", folder="train_2"),
    Curve(
      "sdd_dkd", lambda curves: {"alpha": 1.0, "beta": 8.0}, folder="train_2"
    ),
  ),
)


def test_a_region_counts_twice_where_the_teacher_contradicts_itself():
  teacher = np.zeros((1, 2, 2, 3), np.float32)
  teacher[0, :, :, 0] = [[3.0, 3.0], [3.0, 0.0]]
  teacher[0, 1, 1, 1] = 1.0  # right about the image, wrong about a region
  student = np.zeros_like(teacher)
  label = np.array([0])
  found = losses.sdd_loss(student, teacher, label, temperature=1.0, scales=(2,))
  regions = losses.kd_loss(
    student.reshape(4, 3), teacher.reshape(4, 3), temperature=1.0
  )
  expected = np.mean(regions * np.array([1, 1, 1, 2]))
  np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_what_does_not_fit(tiny):
  with pytest.raises(ValueError, match="divisors of the largest, 4, got 3"):
    losses.sdd_loss(S, T, LABELS, temperature=1.0, scales=(4, 3))
  with pytest.raises(ValueError, match=r"student_head.*got None"):
    tiny.create("sdd").apply({}, **{**tiny.given(), "student_head": None})
  with pytest.raises(ValueError, match=r"gamma 1\.5, alpha 1\.0 and beta None"):
    losses.sdd_loss(S, T, LABELS, temperature=1.0, gamma=1.5, alpha=1.0)
