"""Folding: the same numbers without BatchNorm, wherever that is possible."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models
from kd_jax.models import fold, layers

SIZE = (32, 32, 3)
# BatchNorms that fold, and that stay.
FOLDED = {
  "resnet": (10, 0),
  "bottleneck": (12, 0),
  "wrn": (3, 4),  # one BatchNorm of two in a block follows a sum
  "vgg": (6, 0),  # convolutions with a bias
  "mobilenetv2": (53, 0),  # depthwise
  "shufflenetv1": (13, 0),  # grouped
  "shufflenetv2": (26, 0),
  "resnet_imagenet": (7, 0),
  "resnext": (12, 0),
  "shufflenetv2_imagenet": (26, 0),
}


def kinds(params):
  paths = jax.tree_util.tree_leaves_with_path(params)
  names = [path[-1].key for path, _ in paths]
  multipliers = names.count("multiplier")
  return names.count("offset") - multipliers, multipliers


def relative_error(got, expected):
  return np.abs(got - expected).max() / np.abs(expected).max()


def test_a_frozen_network_computes_the_same(family):
  before = jax.tree.map(np.copy, family.variables)
  frozen = fold.freeze(family.model, family.variables, SIZE)
  jax.tree.map(np.testing.assert_array_equal, family.variables, before)
  assert list(frozen) == ["params"]
  assert kinds(frozen["params"]) == FOLDED[family.name]
  got = jax.jit(family.model.apply)(frozen, family.images)
  for key, expected in family.output.features.items():
    assert relative_error(got.features[key], expected) < 1e-5, key
  assert relative_error(got.logits, family.output.logits) < 1e-5


@pytest.mark.parametrize("name", ["_tiny", "wrn_16_1"])
def test_frozen_in_bfloat16(name, draw):
  network = models.create(name, 10, dtype="bfloat16")
  variables = draw(network)
  frozen = fold.freeze(network, variables, SIZE)
  again = fold.freeze(network, frozen, SIZE)
  jax.tree.map(np.testing.assert_array_equal, frozen, again)
  images = np.random.default_rng(1).standard_normal((2, *SIZE), np.float32)
  expected = jax.jit(models.create(name, 10).apply)(variables, images).logits
  run = jax.jit(network.apply)
  got, as_is = (run(v, images).logits for v in (frozen, variables))
  assert got.dtype == jnp.float32
  # Folded, what bfloat16 rounds are other numbers, not more of them.
  assert relative_error(got, expected) < 2 * relative_error(as_is, expected)
  types = {
    (path[-1].key, np.ndim(leaf), leaf.dtype.name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen["params"])
  }
  kept = {("multiplier", 1, "float32"), ("offset", 1, "float32")}
  assert types == {
    ("kernel", 4, "bfloat16"),
    ("kernel", 2, "float32"),  # the classifier
    ("bias", 1, "float32"),
    ("offset", 1, "bfloat16"),
    *(kept if name == "wrn_16_1" else ()),
  }


def test_a_convolution_that_is_read_elsewhere_is_left_alone(draw):
  network = models.create("wrn_16_1", 10)
  variables = draw(network)
  folded = fold.pairs(network, variables, SIZE)
  # The stem is a feature, and in the first block the shortcut.
  assert ("conv1",) not in folded.values()
  assert ("block1_layer_0", "bn1") not in folded
  assert folded["block1_layer_0", "bn2"] == ("block1_layer_0", "conv1")
  # In other toolboxes, what stays is a BatchNorm of mean 0 and variance 1.
  params = fold.fold(network, variables, SIZE)["params"]
  plain = fold.unfold(params, folded)
  assert kinds(plain["params"]) == (0, 0)
  last = plain["batch_stats"]["bn1"]
  np.testing.assert_array_equal(last["mean"], 0)
  np.testing.assert_allclose(last["var"] + 1e-5, 1, rtol=1e-7)
  np.testing.assert_array_equal(
    plain["params"]["bn1"]["scale"], params["bn1"]["multiplier"]
  )


def test_a_folded_network_does_not_train(draw):
  network = models.create("_tiny", 10)
  folded = fold.fold(network, draw(network), SIZE)
  with pytest.raises(ValueError, match="frozen: its BatchNorm is folded"):
    network.apply(folded, jnp.zeros((1, *SIZE)), train=True)
  with pytest.raises(ValueError, match="got none: they are folded already"):
    fold.fold(network, folded, SIZE)


class Pair(nn.Module):
  """A convolution that two BatchNorms read."""

  @nn.compact
  def __call__(self, x, *, train=False):
    x = layers.conv(x, 6, 3, name="conv")
    return [layers.BatchNorm(name=n)(x, train=train) for n in ("bn1", "bn2")]


def test_a_convolution_of_two_batch_norms_is_left_alone(draw):
  network = Pair()
  assert fold.pairs(network, draw(network), SIZE) == {}
