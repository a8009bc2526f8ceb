"""Every method with tiny networks."""

import functools
import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import optax
import pytest

from kd_jax import distillers, losses
from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.models import layers
from kd_jax.models.base import Classifier
from kd_jax.training import loss, optim
from kd_jax.training import state as state_lib
from kd_jax.training import step as step_lib

CLASSES, EXAMPLES, SIZE = 5, 32, 8
LABELS = np.arange(EXAMPLES, dtype=np.int32) % CLASSES


class Mini(Classifier):
  """What the methods look at, in three convolutions."""

  width: int = 4
  dropout: float = 0.0
  tokens: bool = False
  head = "fc"

  @nn.compact
  def __call__(self, images, *, train=False):
    conv, norm = self.make_conv(), self.make_norm()
    x, features = self.prepare(images), {}
    for i, name in enumerate(("stem", "stage1", "stage2")):
      strides = 2 if i == 2 else 1
      x = conv(
        *(x, self.width * strides, 3),
        **{"strides": strides, "padding": 1, "name": f"conv{i}"},
      )
      x = features[f"{name}_preact"] = norm(name=f"bn{i}")(x, train=train)
      x = features[name] = nn.relu(x)
      if self.tokens:
        features[f"block{i + 1}"] = x
    rate = self.dropout if train else 0.0
    return self.finish(features, x, dropout_rate=rate)

  @nn.nowrap
  def stage_norms(self, params):
    return [layers.norm_parameters(params, f"bn{i}") for i in (1, 2)]


def _settings(method):
  """The weights and fields of the method's config, scaled down."""
  name = "teacher" if method == "none" else method
  config = importlib.import_module(f"configs.{name}_cifar").get_config()
  fields = config.distiller.to_dict()
  fields.pop("name")
  fields |= method_cases.method(method).small
  return config.loss_weights.to_dict(), fields


def _draw(seed, shapes):
  """Variables of some shapes, from numpy: nothing to compile."""
  rng = np.random.default_rng(seed)

  def one(path, x):
    name = path[-1].key
    if name in ("scale", "var"):
      return np.ones(x.shape, x.dtype)
    if name in ("mean", "z_s", "z_t"):
      return np.zeros(x.shape, x.dtype)
    value = rng.standard_normal(x.shape).astype(x.dtype)
    if name.startswith("bank"):
      return value / np.linalg.norm(value, axis=1, keepdims=True)
    return value / math.sqrt(max(math.prod(x.shape[:-1]), 10))

  return jax.tree_util.tree_map_with_path(one, shapes)


