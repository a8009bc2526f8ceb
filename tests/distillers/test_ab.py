import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S = [normal(i, 4, 4, 4, 3) for i in range(2)]
T = [normal(10 + i, 4, 4, 4, 3) for i in range(2)]
# Well beyond the margin, on the teacher's side.
FAR = [np.where(x > 0, 3, -3).astype(np.float32) for x in T]
METHOD = Method(
  losses={
    "ab_loss": LossCase(
      (S, T),
      kwargs={"margin": 0.7},
      refused={"margin": (0.0, -1.0)},
      trained=(0,),
      minimum=(FAR, T),
    )
  },
  fields={"margin": 0.5},
  reference=(
    (r"connector(\d)/(de)?conv", r"connectors.\1.conv"),
    (r"connector(\d)/bn", r"connectors.\1.bn"),
  ),
  weights={"ce": 1, "kd": 0, "ab": 0},
  golden=(Golden("activation_boundary", prefix=lambda case: "connector."),),
  curves=tuple(
    Curve("ab", folder="train_2", init={"ab": 1}, pair=pair) for pair in (-1, 0)
  ),
)


def test_only_the_side_of_the_boundary_counts():
  moved = [10 * x for x in T]
  np.testing.assert_array_equal(losses.ab_loss(S, T), losses.ab_loss(S, moved))
  # Of one neuron: past its margin, short of it, on the wrong side.
  student = jnp.array([2.0, 0.5, -1.0]).reshape(3, 1, 1, 1)
  found = losses.ab_loss(student, jnp.ones_like(student))
  np.testing.assert_allclose(found, [0.0, 0.003 * 0.25, 0.003 * 4.0], rtol=1e-6)


def test_shallow_stages_count_for_less():
  zeros = [jnp.zeros_like(x) for x in S]
  alone = [
    losses.ab_loss([z if j == i else f for j, (z, f) in pairs], T)
    for pairs in [list(enumerate(zip(zeros, FAR)))]
    for i in range(2)
  ]
  np.testing.assert_allclose(2 * alone[0], alone[1], rtol=1e-6)


def test_stages_are_paired_from_the_deepest(tiny, make_output):
  teacher = make_output(5, widths=(8,), sizes=(8,))
  shapes = tiny.shapes(tiny.create("ab"), teacher=teacher)
  kernel = shapes["params"]["connector0"]["deconv"]["kernel"]
  assert set(shapes["params"]) == {"connector0"}
  assert kernel.shape == (4, 4, 12, 8)


def test_networks_alike_need_no_connector(tiny):
  module = tiny.create("ab")
  shapes = tiny.shapes(module, teacher=tiny.student)
  assert not jax.tree.leaves(shapes)


def test_maps_are_read_before_their_activation(tiny):
  module = tiny.create("ab")
  variables = tiny.init(module)

  def term(whose, **features):
    output = getattr(tiny, whose)
    output = output._replace(features={**output.features, **features})
    found, _ = tiny.apply(module, variables, **{whose: output})
    return float(jnp.mean(found.terms["ab"]))

  for whose in ("student", "teacher"):
    moved = -getattr(tiny, whose).features["stage2"]
    assert term(whose) == term(whose, stage2=moved)
    assert term(whose) != pytest.approx(term(whose, stage2_preact=moved))
