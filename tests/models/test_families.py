"""Each family's features, initialisers and gradients, on small members."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models
from kd_jax.models import (
  mobilenetv2,
  resnet,
  resnet_cifar,
  shufflenetv1,
  shufflenetv2,
  vgg,
  wrn,
)

SMALL = {
  "resnet": resnet_cifar.ResNetCifar(10, depth=8, widths=(4, 8, 8, 16)),
  "bottleneck": resnet_cifar.BottleneckResNetCifar(
    10, blocks=(2, 1), widths=(4, 8)
  ),
  "wrn": wrn.WideResNet(10, depth=10, widen=1),
  "vgg": vgg.VGG(10, convs=(1, 2, 1, 1, 1)),
  "mobilenetv2": mobilenetv2.MobileNetV2Classifier(10, width_multiplier=0.25),
  "shufflenetv1": shufflenetv1.ShuffleNetV1(
    10, widths=(48, 96, 192), blocks=(2, 1, 1)
  ),
  "shufflenetv2": shufflenetv2.ShuffleNetV2(
    10, widths=(16, 32, 64), blocks=(1, 1, 1), last_width=80
  ),
  "resnet_imagenet": resnet.ResNet(
    10, blocks=(1, 1), widths=(4, 8), factor=2, stem_width=4
  ),
  "resnext": resnet.ResNet(
    10,
    blocks=(2, 1),
    bottleneck=True,
    factor=2,
    groups=4,
    widths=(4, 8),
    stem_width=4,
  ),
  "shufflenetv2_imagenet": shufflenetv2.ShuffleNetV2(
    10,
    widths=(16, 32, 64),
    blocks=(1, 1, 1),
    last_width=80,
    imagenet=True,
  ),
}


# Optimising these programs would take longer than running them does.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(scope="module", params=SMALL)
def family(request, random_variables):
  """A small member's output in evaluation mode, and its gradients there."""
  model = SMALL[request.param]
  images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  variables = random_variables(model)

  def objective(params):
    output = model.apply({**variables, "params": params}, images, train=False)
    return jnp.sum(output.logits * jnp.cos(jnp.arange(10.0))), output

  differentiate = _jit(jax.grad(objective, has_aux=True))
  grads, output = differentiate(variables["params"])
  return request.param, output, grads


def test_the_gradient_reaches_every_parameter(family):
  _, _, grads = family
  flat = flax.traverse_util.flatten_dict(grads, sep="/")
  unreached = [k for k, v in flat.items() if not np.abs(v).max() > 0]
  assert not unreached
  assert all(np.isfinite(v).all() for v in flat.values())


def test_activation_of_preactivations(family):
  name, output, _ = family
  features = output.features
  preacts = [k for k in features if k.endswith("_preact")]
  maps = [k for k in features if k.startswith("st") and k not in preacts]
  if name == "mobilenetv2":
    assert preacts == ["stem_preact"]
  else:
    assert len(preacts) == len(maps)
  for key in preacts:
    assert np.asarray(features[key]).min() < 0
    activated = np.maximum(features[key], 0)
    result = features[key.removesuffix("_preact")]
    # A wide ResNet's maps are what comes before the preactivation.
    # Compiled apart from each other, they may differ in the last bit.
    same = np.allclose(activated, result, rtol=1e-5, atol=1e-5)
    assert same == (name != "wrn"), key


def test_signs_and_the_last_map(family):
  name, output, _ = family
  features = output.features
  stages = output.stages()
  signed = [m for m in stages if np.asarray(m).min() < 0]
  assert len(signed) == (len(stages) if name in ("wrn", "mobilenetv2") else 0)
  if name == "wrn":
    activated = np.maximum(features[f"stage{len(stages)}_preact"], 0)
    np.testing.assert_allclose(
      features["last"], activated, rtol=1e-5, atol=1e-5
    )
  elif name in ("mobilenetv2", "shufflenetv2"):
    assert features["last"].shape[-1] != stages[-1].shape[-1]
  else:
    np.testing.assert_array_equal(features["last"], stages[-1])


