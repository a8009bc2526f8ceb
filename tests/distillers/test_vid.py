import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

VARIANCE = np.array([0.5, 1.0, 4.0], np.float32)
METHOD = Method(
  losses={
    "vid_loss": LossCase(
      (normal(0, 4, 4, 4, 3), VARIANCE, normal(1, 4, 8, 8, 3)),
      trained=(0, 1, 2),
    )
  },
  fields={"initial_variance": None},
  reference=(
    (
      r"stage(\d+)/conv(\d)",
      lambda m: f"{int(m[1]) - 1}.regressor.{2 * int(m[2]) - 2}",
    ),
    (r"stage(\d+)", lambda m: f"{int(m[1]) - 1}"),
  ),
  weights={"ce": 1, "kd": 1, "vid": 1},
  golden=(Golden("vid", prefix=lambda case: "vid"),),
  curves=(Curve("vid"),),
)


def test_variance_is_positive():
  variance = losses.vid_variance(jnp.array([-1e4, 0.0, 1e4]))
  np.testing.assert_allclose(variance, [1e-5, np.log(2) + 1e-5, 1e4], rtol=1e-6)


def test_the_variance_starts_where_it_is_told(tiny):
  variables = tiny.real_init(tiny.create("vid", initial_variance=3.0))
  params = variables["params"]
  assert set(params) == {"stage1", "stage2"}
  for stage in params.values():
    np.testing.assert_allclose(
      losses.vid_variance(stage["log_scale"]), 3.0, rtol=1e-6
    )
  with pytest.raises(ValueError, match="initial_variance: expected a finite"):
    tiny.shapes(tiny.create("vid", initial_variance=0.0))


def test_stages_are_paired_from_the_first(tiny, make_output):
  teacher = make_output(5, widths=(8,), sizes=(8,))
  shapes = tiny.shapes(tiny.create("vid"), teacher=teacher)
  assert set(shapes["params"]) == {"stage1"}
