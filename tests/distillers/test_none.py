import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def test_no_teacher_is_needed(tiny):
  module = tiny.create("none")
  output = module.apply(
    {},
    tiny.student,
    None,
    tiny.batch,
    teacher_head=None,
    step=0,
    train=True,
  )
  expected = losses.cross_entropy_loss(
    tiny.student.logits, jnp.asarray(tiny.batch["label"])
  )
  np.testing.assert_array_equal(output.losses["ce"], expected)
  assert list(output.losses) == ["ce"]
