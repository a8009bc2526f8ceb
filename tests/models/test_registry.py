"""What `create`, `entry` and `names` promise."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models
from kd_jax.models import base, wrn

# Millions of parameters with 100 classes, of networks without golden values.
MILLIONS = {
  "resnet200": 3.195,
  "resnet20x4": 4.334,
  "resnet26x4": 5.884,
  "resnet44x4": 10.53,
  "resnet56x4": 13.63,
  "resnet110x4": 27.58,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_number_of_parameters(name):
  init = functools.partial(models.create(name, 100).init, train=False)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(init, jax.random.key(0), images)["params"]
  millions = base.count_parameters(params) / 1e6
  assert millions == pytest.approx(MILLIONS[name], rel=5e-4)


def test_learning_rates_are_the_references():
  rates = {name: models.entry(name).learning_rate for name in models.names()}
  slow = {name for name, rate in rates.items() if rate == 0.01}
  assert slow == {
    *("MobileNetV2", "MobileNetV2_1_0", "MobileNetV2_Imagenet"),
    *("ShuffleV1", "ShuffleV2", "ShuffleV2_1_5", "ShuffleV2_Imagenet"),
  }
  assert set(rates.values()) == {0.01, 0.05}


def test_a_users_own_network(monkeypatch):
  own = types.ModuleType("own")
  own.Net = functools.partial(wrn.WideResNet, depth=22)
  names = (models.WeightNames("mine", {"conv1": "stem"}),)
  own.entry = models.Entry(own.Net, 0.02, 64, names)
  own.dense, own.tuple = lambda **fields: tuple(fields), tuple
  monkeypatch.setitem(sys.modules, "own", own)
  for name in ("own:Net", "own:entry"):
    model = models.create(name, np.int64(5), dtype="bfloat16", bn_axis_name="a")
    assert model == wrn.WideResNet(5, jnp.dtype(jnp.bfloat16), "a", depth=22)
  assert models.entry("own:Net").learning_rate == 0.05
  assert models.entry("own:entry").learning_rate == 0.02
  (names,) = models.entry("own:entry").weight_names
  assert names.rename(("conv1",)) == "stem"
  assert names.rename(("layer1_0", "bn1")) == "layer1.0.bn1"
  for name, words in {
    "own:missing": "model 'own:missing' cannot be imported",
    "own:dense": "expected a builder of a kd_jax.models.Classifier.* tuple",
    "own:tuple": "builder that takes num_classes, dtype and bn_axis_name, got",
  }.items():
    with pytest.raises(ValueError, match=words):
      models.create(name, 5)


def test_an_unknown_name_lists_the_closest_and_all():
  with pytest.raises(ValueError, match="unknown model 'resnet8x5'") as e:
    models.create("resnet8x5", 10)
  assert "Did you mean resnet8x4" in str(e.value)
  assert len(models.names()) >= 47
  assert all(name in str(e.value) for name in models.names())
  assert "_tiny" not in str(e.value)


@pytest.mark.parametrize(
  ("num_classes", "dtype", "words"),
  [
    *((n, "float32", f"num_classes .*got {n!r}; pass") for n in (0, -3, 10.0)),
    *((n, "float32", f"num_classes .*got {n!r}; pass") for n in ("10", True)),
    (10, jnp.int32, "float type, got int32; use float32"),
  ],
)
def test_bad_arguments(num_classes, dtype, words):
  with pytest.raises(ValueError, match=words):
    models.create("resnet8", num_classes, dtype=dtype)
