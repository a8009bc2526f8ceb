import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax.models.layers import ModelOutputs

S, T = normal(0, 2, 4, 4, 4, 3)
METHOD = Method(
  losses={"simkd_loss": LossCase((S, T), minimum=(T, T))},
  fields={"factor": 4, "student_map": "stage1"},
  reference=(
    (r"projector/conv(\d)", lambda m: f"transfer.{3 * int(m[1]) - 3}"),
    (r"projector/bn(\d)", lambda m: f"transfer.{3 * int(m[1]) - 2}"),
  ),
  weights={"ce": 0, "kd": 0, "simkd": 1},
  golden=(
    Golden(
      r"simkd_f\d+",
      lambda case: {"factor": case["factor"]},
      prefix=lambda case: f"simkd{case['factor']}.",
    ),
  ),
  curves=(Curve("simkd"),),
)


def test_prediction_needs_only_the_teachers_shapes(tiny):
  module = tiny.create("simkd")
  assert module.predicts_with_teacher_head
  variables = tiny.init(module)
  full, _ = tiny.apply(module, variables, train=False)
  shapes = jax.eval_shape(lambda: tiny.teacher)
  last = jax.jit(
    lambda v, student: module.apply(v, student, (shapes,), method="last_map")
  )(variables, tiny.student)
  alone = tiny.head(jnp.mean(last, (1, 2)))
  np.testing.assert_allclose(alone, full.logits, rtol=1e-5, atol=1e-6)
  assert not np.allclose(alone, tiny.student.logits, atol=0.1)


def test_the_higher_map_is_pooled(tiny):
  """Student 4x4 against teacher 8x8, and the other way round."""
  module = tiny.create("simkd")
  for s, t in ((tiny.student, tiny.teacher), (tiny.teacher, tiny.student)):
    last = jax.eval_shape(
      lambda s=s, t=t: module.init_with_output(
        jax.random.key(0), s, (t,), method="last_map"
      )[0]
    )
    assert last.shape == (8, 4, 4, t.features["last"].shape[-1])


@pytest.mark.parametrize(
  "student, teacher, factor, expected",
  [(256, 256, 2, 214016), (256, 256, 8, 26240), (512, 256, 4, 86784)],
)
def test_number_of_parameters(tiny, student, teacher, factor, expected):
  """Those of the paper's supplement for resnet32x4's students."""

  def output(channels):
    last = jnp.zeros((8, 8, 8, channels))
    return ModelOutputs(jnp.zeros((8, 5)), {"stage1": last, "last": last})

  variables = jax.eval_shape(
    lambda: tiny.create("simkd", factor=factor).init(
      *(jax.random.key(0), output(student), (output(teacher),)),
      method="last_map",
    )
  )
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == expected


def test_fields_that_do_not_fit(tiny):
  with pytest.raises(ValueError, match=r"factor: expected 1 to 16.*got 17"):
    tiny.shapes(tiny.create("simkd", factor=17))
  with pytest.raises(ValueError, match="the student has no feature 'stage9'"):
    tiny.shapes(tiny.create("simkd", student_map="stage9"))
