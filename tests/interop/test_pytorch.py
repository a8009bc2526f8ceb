"""State dicts to linen variables and back."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from kd_jax import models
from kd_jax.interop import pytorch


def numbered(state_dict):
  """Tensors of distinct values, made fast."""
  return {
    name: np.zeros((), np.int64)
    if name.endswith("num_batches_tracked")
    else np.arange(i, i + math.prod(shape), dtype=np.float32).reshape(shape)
    for i, (name, shape) in enumerate(state_dict)
  }


def test_names_and_shapes(layout):
  (first, *_) = models.entry(layout["name"]).weight_names
  shapes = pytorch.tensor_shapes(layout["name"], layout["num_classes"], first)
  assert shapes == {
    name: tuple(shape)
    for name, shape in layout["state_dict"]
    if not name.endswith("num_batches_tracked")
  }


@pytest.mark.parametrize(
  "name",
  [
    *("resnet8x4", "ResNet50_cifar", "wrn_16_1", "vgg8", "MobileNetV2"),
    *("ShuffleV1", "ShuffleV2", "ResNet18", "MobileNetV2_Imagenet"),
    "ShuffleV2_Imagenet",
  ],
)
def test_round_trip_is_exact(name, layouts, assert_same):
  """One network of each family; the others have the same kinds of layers."""
  layout = layouts[name]
  tensors = numbered(layout["state_dict"])
  variables = pytorch.from_state_dict(name, layout["num_classes"], tensors)
  assert all(
    isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
    for leaf in jax.tree.leaves(variables)
  )
  back = pytorch.to_state_dict(name, variables)
  assert_same(back, tensors)
  assert all(tensor.flags.c_contiguous for tensor in back.values())


def test_variables_have_the_structure_of_init(draw):
  variables = draw(models.create("_tiny", 5))
  tensors = pytorch.to_state_dict("_tiny", variables)
  imported = pytorch.from_state_dict("_tiny", 5, tensors)
  assert jax.tree.structure(imported) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, imported, variables)
  # They are the caller's own.
  before = tensors["fc.bias"].copy()
  imported["params"]["fc"]["bias"][:] = 9
  np.testing.assert_array_equal(tensors["fc.bias"], before)


def test_what_else_a_state_dict_may_hold(tensors, assert_same):
  """Prefixes, any batch counters or none, half precision."""
  changed = {f"module._orig_mod.{k}": v for k, v in tensors.items()}
  del changed["module._orig_mod.bn1.num_batches_tracked"]
  changed["layer1.0.bn1.num_batches_tracked"] = np.array(123)
  del changed["module._orig_mod.layer1.0.bn1.num_batches_tracked"]
  bias, kernel = (tensors[n] for n in ("fc.bias", "conv1.weight"))
  halves = bias.astype(np.float16), kernel.astype(ml_dtypes.bfloat16)
  changed["module._orig_mod.fc.bias"] = halves[0]
  changed["module._orig_mod.conv1.weight"] = halves[1]
  variables = pytorch.from_state_dict("_tiny", 5, changed)
  expected = {
    **tensors,
    "fc.bias": halves[0].astype(np.float32),
    "conv1.weight": halves[1].astype(np.float32),
  }
  assert_same(pytorch.to_state_dict("_tiny", variables), expected)


def test_misfits_are_listed(tensors):
  changed = dict(tensors)
  del changed["layer2.0.downsample.0.weight"]
  changed["layer4.0.conv1.weight"] = np.ones((1, 1, 3, 3), np.float32)
  changed["conv1.num_batches_tracked"] = np.array(0)
  with pytest.raises(ValueError, match="do not fit _tiny with 3 classes") as e:
    pytorch.from_state_dict("_tiny", 3, changed)
  for words in (
    "Missing (1): layer2.0.downsample.0.weight.",
    "Unexpected (2): conv1.num_batches_tracked, layer4.0.conv1.weight.",
    "Misshapen (2)",
    "fc.weight (expected [3, 8], got [5, 8])",
    "fc.bias (expected [3], got [5])",
    "Check the model's name and its number of classes",
  ):
    assert words in str(e.value)
  with pytest.raises(ValueError, match=r"Missing \(\d+\): .*, and \d+ more"):
    pytorch.from_state_dict("resnet8", 5, {})


def test_contents_that_are_no_state_dict(tensors):
  for content, words in (
    ({"epoch": np.array(3), "model": tensors}, r"pass checkpoint\['model'\]"),
    (
      {**tensors, "fc.bias": np.arange(5)},
      r"Not float \(1\): fc\.bias \(int64\)",
    ),
    ({**tensors, "module.fc.bias": np.ones(5)}, r"'fc\.bias' twice.*drop one"),
  ):
    with pytest.raises(ValueError, match=words):
      pytorch.from_state_dict("_tiny", 5, content)


def test_writing_another_models_variables(draw):
  variables = draw(models.create("_tiny", 5))
  for name, given, words in (
    ("resnet14", variables, "not fit resnet14 with 5 .*Missing"),
    ("_tiny", {"params": variables["params"]}, r"not fit _tiny.*Missing"),
    ("vgg8", variables, "not fit vgg8.*Missing"),
  ):
    with pytest.raises(ValueError, match=words):
      pytorch.to_state_dict(name, given)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
  ("size", "strides", "padding"), [(3, 2, 1), (5, 1, 0), (4, 2, 1)]
)
def test_convolution_kernels(transposed, size, strides, padding):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, 3, 8, 9), np.float32)
  shape = (3, 4) if transposed else (4, 3)
  weight = rng.standard_normal((*shape, size, size), np.float32)
  functional = torch.nn.functional
  theirs = functional.conv_transpose2d if transposed else functional.conv2d
  convert, inverse = pytorch.conv_kernel, pytorch.conv_weight
  kind, linen_padding = nn.Conv, padding
  if transposed:
    convert = pytorch.conv_transpose_kernel
    inverse = pytorch.conv_transpose_weight
    kind, linen_padding = nn.ConvTranspose, size - 1 - padding
  module = kind(
    4,
    (size, size),
    strides=(strides, strides),
    padding=((linen_padding, linen_padding),) * 2,
    use_bias=False,
  )
  kernel = convert(weight)
  ours = module.apply({"params": {"kernel": kernel}}, x.transpose(0, 2, 3, 1))
  expected = theirs(*map(torch.tensor, (x, weight)), None, strides, padding)
  np.testing.assert_allclose(
    np.asarray(ours).transpose(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_array_equal(inverse(kernel), weight)


class Module(nn.Module):
  """One layer of each kind and a learned scalar, under names of our own."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (1, 1), name="first_conv")(x)
    x = nn.ConvTranspose(3, (4, 4), strides=(2, 2), name="up")(x)
    x = nn.BatchNorm(use_running_average=False, name="norm")(x)
    factor = self.param("log_scale", nn.initializers.zeros, (1, 1, 1, 3))
    self.variable("memory", "bank", jnp.zeros, (2,))
    return nn.Dense(2, name="out")(x * factor)


