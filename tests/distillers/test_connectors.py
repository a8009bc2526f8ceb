"""Shapes, kernels and initial weights of the learned modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.distillers import connectors


@pytest.mark.parametrize(
  "size_s, size_t, name, kernel, target",
  [
    (8, 4, "conv", (3, 3, 5, 6), 4),
    (4, 8, "deconv", (4, 4, 5, 6), 8),
    (8, 8, "conv", (1, 1, 5, 6), 8),
    (8, 5, "conv", (4, 4, 5, 6), 5),
    (4, 7, "conv", (3, 3, 5, 6), 4),
  ],
)
def test_hint_regressor_meets_the_teacher(size_s, size_t, name, kernel, target):
  def run(key):
    student = jnp.ones((2, size_s, size_s, 5))
    teacher = jnp.ones((2, size_t, size_t, 6))
    module = connectors.HintRegressor()
    return module.init_with_output(key, student, teacher, train=True)

  (x, hint), variables = jax.eval_shape(run, jax.random.key(0))
  assert x.shape == hint.shape == (2, target, target, 6)
  assert set(variables["params"]) == {name, "bn"}
  assert variables["params"][name]["kernel"].shape == kernel


def test_hint_regressor_on_maps_that_are_not_square():
  given = jax.random.key(0), jnp.ones((1, 8, 6, 3)), jnp.ones((1, 5, 4, 3))
  shapes = jax.eval_shape(
    lambda: connectors.HintRegressor().init(*given, train=True)
  )
  assert shapes["params"]["conv"]["kernel"].shape == (4, 3, 3, 3)
  with pytest.raises(ValueError, match=r"8x4 cannot be regressed to 5x6"):
    connectors.HintRegressor().init(
      jax.random.key(0),
      jnp.ones((1, 8, 4, 3)),
      jnp.ones((1, 5, 6, 3)),
      train=True,
    )


X, Y = jnp.ones((2, 4, 4, 20)), jnp.ones((2, 8, 8, 30))
FUSE = (X, jnp.ones((2, 2, 2, 24)), (4, 4), 30)


@pytest.mark.parametrize(
  ("module", "args", "bounds"),
  [
    (connectors.HintRegressor(), (X, Y), {"deconv": 1 / (30 * 16)}),
    (
      connectors.AttentionFusion(middle=24),
      FUSE,
      {"conv1": 3 / 20, "conv2": 3 / (24 * 9), "attention": 1 / 48},
    ),
    (connectors.UnitEmbedding(40), (X[:, 0, 0],), {"linear": 1 / 20}),
    (
      connectors.Bottleneck(final_activation=True),
      (X, 24, 30),
      {"conv2": 1 / (24 * 9)},
    ),
  ],
)
def test_initial_weights_are_the_references(module, args, bounds):
  """Uniform within +- the square root of `bounds`, and filling it."""
  train = {} if len(args) == 1 else {"train": True}
  params = jax.jit(lambda k: module.init(k, *args, **train))(jax.random.key(0))
  for name, square in bounds.items():
    kernel, bound = params["params"][name]["kernel"], np.sqrt(square)
    assert float(jnp.abs(kernel).max()) <= bound
    np.testing.assert_allclose(jnp.std(kernel), bound / np.sqrt(3), rtol=0.1)
