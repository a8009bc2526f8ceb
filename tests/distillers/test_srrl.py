import jax.numpy as jnp
import numpy as np
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax.models.layers import ModelOutputs

(F_S, F_T), (Z_S, Z_T) = normal(0, 2, 4, 6), normal(1, 2, 4, 7)
METHOD = Method(
  losses={"srrl_loss": LossCase((F_S, Z_S, F_T, Z_T), minimum=2 * (F_T, Z_T))},
  reference=(
    ("transfer/conv", "transfer.0"),
    ("transfer/bn", "transfer.1"),
  ),
  weights={"ce": 1, "kd": 1, "srrl": 1},
  golden=(Golden("srrl", prefix=lambda case: "srrl."),),
  curve=Curve("srrl"),
)


def test_the_teachers_classifier_is_applied(tiny):
  """A student that transfers to a perfect feature has no loss."""
  module = tiny.create("srrl")
  variables = tiny.init(module)
  variables["params"] = {
    "transfer": {
      "conv": {"kernel": jnp.zeros((1, 1, 12, 16))},
      "bn": {"scale": jnp.ones(16), "bias": jnp.full(16, 0.5)},
    }
  }
  feature = jnp.full((8, 16), 0.5)
  features = {**tiny.teacher.features, "pooled": feature}
  for offset, expected in ((0.0, 0.0), (2.0, 4.0)):
    teacher = ModelOutputs(tiny.head(feature) + offset, features)
    output, _ = tiny.apply(module, variables, teacher=teacher)
    np.testing.assert_allclose(
      output.terms["srrl"], expected, rtol=1e-5, atol=1e-10
    )
