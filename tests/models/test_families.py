"""Each family's features, gradients and initialisers, on small members."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import models
from kd_jax.models import fold, resnet_cifar, vgg, wrn

HE, UNIFORM, SMALL_NORMAL = "He normal", "uniform", "N(0, 0.01^2)"
# Initialisers of convolutions, of the classifier's kernel, and of its bias.
INITIALISERS = {
  "wrn": (HE, UNIFORM, "zero"),
  "vgg": (HE, SMALL_NORMAL, "zero"),
  "mobilenetv2": (HE, SMALL_NORMAL, "zero"),
  "shufflenetv1": (UNIFORM, UNIFORM, UNIFORM),
  "shufflenetv2": (UNIFORM, UNIFORM, UNIFORM),
  "shufflenetv2_imagenet": (UNIFORM, UNIFORM, UNIFORM),
}


def test_the_gradient_reaches_every_parameter(family):
  flat = flax.traverse_util.flatten_dict(family.grads, sep="/")
  assert not [k for k, v in flat.items() if not np.abs(v).max() > 0]
  assert all(np.isfinite(v).all() for v in flat.values())


def test_preactivations_and_the_last_map(family):
  name, features = family.name, family.output.features
  stages = family.output.stages()
  preacts = [k for k in features if k.endswith("_preact")]
  if name == "mobilenetv2":
    assert preacts == ["stem_preact"]
  else:
    assert len(preacts) == len(stages) + 1
  for key in preacts:
    assert np.asarray(features[key]).min() < 0
    activated = np.maximum(features[key], 0)
    result = features[key.removesuffix("_preact")]
    # A wide ResNet's maps are what comes before the preactivation.
    # Compiled apart from each other, they may differ in the last bit.
    same = np.allclose(activated, result, rtol=1e-5, atol=1e-5)
    assert same == (name != "wrn"), key
  signed = [m for m in stages if np.asarray(m).min() < 0]
  assert len(signed) == (len(stages) if name in ("wrn", "mobilenetv2") else 0)
  last = features["last"]
  if name == "wrn":
    activated = np.maximum(features[f"stage{len(stages)}_preact"], 0)
    np.testing.assert_allclose(last, activated, rtol=1e-5, atol=1e-5)
  elif name in ("mobilenetv2", "shufflenetv2"):
    assert last.shape[-1] != stages[-1].shape[-1]
  else:
    np.testing.assert_array_equal(last, stages[-1])


def test_pool_and_classify_are_the_networks_end(family):
  features = family.output.features
  pooled = family.model.pool(features["last"])
  np.testing.assert_allclose(pooled, features["pooled"], rtol=1e-5, atol=1e-6)
  logits = family.model.classify(family.variables["params"], pooled)
  np.testing.assert_allclose(logits, family.output.logits, rtol=1e-4, atol=1e-5)


def test_stage_norms_are_just_before_the_relu(family):
  """Each bias moves its channels of its stage's map by as much."""
  model, params = family.model, family.variables["params"]
  flat = flax.traverse_util.flatten_dict(params)
  biases = [path for path in flat if path[-1] == "bias"]
  numbered = {p: np.full(flat[p].shape, i + 1.0) for i, p in enumerate(biases)}
  tree = flax.traverse_util.unflatten_dict({**flat, **numbered})
  norms = model.stage_norms(tree)
  assert len(norms) == len(family.output.stages())
  for stage, (scale, bias) in enumerate(norms, start=1):
    key = f"stage{stage}_preact"
    key = f"stage{stage}" if family.name == "mobilenetv2" else key
    before = family.output.features[key]
    (number,) = set(np.asarray(bias)) - {0}
    path = biases[int(number) - 1]
    assert scale.shape == bias.shape == before.shape[-1:]
    assert np.array_equal(scale == 0, bias == 0)
    step = np.linspace(-2, 2, flat[path].size, dtype=np.float32)
    moved = flax.traverse_util.unflatten_dict({**flat, path: flat[path] + step})
    expected = model.stage_norms(moved)[stage - 1][1]
    expected = expected - model.stage_norms(params)[stage - 1][1]
    _, output = family.run(moved)
    difference = output.features[key] - before
    np.testing.assert_allclose(
      difference, np.broadcast_to(expected, before.shape), atol=1e-4
    )
    # What no BatchNorm made comes out of a ReLU.
    assert (np.asarray(before)[..., np.asarray(bias) == 0] >= 0).all()


