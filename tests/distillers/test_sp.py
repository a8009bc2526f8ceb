import numpy as np

from kd_jax import losses


def test_it_reads_the_last_stages(tiny, make_output):
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  output, _ = tiny.apply(tiny.create("sp"), {}, teacher=teacher)
  expected = losses.sp_loss(
    tiny.student.features["stage2"], teacher.features["stage3"]
  )
  np.testing.assert_allclose(output.terms["sp"], expected, rtol=1e-5)


def test_evaluation_needs_no_mapped_axis(tiny):
  module = tiny.create("sp", axis_name="devices", sync=True)
  output, _ = tiny.apply(module, {}, train=False)
  expected = losses.sp_loss(
    tiny.student.features["stage2"], tiny.teacher.features["stage2"]
  )
  np.testing.assert_allclose(output.terms["sp"], expected, rtol=1e-5)
