import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 4, 6), normal(1, 4, 5)
METHOD = Method(
  losses={
    "pkt_loss": LossCase(
      (S, T), minimum=(S, 2 * S), per_example=False, scale_free=True
    )
  },
  weights={"ce": 1, "kd": 0, "pkt": 30000},
  relational=True,
  # The reference's own rounding is 4e-5; see `test_golden_inputs_in_float64`.
  golden=(Golden("pkt", tolerance=1e-4),),
  curves=(Curve("pkt", folder="train_2"),),
)


def neighbours(x):
  x = x.astype(np.float64)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  likely = 1 + x @ x.T
  return likely / likely.sum(1, keepdims=True)


def divergence(s, t):
  """The formula in float64."""
  q, p = neighbours(s), neighbours(t)
  return np.mean(p * np.log((p + 1e-7) / (q + 1e-7)))


def test_golden_inputs_in_float64(golden_inputs):
  for pair, _ in golden_inputs.cases("pkt"):
    s, t = (
      np.asarray(golden_inputs.output(pair, side).features["pooled"])
      for side in "st"
    )
    np.testing.assert_allclose(losses.pkt_loss(s, t), divergence(s, t), 1e-5)


def test_networks_that_nearly_agree_keep_their_digits():
  """The plain sum of p log(p / q) is rounding there."""
  student = S + normal(2, 4, 6) / 1024
  expected = divergence(student, S)
  np.testing.assert_allclose(losses.pkt_loss(student, S), expected, rtol=1e-2)


def test_opposite_features_are_no_neighbours():
  """Probability 0 for the student or the teacher, but for rounding."""
  alike, opposite = np.float32([[1, 0], [1, 0]]), np.float32([[1, 0], [-1, 0]])
  for s, t in ((alike, opposite), (opposite, alike)):
    np.testing.assert_allclose(losses.pkt_loss(s, t), divergence(s, t), 2e-2)


def test_it_reads_the_pooled_features(tiny):
  output, _ = tiny.apply(tiny.create("pkt"), {})
  expected = losses.pkt_loss(
    tiny.student.features["pooled"], tiny.teacher.features["pooled"]
  )
  np.testing.assert_allclose(output.terms["pkt"], expected, rtol=1e-5)
