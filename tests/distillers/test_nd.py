import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import LossCase, Method, normal

from kd_jax import losses

S, T, MEANS = normal(0, 4, 6), normal(1, 4, 6), normal(2, 5, 6)
LABELS = np.array([3, 0, 4, 3], np.int32)
METHOD = Method(
  losses={
    "nd_loss": LossCase(
      (S, T, LABELS, MEANS),
      # The teacher is its class's mean, and shorter than the student.
      minimum=(2 * MEANS[LABELS], MEANS[LABELS], LABELS, MEANS),
    )
  },
  weights={"ce": 1, "kd": 3.5, "nd": 2},
)


def test_the_papers_formula():
  """There is no golden value: an own transcription, in float64."""
  expected = []
  for s, t, y in zip(S.astype(float), T.astype(float), LABELS):
    e = MEANS[y].astype(float) / np.linalg.norm(MEANS[y].astype(float))
    expected.append(1 - s @ e / max(np.linalg.norm(s), np.linalg.norm(t)))
  found = losses.nd_loss(S, T, LABELS, MEANS)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("factor", "grows"), [(0.1, True), (10.0, False)])
def test_a_short_student_grows_and_a_long_one_turns(factor, grows):
  s = factor * T
  gradient = jax.grad(
    lambda s: losses.nd_loss(s, T, LABELS, 0 * MEANS + T[:1])[0]
  )
  along = float(jnp.sum(gradient(s)[0] * s[0]))
  assert along < -1e-3 if grows else abs(along) < 1e-5


def test_bad_input():
  with pytest.raises(ValueError, match=r"class_means: expected one width"):
    losses.nd_loss(S, T, LABELS, MEANS[:, :5])
  with pytest.raises(
    ValueError, match=r"labels: expected shape \(4,\).*\(3,\)"
  ):
    losses.nd_loss(S, T, LABELS[:3], MEANS)
  with pytest.raises(ValueError, match=r"labels: expected values in \[0, 5\)"):
    losses.nd_loss(S, T, LABELS + 1, MEANS)


def test_equal_widths_need_no_projection(tiny):
  shapes = tiny.shapes(tiny.create("nd"), teacher=tiny.student)
  assert "params" not in shapes
  assert shapes["constants"]["pooled"].shape == (5, 12)
  projected = tiny.shapes(tiny.create("nd"))["params"]["projection"]
  assert projected["linear"]["kernel"].shape == (12, 16)


def test_the_means_come_with_the_teachers_variables(tiny):
  module = tiny.create("nd")
  means = {"pooled": MEANS}
  given = ({"params": {}, "class_means": means},)
  assert module.teacher_constants((None,), given) == means
  with pytest.raises(ValueError, match=r"nd: .*'class_means'.*got only params"):
    module.teacher_constants((None,), ({"params": {}},))
