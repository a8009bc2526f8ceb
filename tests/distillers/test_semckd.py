import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal, softmax

from kd_jax import losses

S, T = normal(0, 2, 4, 4, 4, 3)
WIDE = normal(1, 4, 5, 5, 3)
ATTENTION = softmax(normal(2, 4, 2, 2))
TARGETS = [[T, WIDE[:, :4, :4]], [2 * WIDE, WIDE + 1]]


def layer(pattern, replacement):
  return (
    rf"project(\d+)_(\d+)/{pattern}(\d)",
    lambda m: (
      f"regressor{int(m[1]) - 1}{int(m[2]) - 1}.regressor."
      f"{3 * int(m[3]) - replacement}"
    ),
  )


METHOD = Method(
  losses={
    "semckd_loss": LossCase(
      ([[S, T], [WIDE, WIDE]], TARGETS, ATTENTION),
      trained=(0, 2),
      minimum=(TARGETS, TARGETS, ATTENTION),
    )
  },
  fields={"soft": 0.2},
  reference=(
    (
      r"(query|key)(\d+)/linear(\d)",
      lambda m: f"{m[1]}_{int(m[2]) - 1}.linear{m[3]}",
    ),
    layer("conv", 3),
    layer("bn", 2),
  ),
  weights={"ce": 1, "kd": 1, "semckd": 400},
  relational=True,
  golden=(
    Golden(
      "semckd",
      prefix=lambda case: "self_attention.",
      unused=r"(query|key)_\d+\.regressor",
    ),
  ),
  # Its attention amplifies rounding: the reference's own float32 run strays as
  # far from its float64 run.
  curves=(Curve("semckd", tolerance=2e-2),),
)


def test_attention():
  queries, keys = normal(0, 3, 2, 5), normal(1, 3, 4, 5)
  for soft in (1.0, 0.3):
    expected = softmax(np.einsum("bsd,btd->bst", queries, keys) / soft)
    value = losses.semckd_attention(queries, keys, soft=soft)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_batch_size_is_part_of_the_architecture(tiny, make_output):
  module = tiny.create("semckd")
  variables = tiny.init(module)
  assert variables["params"]["query1"]["linear1"]["kernel"].shape == (8, 4)

  def given(size):
    return {
      "student": make_output(0, batch=size),
      "teacher": make_output(1, batch=size, widths=(8, 16), sizes=(8, 8)),
      "batch": {"label": np.zeros(size, np.int32)},
    }

  with pytest.raises(ValueError, match=r"divisible by 4.*got 6"):
    tiny.shapes(module, **given(6))
  with pytest.raises(ValueError, match="batches of 8 examples, got 4"):
    tiny.apply(module, variables, **given(4))
  output, _ = tiny.apply(module, variables, train=False, **given(4))
  assert set(output.terms) == {"ce", "kd"}


def test_every_pair_of_stages_has_a_projector(tiny, make_output):
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  shapes = tiny.shapes(tiny.create("semckd"), teacher=teacher)
  assert sum(k.startswith("project") for k in shapes["params"]) == 2 * 3