def test_stage_norms_need_a_family_that_has_them_and_no_folding(draw):
  model = vgg.VGG(10)
  variables = draw(model)
  folded = fold.fold(model, variables, (32, 32, 3))
  with pytest.raises(ValueError, match=r"block1_1: .*folded.* before folding"):
    model.stage_norms(folded["params"])
  with pytest.raises(ValueError, match=r"VGG: .*no method stage_norms; add it"):
    models.Classifier.stage_norms(model, variables["params"])


def _check_kernel(kind, kernel, tolerance):
  """Compares values with a distribution; `kernel` is [..., in, out]."""
  values = np.asarray(kernel).ravel()
  *window, inputs, outputs = kernel.shape
  bound = 1 / np.sqrt(np.prod(window) * inputs)
  std = {
    HE: np.sqrt(2 / (np.prod(window) * outputs)),
    UNIFORM: bound / np.sqrt(3),
    SMALL_NORMAL: 0.01,
  }[kind]
  assert np.std(values) == pytest.approx(std, rel=tolerance)
  assert np.mean(values) == pytest.approx(0, abs=5 * std / values.size**0.5)
  largest = np.abs(values).max()
  if kind == UNIFORM:
    assert largest <= bound
  elif values.size > 500:
    assert largest > 2.5 * std  # not truncated


def test_initialisers(family):
  conv, head, head_bias = INITIALISERS.get(family.name, (HE, UNIFORM, UNIFORM))
  init = jax.jit(lambda key: family.model.init(key, family.images, train=True))
  variables = jax.device_get(init(jax.random.key(3)))
  for stats in jax.tree.leaves(variables["batch_stats"]):
    assert np.ptp(stats) == 0
  params = flax.traverse_util.flatten_dict(variables["params"])
  for (*path, kind), value in params.items():
    if kind == "scale":
      assert (value == 1).all()
    elif path == [family.model.head]:
      if kind == "kernel":
        _check_kernel(head, value, 0.1)
      elif head_bias == "zero":
        assert (value == 0).all()
      else:
        bound = 1 / np.sqrt(params[*path, "kernel"].shape[0])
        assert 0.4 * bound < np.abs(value).max() <= bound
    elif kind == "bias":  # of BatchNorm, or of VGG's convolutions
      assert (value == 0).all()
    else:
      _check_kernel(conv, value, 6 / value.size**0.5)


@pytest.mark.parametrize(
  ("model", "words"),
  [
    (resnet_cifar.ResNetCifar(10, depth=18), r"6n \+ 2 .*got 18"),
    (wrn.WideResNet(10, depth=18), r"6n \+ 4 .*got 18"),
  ],
)
def test_impossible_depths(model, words):
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(("size", "last"), [(32, 4), (64, 4)])
def test_vgg_pools_once_more_at_64_pixels(size, last):
  model = models.create("vgg8", 10)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  output, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  assert output.features["stage3"].shape == (1, size // 8, size // 8, 512)
  assert output.features["last"].shape == (1, last, last, 512)


def test_mobilenet_for_imagenet_has_relu6_and_dropout():
  x = jnp.array([-1.0, 3.0, 9.0])
  assert models.create("MobileNetV2", 10).activation(x).tolist() == [0, 3, 9]
  model = models.create("MobileNetV2_Imagenet", 10)
  assert model.activation(x).tolist() == [0, 3, 6]
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
  with pytest.raises(ValueError, match=r'"dropout" to train'):
    jax.eval_shape(train, variables, images)
