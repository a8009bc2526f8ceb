import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kd_jax import models
from kd_jax.models import base


@pytest.fixture(scope="module")
def tiny(random_variables):
  model = models.create("_tiny", 5)
  images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
  return model, random_variables(model), images


def test_the_base_is_abstract():
  with pytest.raises(TypeError, match="abstract"):
    base.Classifier(num_classes=3)


def test_evaluation_is_the_default_and_leaves_the_statistics(tiny):
  model, variables, images = tiny
  output, state = model.apply(variables, images, mutable=["batch_stats"])
  expected = model.apply(variables, images, train=False)
  np.testing.assert_array_equal(output.logits, expected.logits)
  for a, b in zip(
    jax.tree.leaves(state["batch_stats"]),
    jax.tree.leaves(variables["batch_stats"]),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_initialising_leaves_the_statistics(tiny):
  model, _, images = tiny

  @jax.jit
  def statistics(key):
    return model.init(key, images, train=True)["batch_stats"]

  stats = statistics(jax.random.key(0))
  means = stats["bn1"]["mean"], stats["layer3_0"]["bn2"]["mean"]
  assert all((np.asarray(mean) == 0).all() for mean in means)


def test_classify_takes_any_leading_axes_and_bfloat16(tiny):
  model, variables, _ = tiny
  head = variables["params"]["fc"]
  pooled = jnp.ones((2, 3, 8), jnp.bfloat16)
  logits = model.classify(variables["params"], pooled)
  assert logits.shape == (2, 3, 5) and logits.dtype == jnp.float32
  expected = np.asarray(head["kernel"]).sum(0) + np.asarray(head["bias"])
  np.testing.assert_allclose(logits[1, 2], expected, rtol=1e-5)


def test_classify_names_the_channels(tiny):
  model, variables, _ = tiny
  with pytest.raises(ValueError, match=r"takes 8 pooled channels, got.*8, 9"):
    model.classify(variables["params"], jnp.ones((8, 9)))


def test_images_without_channels_last(tiny):
  model, variables, _ = tiny
  with pytest.raises(
    ValueError, match=r"height, width, 3\], got shape \(2, 3, 16"
  ):
    model.apply(variables, jnp.ones((2, 3, 16, 16)), train=False)


def test_images_that_are_not_normalised(tiny):
  model, variables, images = tiny
  with pytest.raises(ValueError, match="float images, got uint8; compute"):
    model.apply(variables, images.astype(jnp.uint8), train=False)


def test_images_that_are_too_small():
  model = models.create("vgg8", 5)
  images = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
  with pytest.raises(ValueError, match=r"too small.*use larger images"):
    jax.eval_shape(model.init, jax.random.key(0), images)


def test_image_sizes_other_than_32_work(tiny):
  model, variables, _ = tiny
  output = model.apply(variables, jnp.ones((1, 24, 24, 3)), train=False)
  assert output.features["last"].shape == (1, 6, 6, 8)


def test_shared_statistics_equal_those_of_one_device(tiny):
  """Two devices with `bn_axis_name` train as one does on the whole batch."""
  model, variables, images = tiny
  expected, state = model.apply(
    variables, images, train=True, mutable=["batch_stats"]
  )
  shared = models.create("_tiny", 5, bn_axis_name="data")

  def forward(variables, images):
    output, state = shared.apply(
      variables, images, train=True, mutable=["batch_stats"]
    )
    return output.logits, state

  batch, whole = PartitionSpec("data"), PartitionSpec()
  mapped = jax.shard_map(
    forward,
    mesh=Mesh(np.array(jax.devices()[:2]), ("data",)),
    in_specs=(whole, batch),
    out_specs=(batch, whole),
    check_vma=False,
  )
  logits, shared_state = jax.jit(mapped)(variables, images)
  np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    shared_state,
    state,
  )


class _Dropout(base.Classifier):
  """Nothing but the end of a network, with dropout."""

  head = "fc"

  @nn.compact
  def __call__(self, images, *, train=False):
    rate = 0.25 if train else 0.0
    return self.finish({}, self.prepare(images), dropout_rate=rate)


def _identity_with_dropout():
  """A model whose logits are what its classifier sees."""
  model = _Dropout(3)
  head = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
  return model, {"params": {"fc": head}}


def test_dropout_comes_between_pool_and_classifier_in_training():
  model, variables = _identity_with_dropout()
  images = 1 + jax.random.uniform(jax.random.key(0), (2000, 1, 1, 3))

  def train(seed):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, images, train=True, rngs=rngs)

  output = train(1)
  pooled = np.asarray(output.features["pooled"])
  np.testing.assert_array_equal(pooled, images[:, 0, 0])
  logits = np.asarray(output.logits)
  kept = logits != 0
  assert kept.mean() == pytest.approx(0.75, abs=0.02)
  np.testing.assert_allclose(logits[kept], pooled[kept] / 0.75, rtol=1e-6)
  np.testing.assert_array_equal(logits, train(1).logits)
  assert (logits != np.asarray(train(2).logits)).any()


def test_evaluation_and_classify_have_no_dropout():
  model, variables = _identity_with_dropout()
  images = 1 + jax.random.uniform(jax.random.key(0), (8, 1, 1, 3))
  output = model.apply(variables, images, train=False)
  np.testing.assert_array_equal(output.logits, images[:, 0, 0])
  logits = model.classify(variables["params"], output.features["pooled"])
  np.testing.assert_array_equal(logits, output.logits)


def test_training_with_dropout_names_its_random_stream():
  model = models.create("MobileNetV2_Imagenet", 5)
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  init = functools.partial(model.init, train=True)
  variables = jax.eval_shape(init, jax.random.key(0), images)

  def train(variables, images, **kwargs):
    return model.apply(
      variables, images, train=True, mutable=["batch_stats"], **kwargs
    )

  with pytest.raises(
    ValueError, match=r'"dropout" to train, got none; pass rngs='
  ):
    jax.eval_shape(train, variables, images)
  rngs = {"dropout": jax.random.key(0)}
  drop = functools.partial(train, rngs=rngs)
  output, _ = jax.eval_shape(drop, variables, images)
  assert output.logits.shape == (2, 5)
  evaluate = functools.partial(model.apply, train=False)
  assert jax.eval_shape(evaluate, variables, images).logits.shape == (2, 5)
