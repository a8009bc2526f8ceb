"""Telling a network from its tensors."""

import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import guess, pytorch


def tensors_of(spec, num_classes):
  """Arrays of a state dict's shapes that take no memory."""
  return {
    name: np.broadcast_to(
      np.float32(0), [num_classes, *shape[1:]] if "fc" in name else shape
    )
    for name, shape in spec["state_dict"]
  }


@pytest.mark.parametrize("name", models.names())
def test_the_table_of_counts(name, layouts):
  if name in layouts:
    names = [n for n, _ in layouts[name]["state_dict"]]
    count = len([n for n in names if "num_batches" not in n])
  else:
    count = len(
      pytorch.tensor_shapes(name, 7, models.entry(name).weight_names[0])
    )
  assert guess.TENSOR_COUNTS.get(name, count) == count


# One of each group that only shapes tell apart, or whose names are its own.
@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "resnext50_32x4d"])
def test_networks_are_recognised(name, layouts):
  tensors = tensors_of(layouts[name], 7)
  found = guess.guess_model(tensors)
  assert found == (name, 7)
  assert str(found) == f"{name} with 7 classes"
  # With and without the batch counters, but with nothing else.
  few = {k: v for k, v in tensors.items() if "num_batches" not in k}
  assert guess.guess_model(few) == (name, 7)
  few.popitem()
  assert guess.guess_model(few) is None


@pytest.mark.parametrize(
  "mapping", models.entry("MobileNetV2_Imagenet").weight_names
)
def test_every_toolboxes_names_are_recognised(mapping):
  shapes = pytorch.tensor_shapes("MobileNetV2_Imagenet", 5, mapping)
  tensors = {k: np.broadcast_to(0.0, shape) for k, shape in shapes.items()}
  assert guess.guess_model(tensors) == ("MobileNetV2_Imagenet", 5)


def test_a_network_that_is_not_in_the_table(layouts, monkeypatch):
  monkeypatch.delitem(guess.TENSOR_COUNTS, "resnet8")
  assert guess.guess_model(tensors_of(layouts["resnet8"], 3)) == ("resnet8", 3)


def test_nothing_fits():
  assert guess.guess_model({}) is None
  assert guess.guess_model({"fc.bias": np.zeros(())}) is None
  assert guess.count_classes("resnet8", {"linear.bias": np.zeros(3)}) is None
