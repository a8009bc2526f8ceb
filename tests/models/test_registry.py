"""What `create` and `names` promise for every network of the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models

# Millions of parameters with 100 classes, of networks without golden values.
MILLIONS = {
  "resnet200": 3.195,
  "resnet20x4": 4.334,
  "resnet26x4": 5.884,
  "resnet44x4": 10.53,
  "resnet56x4": 13.63,
  "resnet110x4": 27.58,
}


@functools.cache
def _abstract(name, dtype):
  """The shapes of a network's output and variables, and the features' order."""
  model = models.create(name, 7, dtype=dtype)
  order = []

  def init(key, images):
    output, variables = model.init_with_output(key, images, train=True)
    order.extend(output.features)
    return output, variables

  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  output, variables = jax.eval_shape(init, jax.random.key(0), images)
  return output, variables, order


def _dtypes(tree):
  return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def test_names_are_public_and_unique():
  names = models.names()
  assert len(names) == len(set(names)) >= 47
  assert not [name for name in names if name.startswith("_")]
  assert "_tiny" in models.MODELS and "_tiny" not in names


@pytest.mark.parametrize("name", list(models.MODELS))
def test_bfloat16_leaves_parameters_statistics_and_logits_in_float32(name):
  output, variables, order = _abstract(name, "bfloat16")
  assert _dtypes(variables["params"]) == {jnp.dtype("float32")}
  assert _dtypes(variables["batch_stats"]) == {jnp.dtype("float32")}
  assert output.logits.dtype == output.features["pooled"].dtype == "float32"
  maps = {k: v for k, v in output.features.items() if k != "pooled"}
  assert _dtypes(maps) == {jnp.dtype("bfloat16")}
  assert order[-2:] == ["last", "pooled"]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_shapes_of_logits_and_last_map(name):
  output, variables, _ = _abstract(name, "bfloat16")
  assert output.logits.shape == (2, 7)
  batch, height, width, channels = output.features["last"].shape
  assert (batch, channels) == output.features["pooled"].shape
  assert height == width >= 2
  head = models.create(name, 7).head
  assert variables["params"][head]["kernel"].shape == (channels, 7)


@pytest.mark.parametrize("name", MILLIONS)
def test_number_of_parameters(name):
  init = functools.partial(models.create(name, 100).init, train=False)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(init, jax.random.key(0), images)["params"]
  millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
  assert millions == pytest.approx(MILLIONS[name], rel=5e-4)


def test_bfloat16_computes_nearly_the_same(random_variables):
  images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  exact = models.create("_tiny", 10)
  variables = random_variables(exact)
  expected = np.asarray(exact.apply(variables, images, train=False).logits)
  rough = models.create("_tiny", 10, dtype=jnp.bfloat16)
  logits = np.asarray(rough.apply(variables, images, train=False).logits)
  error = np.abs(logits - expected).max() / np.abs(expected).max()
  assert 1e-5 < error < 0.05


def test_fields_reach_the_model():
  model = models.create(
    "wrn_16_2", np.int64(5), dtype="bfloat16", bn_axis_name="data"
  )
  assert (model.num_classes, model.bn_axis_name) == (5, "data")
  assert model.dtype == jnp.bfloat16


def test_an_unknown_name_lists_the_closest_and_all():
  with pytest.raises(
    ValueError, match=r"unknown model 'resnet8x5'.*Did you"
  ) as e:
    models.create("resnet8x5", 10)
  assert "mean resnet8x4 or" in str(e.value)
  for name in models.names():
    assert name in str(e.value)
  assert "_tiny" not in str(e.value)


def test_an_unknown_name_that_resembles_nothing():
  with pytest.raises(ValueError, match=r"model 'qqq'\. Expected one of"):
    models.create("qqq", 10)


@pytest.mark.parametrize("num_classes", [0, -3, 10.0, "10", True, None])
def test_a_senseless_number_of_classes(num_classes):
  with pytest.raises(ValueError, match=r"num_classes must be .*, got .*; pass"):
    models.create("resnet8", num_classes)


def test_a_senseless_dtype():
  with pytest.raises(ValueError, match="float type, got int32; use float32"):
    models.create("resnet8", 10, dtype=jnp.int32)