def test_any_module_with_names_of_its_own(assert_same):
  template = jax.eval_shape(
    Module().init, jax.random.key(0), jnp.ones((1, 4, 4, 3))
  )
  table = {
    (): "regressor",
    ("first_conv",): "regressor.0",
    ("up",): "regressor.1",
    ("norm",): "regressor.2",
    ("out",): "linear",
  }
  tensors = numbered(
    [
      ("regressor.0.weight", (4, 3, 1, 1)),
      ("regressor.0.bias", (4,)),
      ("regressor.1.weight", (4, 3, 4, 4)),
      ("regressor.1.bias", (3,)),
      ("regressor.2.weight", (3,)),
      ("regressor.2.bias", (3,)),
      ("regressor.2.running_mean", (3,)),
      ("regressor.2.running_var", (3,)),
      ("regressor.2.num_batches_tracked", ()),
      ("regressor.log_scale", (1, 1, 1, 3)),
      ("linear.weight", (2, 3)),
      ("linear.bias", (2,)),
    ]
  )
  options = {"rename": table.__getitem__, "transposed": {"regressor.1"}}
  variables = pytorch.variables_from_tensors(template, tensors, **options)
  assert set(variables) == {"params", "batch_stats"}
  for name, expected in (
    ("up", pytorch.conv_transpose_kernel(tensors["regressor.1.weight"])),
    ("out", pytorch.linear_kernel(tensors["linear.weight"])),
  ):
    kernel = variables["params"][name]["kernel"]
    np.testing.assert_array_equal(kernel, expected)
  assert_same(pytorch.tensors_from_variables(variables, **options), tensors)
  norm = {
    name.rpartition(".")[2]: tensor
    for name, tensor in tensors.items()
    if name.startswith("regressor.2.")
  }
  params, stats = pytorch.batch_norm(norm)
  assert_same(params, variables["params"]["norm"])
  assert_same(stats, variables["batch_stats"]["norm"])
  del norm["weight"], norm["bias"]
  assert pytorch.batch_norm(norm)[0] == {}
  wrong = {**tensors, "linear.weight": np.ones((3, 2), np.float32)}
  with pytest.raises(ValueError, match=r"fit the regressor.*\[2, 3\], got"):
    pytorch.variables_from_tensors(
      template, wrong, what="the regressor", **options
    )
