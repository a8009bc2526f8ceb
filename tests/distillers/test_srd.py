import jax
import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 2, 4, 6)
TOTAL = {"srd": 2, "kd": 1}
METHOD = Method(
  losses={"srd_loss": LossCase((S, T), per_example=False)},
  weights={"ce": 1, **TOTAL},
  relational=True,
  reference=(("embed|bn_[st]", r"\g<0>"),),
  golden=(
    Golden("srd", prefix=lambda case: "srd.", weights=lambda case: TOTAL),
  ),
  curves=(
    Curve("srd", folder="train_2", also=TOTAL),
    Curve("srd", folder="train_2", also=TOTAL, pair=0),
  ),
)


def test_the_loss_is_the_logarithm_of_a_sum_at_any_scale():
  for scale in (1e-20, 1.0, 1e20):
    s, t = (x.astype(np.float64) * scale for x in (S, T))
    value, gradient = jax.value_and_grad(losses.srd_loss)(
      s.astype(np.float32), t.astype(np.float32)
    )
    distance = s - t
    total = np.sum(distance**4)
    np.testing.assert_allclose(value, np.log(total), rtol=1e-5)
    np.testing.assert_allclose(gradient, 4 * distance**3 / total, rtol=1e-4)
