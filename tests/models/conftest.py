import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _random_variables(model, seed=0):
  """Variables of a model, without compiling its initialisers."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    name = path[-1].key
    if name == "kernel":
      fan_in = np.prod(leaf.shape[:-1])
      values = rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)
    elif name in ("scale", "var"):
      values = rng.uniform(0.8, 1.2, leaf.shape)
    else:
      values = 0.1 * rng.standard_normal(leaf.shape)
    return values.astype(leaf.dtype)

  init = functools.partial(model.init, train=False)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(init, jax.random.key(0), images)
  return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="session")
def random_variables():
  """A function from a model (and a seed) to variables for it."""
  return _random_variables
