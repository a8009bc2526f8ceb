import numpy as np

from kd_jax import losses


def test_the_term_is_the_loss_at_the_modules_temperature(tiny):
  output, _ = tiny.apply(tiny.create("kd", temperature=2.0), {})
  expected = losses.kd_loss(
    tiny.student.logits, tiny.teacher.logits, temperature=2.0
  )
  np.testing.assert_allclose(output.terms["kd"], expected, rtol=1e-6)
