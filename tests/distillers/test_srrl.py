import jax.numpy as jnp
import numpy as np

from kd_jax.models.layers import ModelOutputs


def test_the_teachers_classifier_is_applied(tiny):
  """A student that transfers to a perfect feature has no loss."""
  module = tiny.create("srrl")
  variables = tiny.init(module)
  student = tiny.student
  params = {
    "transfer": {
      "conv": {"kernel": jnp.zeros((1, 1, 12, 16))},
      "bn": {"scale": jnp.ones(16), "bias": jnp.full(16, 0.5)},
    }
  }
  feature = jnp.full((8, 16), 0.5)
  teacher = ModelOutputs(
    tiny.classifier(feature), {**tiny.teacher.features, "pooled": feature}
  )
  output, _ = tiny.apply(
    module, {**variables, "params": params}, student=student, teacher=teacher
  )
  np.testing.assert_allclose(output.terms["srrl"], 0.0, atol=1e-10)
  other = teacher._replace(logits=teacher.logits + 2.0)
  output, _ = tiny.apply(
    module, {**variables, "params": params}, student=student, teacher=other
  )
  np.testing.assert_allclose(output.terms["srrl"], 4.0, rtol=1e-5)
