import numpy as np

from kd_jax import losses


def test_stages_are_paired_from_the_first(tiny, make_output):
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  output, _ = tiny.apply(tiny.create("at"), {}, teacher=teacher)
  expected = losses.at_loss(tiny.student.stages(), teacher.stages()[:2])
  np.testing.assert_allclose(output.terms["at"], expected, rtol=1e-6)
