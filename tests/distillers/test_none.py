import jax.numpy as jnp
import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal, softmax

from kd_jax import losses


def cross_entropy(z, y, label_smoothing=0.0):
  q = np.full(z.shape, label_smoothing / z.shape[1])
  q[np.arange(len(y)), y] += 1 - label_smoothing
  return -(q * np.log(softmax(z))).sum(1)


METHOD = Method(
  losses={
    "cross_entropy_loss": LossCase(
      (3 * normal(0, 4, 7), np.array([0, 6, 2, 2], np.int32)),
      cross_entropy,
      kwargs={"label_smoothing": 0.1},
      refused={"label_smoothing": (-0.1, 1.0)},
      trained=(0,),
    )
  },
  terms=frozenset({"ce"}),
  golden=(Golden("cross_entropy", term="ce"),),
  curve=Curve("vanilla"),
)


def test_no_teacher_is_needed(tiny):
  output = tiny.create("none").apply(
    {}, **{**tiny.given(), "teachers": (), "teacher_heads": ()}
  )
  # No smoothing by default.
  expected = cross_entropy(
    np.asarray(tiny.student.logits, float), tiny.batch["label"]
  )
  np.testing.assert_allclose(output.terms["ce"], expected, rtol=1e-6)


def test_a_label_beyond_the_classes_is_not_a_number():
  """Rather than training on the last class without a warning."""
  value = losses.cross_entropy_loss(jnp.zeros((2, 3)), jnp.array([2, 3]))
  assert np.isfinite(value[0])
  assert np.isnan(value[1])
