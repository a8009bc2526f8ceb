import jax
import jax.numpy as jnp
import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 4, 6), normal(1, 4, 5)
METHOD = Method(
  losses={
    "rkd_loss": LossCase(
      (S, T),
      kwargs={"distance": 25.0, "angle": 50.0},
      refused={"distance": (-1.0,), "angle": (-1.0,)},
      minimum=(S, 2 * S + 1),
      per_example=False,
      scale_free=True,
    )
  },
  fields={"distance": 50.0, "angle": 25.0},
  weights={"ce": 1, "kd": 0, "rkd": 1},
  relational=True,
  golden=(Golden("rkd"),),
  curves=(Curve("rkd", folder="train_2"),),
)


def test_near_points_keep_their_digits():
  """A difference of squares would not see 1e-3 beside 1e3."""
  near = np.array([[0, 0], [3, 4], [6, 0]], np.float32)
  weights = {"distance": 1.0, "angle": 1.0}
  moved = losses.rkd_loss(1e3 + near / 1024, T[:3], **weights)
  expected = losses.rkd_loss(near, T[:3], **weights)
  np.testing.assert_allclose(moved, expected, rtol=1e-2)


def test_coinciding_points_have_a_finite_gradient():
  """Two examples of three are one point."""
  x = jnp.array([[1.0, 2.0], [1.0, 2.0], [4.0, 6.0]])
  value, gradient = jax.value_and_grad(losses.rkd_loss)(
    x, T[:3], distance=1.0, angle=1.0
  )
  assert np.isfinite(value) and np.isfinite(gradient).all()
  assert np.abs(gradient).max() > 0


def test_it_reads_the_pooled_features(tiny):
  output, _ = tiny.apply(tiny.create("rkd", distance=2.0, angle=3.0), {})
  expected = losses.rkd_loss(
    tiny.student.features["pooled"],
    tiny.teacher.features["pooled"],
    distance=2.0,
    angle=3.0,
  )
  np.testing.assert_allclose(output.terms["rkd"], expected, rtol=1e-5)
