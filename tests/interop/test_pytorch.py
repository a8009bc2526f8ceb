import json
import math
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import pytorch

FOLDER = pathlib.Path(
  os.environ.get("KD_JAX_GOLDEN")
  or pathlib.Path(__file__).resolve().parents[1] / "golden"
)


def _cases():
  """Each distinct checkpoint layout of the reference toolboxes, once."""
  cases = {}
  for path in sorted((FOLDER / "models").glob("*.json")):
    for name, spec in json.loads(path.read_text()).items():
      if spec["image_size"] == 32 and f"{name}_cifar" in models.names():
        name = f"{name}_cifar"
      cases[name, json.dumps(spec["state_dict"])] = spec
  return [
    pytest.param(name, spec, id=name) for (name, _), spec in cases.items()
  ]


def _numbered(state_dict):
  """Tensors of distinct values, and fast."""
  return {
    name: np.zeros((), np.int64)
    if name.endswith("num_batches_tracked")
    else np.arange(i, i + math.prod(shape), dtype=np.float32).reshape(shape)
    for i, (name, shape) in enumerate(state_dict)
  }


def _tiny_variables(seed=0):
  model = models.create("_tiny", 5)
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes
  )


def _tiny_state_dict():
  return pytorch.to_state_dict("_tiny", _tiny_variables())


def test_the_cases_are_those_of_the_golden_folder(golden):
  assert golden == FOLDER
  assert len(_cases()) >= 35


@pytest.mark.parametrize(("name", "spec"), _cases())
def test_round_trip_is_exact(name, spec):
  tensors = _numbered(spec["state_dict"])
  variables = pytorch.from_state_dict(name, spec["num_classes"], tensors)
  assert all(
    isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
    for leaf in jax.tree.leaves(variables)
  )
  back = pytorch.to_state_dict(name, variables)
  assert back.keys() == tensors.keys()
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype, key
    assert back[key].flags.c_contiguous, key
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_variables_have_the_structure_of_init():
  variables = _tiny_variables()
  imported = pytorch.from_state_dict(
    "_tiny", 5, pytorch.to_state_dict("_tiny", variables)
  )
  assert jax.tree.structure(imported) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, imported, variables)


def test_imported_arrays_are_the_callers_own():
  tensors = _tiny_state_dict()
  before = tensors["fc.bias"].copy()
  variables = pytorch.from_state_dict("_tiny", 5, tensors)
  variables["params"]["fc"]["bias"][:] = 9
  np.testing.assert_array_equal(tensors["fc.bias"], before)


@pytest.mark.parametrize(
  "prefix", ["module.", "_orig_mod.", "module._orig_mod."]
)
def test_prefixes_of_wrappers_are_removed(prefix):
  tensors = _tiny_state_dict()
  wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
  imported = pytorch.from_state_dict("_tiny", 5, wrapped)
  back = pytorch.to_state_dict("_tiny", imported)
  assert back.keys() == tensors.keys()


def test_a_tensor_with_and_without_prefix():
  tensors = _tiny_state_dict()
  tensors["module.fc.bias"] = tensors["fc.bias"]
  with pytest.raises(ValueError, match=r"'fc\.bias' twice.*drop one"):
    pytorch.from_state_dict("_tiny", 5, tensors)


def test_batch_counters_may_be_missing_or_large():
  tensors = _tiny_state_dict()
  del tensors["bn1.num_batches_tracked"]
  tensors["layer1.0.bn1.num_batches_tracked"] = np.array(123)
  back = pytorch.to_state_dict(
    "_tiny", pytorch.from_state_dict("_tiny", 5, tensors)
  )
  assert back["bn1.num_batches_tracked"] == 0
  assert back["layer1.0.bn1.num_batches_tracked"] == 0


def test_half_precision_checkpoints_become_float32():
  tensors = _tiny_state_dict()
  tensors["fc.bias"] = np.arange(5, dtype=np.float16)
  tensors["conv1.weight"] = tensors["conv1.weight"].astype(ml_dtypes.bfloat16)
  variables = pytorch.from_state_dict("_tiny", 5, tensors)
  bias = variables["params"]["fc"]["bias"]
  assert bias.dtype == np.float32 and bias.tolist() == [0, 1, 2, 3, 4]
  assert variables["params"]["conv1"]["kernel"].dtype == np.float32


