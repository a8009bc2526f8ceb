"""Telling a network from its tensors."""

import json
import os
import pathlib

import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import guess, naming, pytorch

FOLDER = pathlib.Path(
  os.environ.get("KD_JAX_GOLDEN")
  or pathlib.Path(__file__).resolve().parents[1] / "golden"
)


def _layouts():
  """Network -> names and shapes of a reference toolbox's state dict."""
  layouts = {}
  for path in sorted((FOLDER / "models").glob("*.json")):
    for name, spec in json.loads(path.read_text()).items():
      if spec["image_size"] == 32 and f"{name}_cifar" in models.names():
        name = f"{name}_cifar"
      layouts[name] = spec
  return layouts


LAYOUTS = _layouts()


def _tensors(spec, num_classes):
  """Arrays of a state dict's shapes that take no memory."""
  return {
    name: np.broadcast_to(
      np.float32(0), [num_classes, *shape[1:]] if "fc" in name else shape
    )
    for name, shape in spec["state_dict"]
  }


def test_counts_are_those_of_the_reference():
  assert len(LAYOUTS) >= 35
  for name in LAYOUTS.keys() & guess.TENSOR_COUNTS.keys():
    spec = LAYOUTS[name]
    names = [n for n, _ in spec["state_dict"] if "num_batches" not in n]
    assert guess.TENSOR_COUNTS[name] == len(names), name


@pytest.mark.parametrize("name", sorted(guess.TENSOR_COUNTS.keys() - LAYOUTS))
def test_counts_of_the_other_networks(name):
  (dialect,) = naming.of(name)
  shapes = pytorch.tensor_shapes(name, 7, dialect)
  assert guess.TENSOR_COUNTS[name] == len(shapes)


# One of each group that only shapes tell apart, or whose names are its own.
@pytest.mark.parametrize(
  "name", ["resnet8x4", "wrn_16_2", "ResNet18", "resnext50_32x4d"]
)
@pytest.mark.parametrize("num_classes", [7, 100])
def test_networks_are_recognised(name, num_classes):
  tensors = _tensors(LAYOUTS[name], num_classes)
  found = guess.guess_model(tensors)
  assert found == (name, num_classes)
  assert str(found) == f"{name} with {num_classes} classes"
  assert guess.count_classes(name, tensors) == num_classes
  # With and without the batch counters, but with nothing else.
  few = {k: v for k, v in tensors.items() if "num_batches" not in k}
  assert len(few) < len(tensors)
  assert guess.guess_model(few) == (name, num_classes)
  few.popitem()
  assert guess.guess_model(few) is None


@pytest.mark.parametrize("dialect", naming.of("MobileNetV2_Imagenet"))
def test_dialects_are_recognised(dialect):
  shapes = pytorch.tensor_shapes("MobileNetV2_Imagenet", 5, dialect)
  tensors = {k: np.broadcast_to(0.0, shape) for k, shape in shapes.items()}
  assert guess.guess_model(tensors) == ("MobileNetV2_Imagenet", 5)


def test_a_network_without_a_line_in_the_table(monkeypatch):
  monkeypatch.delitem(guess.TENSOR_COUNTS, "resnet8")
  assert guess.guess_model(_tensors(LAYOUTS["resnet8"], 3)) == ("resnet8", 3)


def test_nothing_fits():
  assert guess.guess_model({}) is None
  assert guess.guess_model({"fc.bias": np.zeros(())}) is None
  assert guess.count_classes("resnet8", {"linear.bias": np.zeros(3)}) is None
  with pytest.raises(ValueError, match="unknown model 'resnet9'"):
    guess.count_classes("resnet9", {})
