import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal, softmax

from kd_jax import losses

METHOD = Method(
  losses={
    "cross_entropy_loss": LossCase(
      (3 * normal(0, 4, 7), np.array([0, 6, 2, 2], np.int32)),
      kwargs={"label_smoothing": 0.1},
      refused={"label_smoothing": (-0.1, 1.0)},
      trained=(0,),
    )
  },
  terms=frozenset({"ce"}),
  golden=(Golden("cross_entropy", weights=lambda case: {"ce": 1}),),
  curves=(Curve("vanilla"),),
)


def test_no_teacher_is_needed(tiny):
  output = tiny.create("none").apply(
    {}, **{**tiny.given(), "teachers": (), "teacher_heads": ()}
  )
  logits, label = np.asarray(tiny.student.logits, float), tiny.batch["label"]
  log_p = np.log(softmax(logits))
  expected = -log_p[np.arange(8), label]
  # No smoothing by default.
  np.testing.assert_allclose(output.terms["ce"], expected, rtol=1e-6)
  smooth = losses.cross_entropy_loss(
    tiny.student.logits, label, label_smoothing=0.1
  )
  expected = 0.9 * expected - 0.1 * log_p.mean(1)
  np.testing.assert_allclose(smooth, expected, rtol=1e-5)