# Standard deviations and bounds of some of the real networks' parameters.
HE = "he normal over the fan-out"
UNIFORM = "uniform in the fan-in"
INITIALISERS = [
  ("resnet32x4", "layer2_0/conv1", HE, "fc", UNIFORM),
  ("ResNet50_cifar", "layer3_0/conv2", HE, "linear", UNIFORM),
  ("wrn_40_2", "block3_layer_0/conv1", HE, "fc", "zero bias"),
  ("vgg8", "block2_0", HE, "classifier", "small normal"),
  ("MobileNetV2", "conv2_0", HE, "classifier_0", "small normal"),
  ("MobileNetV2", "blocks_6_0/conv_3", HE, "classifier_0", "small normal"),
  ("ShuffleV1", "layer3_1/conv1", UNIFORM, "linear", UNIFORM),
  ("ShuffleV2", "layer3_0/conv5", UNIFORM, "linear", UNIFORM),
  ("ResNet18", "layer2_0/downsample_0", HE, "fc", UNIFORM),
  ("resnext50_32x4d", "layer3_0/conv2", HE, "fc", UNIFORM),
  (
    "MobileNetV2_Imagenet",
    "blocks_6_0/conv_3",
    HE,
    "classifier_0",
    "small normal",
  ),
  ("ShuffleV2_Imagenet", "layer3_0/conv5", UNIFORM, "linear", UNIFORM),
]


@pytest.mark.parametrize(
  ("name", "conv", "kind", "head", "head_kind"), INITIALISERS
)
def test_initialisers(name, conv, kind, head, head_kind):
  model = models.create(name, 100)
  assert model.head == head
  init = _jit(lambda key: _only(model, key, conv, head))
  kernel, linear, bias, conv_bias = init(jax.random.key(3))
  height, width, inputs, outputs = kernel.shape
  if kind == HE:
    std = np.sqrt(2 / (height * width * outputs))
    assert np.abs(kernel).max() > 2.5 * std
  else:
    bound = 1 / np.sqrt(height * width * inputs)
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    std = bound / np.sqrt(3)
  assert np.std(kernel) == pytest.approx(std, rel=0.05)
  assert np.mean(kernel) == pytest.approx(0, abs=5 * std / kernel.size**0.5)
  if conv_bias is not None:
    assert not np.any(conv_bias)
  bound = 1 / np.sqrt(linear.shape[0])
  if head_kind == "small normal":
    assert np.std(linear) == pytest.approx(0.01, rel=0.03)
  else:
    assert 0.98 * bound < np.abs(linear).max() <= bound
    assert np.std(linear) == pytest.approx(bound / np.sqrt(3), rel=0.03)
  if head_kind == UNIFORM:
    assert 0.9 * bound < np.abs(bias).max() <= bound
  else:
    assert not np.any(bias)


def _only(model, key, conv, head):
  """Initialises, and returns what is asked for: the rest is not computed."""
  params = model.init(key, jnp.zeros((1, 16, 16, 3)), train=False)["params"]
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return (
    flat[f"{conv}/kernel"],
    flat[f"{head}/kernel"],
    flat[f"{head}/bias"],
    flat.get(f"{conv}/bias"),
  )


@pytest.mark.parametrize("name", SMALL)
def test_batch_norms_start_at_the_identity(name):
  def init(key):
    params = SMALL[name].init(key, jnp.zeros((1, 16, 16, 3)))["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    norms = [k.removesuffix("/scale") for k in flat if k.endswith("/scale")]
    return {k: (flat[f"{k}/scale"], flat[f"{k}/bias"]) for k in norms}

  norms = _jit(init)(jax.random.key(0))
  assert norms
  for scale, bias in norms.values():
    assert (scale == 1).all() and (bias == 0).all()


def test_a_resnet_of_impossible_depth():
  model = resnet_cifar.ResNetCifar(10, depth=18)
  with pytest.raises(ValueError, match=r"6n \+ 2 .*got 18"):
    model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_a_wide_resnet_of_impossible_depth():
  model = wrn.WideResNet(10, depth=18)
  with pytest.raises(ValueError, match=r"6n \+ 4 .*got 18"):
    model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(("size", "last"), [(32, 4), (64, 4)])
def test_vgg_pools_once_more_at_64_pixels(size, last):
  model = models.create("vgg8", 10)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  output, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  assert output.features["stem"].shape == (1, size, size, 64)
  assert output.features["stage3"].shape == (1, size // 8, size // 8, 512)
  assert output.features["last"].shape == (1, last, last, 512)


def test_the_activations_of_mobilenets():
  cifar = models.create("MobileNetV2", 10)
  imagenet = models.create("MobileNetV2_Imagenet", 10)
  x = jnp.array([-1.0, 3.0, 9.0])
  assert cifar.activation(x).tolist() == [0, 3, 9]
  assert imagenet.activation(x).tolist() == [0, 3, 6]


@pytest.mark.parametrize("name", ["ResNet18", "ShuffleV2_Imagenet"])
def test_resolution_of_networks_for_imagenet(name):
  model = models.create(name, 10)
  images = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
  output, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  first = {"ResNet18": 24, "ShuffleV2_Imagenet": 12}[name]
  assert output.features["stem"].shape[1:3] == (24, 24)
  assert output.features["stage1"].shape[1:3] == (first, first)
  assert output.features["last"].shape[1:3] == (3, 3)
