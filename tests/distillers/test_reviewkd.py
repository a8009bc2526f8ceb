import jax
import jax.numpy as jnp
import pytest

from kd_jax.models.layers import ModelOutputs


def test_unequal_numbers_of_stages_are_refused(tiny, make_output):
  teacher = make_output(5, widths=(8,), sizes=(8,))
  with pytest.raises(ValueError, match=r"got 2 \(student\) and 1 \(teacher\)"):
    tiny.init(tiny.create("reviewkd"), teacher=teacher)


def test_the_teacher_is_read_before_its_activation(tiny):
  module = tiny.create("reviewkd")
  variables = tiny.init(module)

  def term(**features):
    teacher = ModelOutputs(
      tiny.teacher.logits, {**tiny.teacher.features, **features}
    )
    output, _ = tiny.apply(module, variables, teacher=teacher)
    return float(jnp.mean(output.terms["reviewkd"]))

  moved = tiny.teacher.features["stage1"] + 1.0
  assert term() == term(stage1=moved)
  assert term() != term(stage1_preact=moved)


def test_number_of_parameters(tiny):
  """resnet32x4 -> resnet8x4, as the authors' modules have."""
  features = {
    f"stage{i}": jnp.zeros((8, size, size, width))
    for i, (size, width) in enumerate([(32, 64), (16, 128), (8, 256)], 1)
  }
  features["pooled"] = jnp.zeros((8, 256))
  output = ModelOutputs(jnp.zeros((8, 5)), features)
  variables = jax.eval_shape(
    lambda: tiny.create("reviewkd").init(
      jax.random.key(0),
      output,
      output,
      tiny.batch,
      teacher_head=None,
      step=0,
      epoch=1,
      train=True,
    )
  )
  assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 1808774
