"""Networks that nobody has trained, and other toolboxes' checkpoints."""

import json

import golden_models
import jax
import numpy as np
import pytest
import torch

from kd_jax import models
from kd_jax.interop import model as model_lib
from kd_jax.interop import pytorch


def _layouts():
  """Each distinct checkpoint layout of the reference toolboxes, once."""
  cases = {}
  for _, name, spec in golden_models.networks():
    cases[name, json.dumps(spec["state_dict"])] = {"name": name, **spec}
  return list(cases.values())


LAYOUTS = _layouts()
assert len(LAYOUTS) >= 35


def pytest_generate_tests(metafunc):
  """`layout`: each checkpoint layout, {"name", "num_classes", ...}."""
  if "layout" in metafunc.fixturenames:
    names = [spec["name"] for spec in LAYOUTS]
    metafunc.parametrize("layout", LAYOUTS, ids=names)


@pytest.fixture(scope="session")
def layouts():
  """Network -> layout."""
  return {spec["name"]: spec for spec in LAYOUTS}


def _draw(network, image_size=32, seed=0):
  """Variables of a network with logits of about one."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    x = rng.standard_normal(leaf.shape, np.float32)
    if path[-1].key in ("var", "scale"):
      return np.abs(x) / 5 + np.float32(0.8)
    if path[-1].key == "kernel":
      return x * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
    return x / 8

  shapes = model_lib.variable_shapes(network, (image_size, image_size, 3))
  return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="session")
def draw():
  """draw(network, image_size, seed) -> variables, without compiling."""
  return _draw


@pytest.fixture(scope="session")
def tensors():
  """The state dict of a tiny network of five classes."""
  return pytorch.to_state_dict("_tiny", _draw(models.create("_tiny", 5)))


def _assert_same(got, expected):
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    assert got[name].dtype == array.dtype, name
    assert got[name].shape == array.shape, name
    np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.fixture(scope="session")
def assert_same():
  """assert_same(got, expected): dicts of equal arrays, dtypes included."""
  return _assert_same


def _torch_projector(inputs, channels, factor):
  """SimKD's projector as its loop builds it: published layers, in order."""
  torch.manual_seed(0)
  middle, layers = channels // factor, []
  for a, b, kernel in (
    (inputs, middle, 1),
    (middle, middle, 3),
    (middle, channels, 1),
  ):
    norm = torch.nn.BatchNorm2d(b)
    with torch.no_grad():
      for tensor in (norm.running_mean, norm.bias):
        tensor.uniform_(-0.1, 0.1)
      for tensor in (norm.running_var, norm.weight):
        tensor.uniform_(0.8, 1.2)
    conv = torch.nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False)
    layers += [conv, norm, torch.nn.ReLU()]
  module = torch.nn.Module()
  module.transfer = torch.nn.Sequential(*layers)
  return module.eval()


@pytest.fixture(scope="session")
def torch_projector():
  """torch_projector(inputs, channels, factor) -> the module."""
  return _torch_projector