def test_missing_unexpected_and_misshapen_tensors_are_listed():
  tensors = _tiny_state_dict()
  del tensors["layer2.0.downsample.0.weight"]
  tensors["layer4.0.conv1.weight"] = np.ones((1, 1, 3, 3), np.float32)
  tensors["conv1.num_batches_tracked"] = np.array(0)
  with pytest.raises(ValueError, match="do not fit _tiny with 3 classes") as e:
    pytorch.from_state_dict("_tiny", 3, tensors)
  message = str(e.value)
  assert "Missing (1): layer2.0.downsample.0.weight." in message
  assert (
    "Unexpected (2): conv1.num_batches_tracked, layer4.0.conv1.weight."
  ) in message
  assert "Misshapen (2)" in message
  assert "fc.weight (expected [3, 8], got [5, 8])" in message
  assert "fc.bias (expected [3], got [5])" in message
  assert "Check the model's name and its number of classes" in message


def test_long_lists_are_cut():
  with pytest.raises(ValueError, match=r"Missing \(\d+\): .*, and \d+ more"):
    pytorch.from_state_dict("resnet8", 5, {})


def test_another_models_checkpoint():
  with pytest.raises(ValueError, match="do not fit resnet8 with 5 classes"):
    pytorch.from_state_dict("resnet8", 5, _tiny_state_dict())


def test_a_whole_checkpoint_instead_of_its_weights():
  checkpoint = {"epoch": np.array(3), "model": _tiny_state_dict()}
  with pytest.raises(ValueError, match=r"pass checkpoint\['model'\]"):
    pytorch.from_state_dict("_tiny", 5, checkpoint)


def test_tensors_that_are_not_float():
  tensors = _tiny_state_dict()
  tensors["fc.bias"] = np.arange(5)
  with pytest.raises(ValueError, match=r"Not float \(1\): fc\.bias \(int64\)"):
    pytorch.from_state_dict("_tiny", 5, tensors)


def test_an_unknown_model():
  with pytest.raises(ValueError, match=r"unknown model 'resnet9'.*resnet8"):
    pytorch.from_state_dict("resnet9", 5, {})
  with pytest.raises(ValueError, match=r"unknown model 'resnet9'.*resnet8"):
    pytorch.to_state_dict("resnet9", {})


def test_exporting_another_models_variables():
  variables = _tiny_variables()
  with pytest.raises(ValueError, match=r"not fit resnet14 with 5 .*Missing"):
    pytorch.to_state_dict("resnet14", variables)
  with pytest.raises(ValueError, match=r"not fit _tiny.*Missing \(4\)|more"):
    pytorch.to_state_dict("_tiny", {"params": variables["params"]})
  with pytest.raises(ValueError, match=r"not fit vgg8.*Missing"):
    pytorch.to_state_dict("vgg8", variables)


def _conv_reference(x, weight, strides, padding):
  """PyTorch's convolution by its definition: x [I, H, W], weight OIHW."""
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
  size = weight.shape[-1]
  w = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  w = w[:, ::strides, ::strides]
  return np.einsum("ihwab,oiab->ohw", w, weight)


def _conv_transpose_reference(x, weight, strides, padding):
  """PyTorch's transposed convolution: x [I, H, W], weight [I, O, k, k]."""
  _, height, width = x.shape
  _, outputs, size, _ = weight.shape
  full = np.zeros(
    (outputs, (height - 1) * strides + size, (width - 1) * strides + size)
  )
  for i in range(height):
    for j in range(width):
      top, left = i * strides, j * strides
      full[:, top : top + size, left : left + size] += np.einsum(
        "c,coab->oab", x[:, i, j], weight
      )
  return full[
    :, padding : full.shape[1] - padding, padding : full.shape[2] - padding
  ]


def _apply(module, kernel, x):
  """A linen layer on one CHW image."""
  image = jnp.asarray(x.transpose(1, 2, 0)[None])
  y = module.apply({"params": {"kernel": jnp.asarray(kernel)}}, image)
  return np.asarray(y)[0].transpose(2, 0, 1)


@pytest.mark.parametrize(("size", "strides", "padding"), [(3, 2, 1), (5, 1, 0)])
def test_convolution_kernels(size, strides, padding):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 8, 8), np.float32)
  weight = rng.standard_normal((4, 3, size, size), np.float32)
  module = nn.Conv(
    4,
    (size, size),
    strides=strides,
    padding=((padding, padding),) * 2,
    use_bias=False,
  )
  kernel = pytorch.conv_kernel(weight)
  np.testing.assert_allclose(
    _apply(module, kernel, x),
    _conv_reference(x, weight, strides, padding),
    rtol=1e-4,
    atol=1e-4,
  )
  np.testing.assert_array_equal(pytorch.conv_weight(kernel), weight)


