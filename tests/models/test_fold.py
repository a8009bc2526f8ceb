"""Folding: the same numbers without BatchNorm, wherever that is possible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.utils import fusion

from kd_jax import models
from kd_jax.interop import model
from kd_jax.models import fold, layers

SIZE = (32, 32, 3)

# Network -> BatchNorms that fold, and that stay.
NETWORKS = {
  "resnet8x4": (10, 0),
  "wrn_16_2": (6, 7),  # one BatchNorm of two in a block follows a sum
  "vgg8": (5, 0),  # convolutions with a bias
  "MobileNetV2": (53, 0),  # depthwise
  "ShuffleV1": (49, 0),  # grouped
  "ShuffleV2": (56, 0),
  "ResNet18": (20, 0),
}


def draw(network, seed=0):
  """Variables that look trained: no statistic is what it began with."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    value = rng.standard_normal(shape.shape, np.float32)
    if path[-1].key in ("var", "scale"):
      return np.abs(value) / 5 + np.float32(0.8)
    if path[-1].key == "kernel":
      fan_in = np.prod(shape.shape[:-1])
      return value * np.float32(np.sqrt(2 / fan_in))
    return value / 8

  shapes = jax.eval_shape(
    functools.partial(network.init, train=False),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, *SIZE), jnp.float32),
  )
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def kinds(params):
  names = [
    path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  return names.count("offset") - names.count("multiplier"), names.count(
    "multiplier"
  )


def compute(network, variables):
  run = jax.jit(
    lambda v, x: network.apply(v, x, train=False),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  images = np.random.default_rng(1).standard_normal((2, *SIZE), np.float32)
  return run(variables, images)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_same(name):
  network = models.create(name, 10)
  variables = draw(network)
  folded = fold.fold(network, variables, SIZE)
  assert kinds(folded["params"]) == NETWORKS[name]
  assert list(folded) == ["params"]
  expected, got = compute(network, variables), compute(network, folded)
  for key, value in {**expected.features, "logits": expected.logits}.items():
    ours = got.features.get(key, got.logits)
    error = np.abs(ours - value).max() / np.abs(value).max()
    assert error < 1e-5, key


def test_variables_are_left_as_they_are():
  network = models.create("_tiny", 10)
  variables = draw(network)
  before = jax.tree.map(np.copy, variables)
  fold.fold(network, variables, SIZE)
  jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_a_convolution_that_is_read_elsewhere_is_left_alone():
  network = models.create("wrn_16_1", 10)
  folded = fold.pairs(network, draw(network), SIZE)
  # The stem is a feature, and in the first block the shortcut.
  assert ("conv1",) not in folded.values()
  assert ("block1_layer_0", "bn1") not in folded
  assert folded["block1_layer_0", "bn2"] == ("block1_layer_0", "conv1")


def test_a_folded_network_does_not_train():
  network = models.create("_tiny", 10)
  folded = fold.fold(network, draw(network), SIZE)
  with pytest.raises(ValueError, match="frozen: its BatchNorm is folded"):
    network.apply(folded, jnp.zeros((1, *SIZE)), train=True)
  with pytest.raises(ValueError, match="got none: they are folded already"):
    fold.fold(network, folded, SIZE)


def test_a_convolution_is_what_pytorch_fuses():
  """PyTorch's own folding of one convolution and one BatchNorm."""
  import flax.linen as nn

  class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
      x = layers.conv(x, 6, 3, name="conv", groups=3, use_bias=True)
      return layers.BatchNorm(name="bn")(x, train=train)

  network = Pair()
  variables = draw(network)
  folded = fold.fold(network, variables, SIZE)
  conv = torch.nn.Conv2d(3, 6, 3, groups=3)
  bn = torch.nn.BatchNorm2d(6)
  params, stats = variables["params"], variables["batch_stats"]
  tensor = torch.from_numpy
  with torch.no_grad():
    kernel = np.moveaxis(params["conv"]["kernel"], (-1, -2), (0, 1))
    conv.weight.copy_(tensor(np.ascontiguousarray(kernel)))
    conv.bias.copy_(tensor(params["conv"]["bias"]))
    bn.weight.copy_(tensor(params["bn"]["scale"]))
    bn.bias.copy_(tensor(params["bn"]["bias"]))
    bn.running_mean.copy_(tensor(stats["bn"]["mean"]))
    bn.running_var.copy_(tensor(stats["bn"]["var"]))
  fused = fusion.fuse_conv_bn_eval(conv.eval(), bn.eval())
  plain = fold.unfold(folded["params"], fold.pairs(network, variables, SIZE))
  assert plain["batch_stats"] == {}
  ours = plain["params"]["conv"]
  weight = np.moveaxis(ours["kernel"], (-1, -2), (0, 1))
  for got, wanted in ((weight, fused.weight), (ours["bias"], fused.bias)):
    np.testing.assert_allclose(got, wanted.detach(), rtol=1e-5, atol=1e-6)


def test_what_stays_is_a_batch_norm_of_mean_0_and_variance_1():
  network = models.create("wrn_16_1", 10)
  variables = draw(network)
  folded = fold.fold(network, variables, SIZE)
  plain = fold.unfold(folded["params"], fold.pairs(network, variables, SIZE))
  assert kinds(plain["params"]) == (0, 0)
  last = plain["batch_stats"]["bn1"]
  np.testing.assert_array_equal(last["mean"], 0)
  np.testing.assert_allclose(last["var"] + 1e-5, 1, rtol=1e-7)
  np.testing.assert_array_equal(
    plain["params"]["bn1"]["scale"], folded["params"]["bn1"]["multiplier"]
  )


def test_a_student_with_its_teachers_classifier():
  card = {
    "architecture": "_tiny",
    "num_classes": 10,
    "dtype": "float32",
    "head": {
      "distiller": {"name": "simkd", "factor": 2},
      "weights": [1.0],
      "teacher_maps": [[8, 8, 32]],
    },
  }
  network = model.build(card)
  variables = draw(network)
  folded = fold.fold(network, variables, SIZE)
  assert kinds(folded["params"]) == (9 + 3, 0)  # the projector's too
  expected, got = compute(network, variables), compute(network, folded)
  np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "ShuffleV2"])
def test_a_frozen_network_computes_the_same(name, dtype):
  network = models.create(name, 10, dtype=jnp.dtype(dtype))
  variables = draw(network)
  frozen = fold.freeze(network, variables, SIZE)
  again = fold.freeze(network, frozen, SIZE)
  jax.tree.map(np.testing.assert_array_equal, frozen, again)
  expected = compute(models.create(name, 10), variables).logits
  got, as_is = (compute(network, v).logits for v in (frozen, variables))
  assert got.dtype == jnp.float32

  def error(logits):
    return np.abs(logits - expected).max() / np.abs(expected).max()

  # Folded, what bfloat16 rounds are other numbers, not more of them.
  assert error(got) < (1e-5 if dtype == "float32" else 2 * error(as_is))


def test_a_frozen_network_keeps_what_is_not_convolved_in_float32():
  network = models.create("wrn_16_2", 10, dtype=jnp.bfloat16)
  params = fold.freeze(network, draw(network), SIZE)["params"]
  types = {
    (path[-1].key, np.ndim(leaf), leaf.dtype.name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  assert types == {
    ("kernel", 4, "bfloat16"),
    ("kernel", 2, "float32"),  # the classifier
    ("bias", 1, "float32"),
    ("offset", 1, "bfloat16"),
    ("multiplier", 1, "float32"),
    ("offset", 1, "float32"),  # beside a multiplier
  }
