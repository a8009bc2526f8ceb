import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.layers import ModelOutputs


def shapes_only(output):
  features = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), output.features
  )
  return ModelOutputs(None, features)


def test_prediction_needs_only_the_teachers_shapes(tiny):
  module = tiny.create("simkd")
  variables = tiny.init(module)
  full, _ = tiny.apply(module, variables, train=False)
  last = jax.jit(
    lambda v, student: module.apply(
      v, student, (shapes_only(tiny.teacher),), method="last_map"
    )
  )(variables, tiny.student)
  alone = tiny.classifier(jnp.mean(last, (1, 2)))
  np.testing.assert_allclose(alone, full.logits, rtol=1e-5, atol=1e-6)
  assert not np.allclose(alone, tiny.student.logits, atol=0.1)


def test_the_higher_map_is_pooled(tiny, make_output):
  """Student 4x4 against teacher 8x8, and the other way round."""
  module = tiny.create("simkd")
  for student, teacher in (
    (tiny.student, tiny.teacher),
    (tiny.teacher, tiny.student),
  ):
    output = jax.eval_shape(
      lambda s=student, t=teacher: module.init_with_output(
        jax.random.key(0),
        s,
        t,
        tiny.batch,
        teacher_head=lambda x: x,
        step=0,
        epoch=1,
        train=True,
      )[0]
    )
    channels = teacher.features["last"].shape[-1]
    assert output.logits.shape == (8, channels)


@pytest.mark.parametrize(
  "student, teacher, factor, expected",
  [(256, 256, 2, 214016), (256, 256, 8, 26240), (512, 256, 4, 86784)],
)
def test_number_of_parameters(tiny, student, teacher, factor, expected):
  """Those of the paper's supplement for resnet32x4's students."""

  def output(channels):
    last = jnp.zeros((8, 8, 8, channels))
    features = {"stage1": last, "last": last}
    return ModelOutputs(jnp.zeros((8, 5)), features)

  variables = jax.eval_shape(
    lambda: tiny.create("simkd", factor=factor).init(
      jax.random.key(0),
      output(student),
      output(teacher),
      tiny.batch,
      teacher_head=lambda x: x[:, :5],
      step=0,
      epoch=1,
      train=True,
    )
  )
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == expected


def test_a_factor_beyond_the_channels_is_refused(tiny):
  with pytest.raises(ValueError, match=r"factor: expected 1 to 16.*got 17"):
    tiny.init(tiny.create("simkd", factor=17))


def test_the_students_map_can_be_another(tiny):
  for name, channels in (("last", 12), ("stage1", 6)):
    shapes = tiny.shapes(tiny.create("simkd", student_map=name))
    kernel = shapes["params"]["projector"]["conv1"]["kernel"]
    assert kernel.shape == (1, 1, channels, 8)
  with pytest.raises(ValueError, match="the student has no feature 'stage9'"):
    tiny.shapes(tiny.create("simkd", student_map="stage9"))
