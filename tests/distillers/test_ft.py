import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 4, 4, 4, 6), normal(1, 4, 8, 8, 6)
SAME = normal(2, 4, 4, 4, 6)


def sequential(kind, place):
  """Ours counts layers, theirs the entries of a Sequential of threes."""
  return lambda m: f"{place}.{3 * int(m[1]) - 3 + (kind == 'bn')}"


METHOD = Method(
  losses={
    # At its zero an absolute difference has the gradient of a rounding.
    "ft_loss": LossCase((S, T), scale_free=True),
    "paraphraser_loss": LossCase((S, SAME), minimum=(SAME, SAME)),
  },
  fields={"rate": 0.25, "over_channels": False},
  terms=frozenset({"ce", "kd", "ft", "ft_init"}),
  reference=(
    *(
      (rf"translator/{kind}(\d)", sequential(kind, "translator.encoder"))
      for kind in ("conv", "bn")
    ),
    (
      r"paraphraser/encoder/conv(\d)",
      sequential("conv", "paraphraser.encoder"),
    ),
    (r"paraphraser/deconv(\d)", sequential("conv", "paraphraser.decoder")),
  ),
  weights={"ce": 1, "kd": 0, "ft": 200, "ft_init": 0},
  golden=(
    Golden("factor_transfer"),
    Golden("ft_flat", lambda case: {"over_channels": False}),
  ),
  # The reference's own float32 run strays by 8e-5, its logits by 5e-3; the
  # distance grows tenfold in two steps.
  curves=tuple(
    Curve(
      *("ft", lambda curves: {}, "train_2"),
      **{"init": {"ft_init": 1}, "pair": pair, "tolerance": 2e-3},
    )
    for pair in (-1, 0)
  ),
)


@pytest.mark.parametrize("over_channels", [True, False])
def test_the_scale_of_a_factor_does_not_count(over_channels):
  found = losses.ft_loss(SAME, 5 * SAME, over_channels=over_channels)
  np.testing.assert_allclose(found, 0.0, atol=1e-7)


def test_each_term_trains_its_own_modules(tiny):
  module = tiny.create("ft")
  variables = tiny.init(module)

  def term(params, student, name):
    given = tiny.given(student)
    rest = {**variables, "params": params}
    output, _ = module.apply(rest, mutable=["batch_stats"], **given)
    return jnp.mean(output.terms[name])

  moved = {}
  for name in ("ft", "ft_init"):
    gradients = jax.jit(
      jax.grad(lambda p, s, name=name: term(p, s, name), (0, 1))
    )(variables["params"], tiny.student)
    moved[name] = {
      part: any(np.any(x) for x in jax.tree.leaves(tree))
      for part, tree in {**gradients[0], "student": gradients[1]}.items()
    }
  assert moved["ft"] == {
    **{"translator": True, "paraphraser": False, "student": True}
  }
  assert moved["ft_init"] == {
    **{"translator": False, "paraphraser": True, "student": False}
  }
