import jax
import numpy as np
import pytest

from kd_jax import losses


def test_the_variance_starts_where_it_is_told(tiny):
  variables = tiny.real_init(tiny.create("vid", initial_variance=3.0))
  params = variables["params"]
  assert set(params) == {"stage1", "stage2"}
  for stage in params.values():
    np.testing.assert_allclose(
      losses.vid_variance(stage["log_scale"]), 3.0, rtol=1e-6
    )


def test_stages_are_paired_from_the_first(tiny, make_output):
  teacher = make_output(5, widths=(8,), sizes=(8,))
  module = tiny.create("vid")
  variables = tiny.init(module, teacher=teacher)
  assert set(variables["params"]) == {"stage1"}
  assert jax.tree.leaves(variables)


def test_a_variance_of_zero_is_refused(tiny):
  with pytest.raises(ValueError, match="initial_variance: expected a number"):
    tiny.init(tiny.create("vid", initial_variance=0.0))
