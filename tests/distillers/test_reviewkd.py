import jax
import jax.numpy as jnp
import pytest
from method_cases import Golden, LossCase, Method, normal

from kd_jax.models.layers import ModelOutputs

SHAPES = [(4, 8, 8, 5), (4, 4, 4, 3), (4, 5, 5, 3), (4, 1, 1, 6)]
STUDENTS, TEACHERS = (
  [normal(10 * i + j, *shape) for j, shape in enumerate(SHAPES)]
  for i in range(2)
)
METHOD = Method(
  losses={
    "reviewkd_loss": LossCase(
      (STUDENTS, TEACHERS), minimum=(TEACHERS, TEACHERS)
    )
  },
  fields={"max_mid": 6},
  reference=(
    (r"level(\d+)/conv(\d)", lambda m: f"{int(m[1]) - 1}.conv{m[2]}.0"),
    (r"level(\d+)/bn(\d)", lambda m: f"{int(m[1]) - 1}.conv{m[2]}.1"),
    (r"level(\d+)/attention", lambda m: f"{int(m[1]) - 1}.att_conv.0"),
  ),
  weights={"ce": 1, "kd": 0, "reviewkd": 5},
  golden=(Golden("review_kd", prefix=lambda case: "abf"),),
)


def test_unequal_numbers_of_stages_are_refused(tiny, make_output):
  teacher = make_output(5, widths=(8,), sizes=(8,))
  with pytest.raises(ValueError, match=r"got 2 \(student\) and 1 \(teacher\)"):
    tiny.shapes(tiny.create("reviewkd"), teacher=teacher)


def test_the_teacher_is_read_before_its_activation(tiny):
  module = tiny.create("reviewkd")
  variables = tiny.init(module)

  def term(**features):
    features = {**tiny.teacher.features, **features}
    teacher = tiny.teacher._replace(features=features)
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
  shapes = tiny.shapes(tiny.create("reviewkd"), student=output, teacher=output)
  assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 1808774