@pytest.mark.parametrize(("size", "strides", "padding"), [(4, 2, 1), (3, 1, 1)])
def test_transposed_convolution_kernels(size, strides, padding):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 5, 6), np.float32)
  weight = rng.standard_normal((3, 4, size, size), np.float32)
  linen_padding = size - 1 - padding
  module = nn.ConvTranspose(
    4,
    (size, size),
    strides=(strides, strides),
    padding=((linen_padding, linen_padding),) * 2,
    use_bias=False,
  )
  kernel = pytorch.conv_transpose_kernel(weight)
  np.testing.assert_allclose(
    _apply(module, kernel, x),
    _conv_transpose_reference(x, weight, strides, padding),
    rtol=1e-4,
    atol=1e-4,
  )
  np.testing.assert_array_equal(pytorch.conv_transpose_weight(kernel), weight)


def test_linear_kernels():
  weight = np.arange(6, dtype=np.float32).reshape(2, 3)
  kernel = pytorch.linear_kernel(weight)
  module = nn.Dense(2, use_bias=False)
  y = module.apply({"params": {"kernel": kernel}}, jnp.array([1.0, 10.0, 100]))
  assert y.tolist() == [210.0, 543.0]
  np.testing.assert_array_equal(pytorch.linear_weight(kernel), weight)


class _Module(nn.Module):
  """One layer of each kind and a learned scalar, under names of our own."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (1, 1), name="first_conv")(x)
    x = nn.ConvTranspose(3, (4, 4), strides=(2, 2), name="up")(x)
    x = nn.BatchNorm(use_running_average=False, name="norm")(x)
    factor = self.param("log_scale", nn.initializers.zeros, (3,))
    memory = self.variable("memory", "bank", jnp.zeros, (2,))
    return nn.Dense(2, name="out")(x * factor) + memory.value


def test_any_module_with_names_of_its_own():
  template = jax.eval_shape(
    _Module().init, jax.random.key(0), jnp.ones((1, 4, 4, 3))
  )
  table = {
    (): "regressor",
    ("first_conv",): "regressor.0",
    ("up",): "regressor.1",
    ("norm",): "regressor.2",
    ("out",): "linear",
  }
  shapes = [
    ("regressor.0.weight", (4, 3, 1, 1)),
    ("regressor.0.bias", (4,)),
    ("regressor.1.weight", (4, 3, 4, 4)),
    ("regressor.1.bias", (3,)),
    ("regressor.2.weight", (3,)),
    ("regressor.2.bias", (3,)),
    ("regressor.2.running_mean", (3,)),
    ("regressor.2.running_var", (3,)),
    ("regressor.2.num_batches_tracked", ()),
    ("regressor.log_scale", (3,)),
    ("linear.weight", (2, 3)),
    ("linear.bias", (2,)),
  ]
  tensors = _numbered(shapes)
  options = {"rename": table.__getitem__, "transposed": {"regressor.1"}}
  variables = pytorch.variables_from_tensors(template, tensors, **options)
  assert set(variables) == {"params", "batch_stats"}
  np.testing.assert_array_equal(
    variables["params"]["up"]["kernel"],
    pytorch.conv_transpose_kernel(tensors["regressor.1.weight"]),
  )
  back = pytorch.tensors_from_variables(variables, **options)
  assert back.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)
  params, stats = pytorch.batch_norm(
    {
      name.rsplit(".", 1)[-1]: tensor
      for name, tensor in tensors.items()
      if name.startswith("regressor.2.")
    }
  )
  for ours, given in (
    (variables["params"]["norm"], params),
    (variables["batch_stats"]["norm"], stats),
  ):
    assert ours.keys() == given.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(ours), given)


def test_batch_norm_without_parameters():
  params, stats = pytorch.batch_norm(
    {"running_mean": np.zeros(2), "running_var": np.ones(2)}
  )
  assert params == {} and set(stats) == {"mean", "var"}


def test_misshapen_tensors_of_any_module_are_named():
  template = {"params": {"out": {"kernel": jnp.ones((3, 2))}}}
  tensors = {"out.weight": np.ones((3, 2), np.float32)}
  with pytest.raises(ValueError, match=r"fit the regressor.*\[2, 3\], got"):
    pytorch.variables_from_tensors(template, tensors, what="the regressor")
