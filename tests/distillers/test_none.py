import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def test_no_teacher_is_needed(tiny):
  module = tiny.create("none")
  output = module.apply(
    {},
    tiny.student,
    (),
    tiny.batch,
    teacher_heads=(),
    step=0,
    epoch=1,
    train=True,
    method="distill",
  )
  expected = losses.cross_entropy_loss(
    tiny.student.logits, jnp.asarray(tiny.batch["label"])
  )
  np.testing.assert_array_equal(output.terms["ce"], expected)
  assert list(output.terms) == ["ce"]
