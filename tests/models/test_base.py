import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kd_jax import models
from kd_jax.models import base


@pytest.fixture(scope="module")
def tiny(draw):
  model = models.create("_tiny", 5)
  images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
  return model, draw(model), images


def test_evaluation_is_the_default_and_leaves_the_statistics(tiny):
  model, variables, images = tiny
  output, state = model.apply(variables, images, mutable=["batch_stats"])
  expected = model.apply(variables, images, train=False)
  np.testing.assert_array_equal(output.logits, expected.logits)
  jax.tree.map(
    np.testing.assert_array_equal,
    state["batch_stats"],
    variables["batch_stats"],
  )


def test_classify_takes_any_leading_axes_and_bfloat16(tiny):
  model, variables, _ = tiny
  head = variables["params"]["fc"]
  pooled = jnp.ones((2, 3, 8), jnp.bfloat16)
  logits = model.classify(variables["params"], pooled)
  assert logits.shape == (2, 3, 5) and logits.dtype == jnp.float32
  expected = np.asarray(head["kernel"]).sum(0) + np.asarray(head["bias"])
  np.testing.assert_allclose(logits[1, 2], expected, rtol=1e-5)
  with pytest.raises(ValueError, match=r"takes 8 pooled channels, got.*8, 9"):
    model.classify(variables["params"], jnp.ones((8, 9)))


@pytest.mark.parametrize(
  ("name", "shape", "dtype", "words"),
  [
    ("_tiny", (2, 3, 16, 16), "float32", r"3\], got shape \(2, 3, 16, 16\)"),
    ("_tiny", (16, 16, 3), "float32", r"3\], got shape \(16, 16, 3\)"),
    ("_tiny", (2, 16, 16, 3), "uint8", "float images, got uint8; compute"),
    ("vgg8", (2, 4, 4, 3), "float32", "too small.*use larger images"),
  ],
)
def test_bad_images(name, shape, dtype, words):
  init = models.create(name, 5).init
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


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


def test_dropout_comes_between_pool_and_classifier_in_training():
  model = _Dropout(3)
  head = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}  # shows what it reads
  variables = {"params": {"fc": head}}
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
  evaluated = model.apply(variables, images, train=False).logits
  np.testing.assert_array_equal(evaluated, pooled)
  with pytest.raises(ValueError, match=r'"dropout" to train, .*; pass rngs='):
    model.apply(variables, images, train=True)
