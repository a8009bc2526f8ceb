import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

SHAPES = [(4, 8, 8, 3), (4, 4, 4, 5), (4, 2, 2, 6)]
S, T = (
  [normal(10 * i + j, *shape) for j, shape in enumerate(SHAPES)]
  for i in range(2)
)
METHOD = Method(
  # It has fourth powers of the maps.
  losses={"fsp_loss": LossCase((S, T), minimum=(T, T), huge=1e6)},
  weights={"ce": 1, "kd": 0, "fsp": 0},
  alike=True,
  golden=(Golden("fsp"),),
  curves=(Curve("fsp", folder="train_2", init={"fsp": 1}),),
)


def test_matrix():
  """Channel i of one map times channel j of the next, over positions."""
  first, second = S[0], S[1]
  pooled = first.reshape(4, 4, 2, 4, 2, 3).mean((2, 4))
  expected = np.einsum("bhwc,bhwd->bcd", pooled, second) / 16
  found = losses.fsp_matrix(jnp.asarray(first), jnp.asarray(second))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_maps_that_cannot_be_compared():
  with pytest.raises(ValueError, match="expected at least 2 maps"):
    losses.fsp_loss(S[:1], T[:1])
  wider = [*T[:2], normal(9, 4, 2, 2, 7)]
  with pytest.raises(ValueError, match="expected one width, got 6 and 7"):
    losses.fsp_loss(S, wider)


def test_sizes_may_differ():
  larger = [np.repeat(np.repeat(x, 2, 1), 2, 2) for x in S]
  np.testing.assert_allclose(losses.fsp_loss(S, larger), 0.0, atol=1e-8)


def test_other_channels_are_refused(tiny):
  with pytest.raises(ValueError, match="expected one width, got 6 and 8"):
    tiny.shapes(tiny.create("fsp"), teacher=tiny.teacher)