class Method:
  """One method with tiny networks: the parts that a train step is made of."""

  def __init__(self, method, *, init_size=8, dtype=jnp.float32, dropout=0.0):
    self.method, self.init_size, self.dtype = method, init_size, dtype
    self.weights, self.fields = _settings(method)
    declared = method_cases.method(method)
    kind = {"dtype": dtype, "tokens": declared.tokens}
    self.student = Mini(CLASSES, dropout=dropout, **kind)
    self.teachers = (Mini(CLASSES, width=4 if declared.alike else 6, **kind),)
    if method == "none":
      self.teachers = ()
    image = jnp.zeros((init_size, SIZE, SIZE, 3))
    self.student_variables, *variables = [
      _draw(i, jax.eval_shape(network.init, jax.random.key(0), image))
      for i, network in enumerate((self.student, *self.teachers), start=1)
    ]
    self.teacher_variables = given = tuple(variables)
    if self.distiller().needs_class_means:
      means = np.random.default_rng(4).random((CLASSES, 12), np.float32)
      given = ({**variables[0], "class_means": {"pooled": means}},)
    shapes = jax.eval_shape(
      lambda key: loss.init_distiller(
        self.distiller(),
        key,
        student=self.student,
        student_variables=self.student_variables,
        teachers=self.teachers,
        teacher_variables=given,
        images=image,
        batch={**self.batch(init_size), "train_labels": LABELS},
      ),
      jax.random.key(0),
    )
    self.distiller_variables = _draw(3, shapes)
    if "memory" in shapes:
      table = losses.class_table(LABELS, CLASSES)
      memory = jax.tree.map(np.asarray, table._asdict())
      self.distiller_variables["memory"] |= memory

  def distiller(self, **fields):
    return distillers.create(
      self.method, dtype=self.dtype, **self.fields, **fields
    )

  def more_views(self):
    if self.distiller().views == 1:
      return {}
    return {"strong_transform": lambda *a: self.transform(*a)[:, ::-1] ** 3}

  @staticmethod
  def transform(key, batch):
    """Normalised images, without anything random."""
    return batch["image"].astype(jnp.float32) / 127.5 - 1

  @staticmethod
  def batch(size, seed=0):
    """A batch of random images."""
    rng = np.random.default_rng(seed)
    index = rng.permutation(EXAMPLES)[:size].astype(np.int32)
    return {
      "image": rng.integers(0, 256, (size, SIZE, SIZE, 3), np.uint8),
      "label": LABELS[index],
      "index": index,
      "mask": np.ones(size, bool),
    }

  def loss_arguments(self, axis_name=None, sync=True, **changes):
    return {
      "student": self.student.clone(bn_axis_name=axis_name if sync else None),
      "teachers": self.teachers,
      "distiller": self.distiller(axis_name=axis_name, sync=sync),
      "loss_weights": self.weights,
      "steps_per_epoch": 2,
      "transform": self.transform,
      **self.more_views(),
      **changes,
    }

  def optimizer(self, **options):
    return optim.sgd(
      optax.constant_schedule(0.02), weight_decay=5e-4, **options
    )

  def step(self, optimizer=None, **arguments):
    """The step of one device, and a state to start from."""
    optimizer = optimizer or self.optimizer()
    step = step_lib.make_train_step(
      optimizer=optimizer, **{**self.loss_arguments(), **arguments}
    )
    return step, self.state(optimizer)

  def state(self, optimizer):
    return state_lib.create(
      self.student_variables, self.distiller_variables, optimizer
    )

  def train(
    self,
    num_devices,
    *,
    mapping="shard_map",
    steps=3,
    sync=True,
    split=False,
    size=8,
    seeds=(0, 0),
    **step_arguments,
  ):
    """`steps` steps on the same global batches, one to a dispatch.

    With `split`, every device holds its share of the rows of the memory.

    Returns:
      (state, the sums of each step)
    """
    devices = devices_lib.make_devices(num_devices=num_devices, mapping=mapping)
    axis = collectives.AXIS
    step, state = self.step(
      **{
        "axis_name": axis,
        "shared_statistics": sync,
        **self.loss_arguments(axis, sync),
        **step_arguments,
      }
    )
    specs = state_lib.state_specs(state, self.distiller()) if split else None
    state = devices.place(state, specs) if split else devices.replicate(state)
    chunk = devices.map_chunk(
      step_lib.make_train_chunk(step, lambda resident, x: x),
      donate=True,
      carry_specs=specs,
    )
    constants = devices.replicate(
      step_lib.Constants(self.teacher_variables, step_lib.make_seeds(*seeds))
    )
    metrics = []
    for i in range(steps):
      batch = self.batch(size, seed=i)
      xs = devices.shard({k: v[None] for k, v in batch.items()})
      state, sums = chunk(state, constants, {}, xs)
      metrics.append(jax.device_get(sums))
    if mapping == "shard_map":
      assert chunk._cache_size() == 1
    jax.tree.map(
      np.testing.assert_array_equal,
      constants.teacher_variables,
      self.teacher_variables,
    )
    return state, metrics


@pytest.fixture(scope="session")
def made():
  """made("kd", **options) -> its `Method`, made once."""
  return functools.cache(Method)
