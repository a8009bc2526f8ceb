"""The names that toolboxes give to the networks' tensors."""

import jax
import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import model as model_lib
from kd_jax.interop import pytorch
from kd_jax.models.entry import module_name

MOBILENET = "MobileNetV2_Imagenet"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# timm's mobilenetv2_100: layers of its blocks, in forward order.
TIMM_FIRST = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
TIMM_OTHERS = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))


def pair(prefix, conv, norm):
  yield f"{prefix}{conv}.weight"
  yield from (f"{prefix}{norm}.{leaf}" for leaf in NORM)


def timm_mobilenetv2():
  """All names of timm's checkpoint, in its order."""
  names = [*pair("", "conv_stem", "bn1")]
  for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
    for block in range(blocks):
      for layers in TIMM_OTHERS if stage else TIMM_FIRST:
        names += pair(f"blocks.{stage}.{block}.", *layers)
  names += pair("", "conv_head", "bn2")
  return [*names, "classifier.weight", "classifier.bias"]


def resnet(blocks, convs):
  """All names of a checkpoint of torchvision's and timm's ResNets."""
  names = [*pair("", "conv1", "bn1")]
  for stage, count in enumerate(blocks, start=1):
    for block in range(count):
      prefix = f"layer{stage}.{block}."
      for i in range(1, convs + 1):
        names += pair(prefix, f"conv{i}", f"bn{i}")
      if block == 0 and (stage > 1 or convs == 3):
        names += pair(f"{prefix}downsample.", "0", "1")
  return {*names, "fc.weight", "fc.bias"}


@pytest.fixture(scope="module")
def mobilenetv2(layouts):
  """The same weights under torchvision's names and under timm's."""
  theirs = {
    name: np.zeros((), np.int64)
    if name.endswith("num_batches_tracked")
    else np.full(shape, i, np.float32)
    for i, (name, shape) in enumerate(layouts[MOBILENET]["state_dict"])
  }
  # Both toolboxes list their layers in forward order.
  return theirs, dict(zip(timm_mobilenetv2(), theirs.values(), strict=True))


def test_mechanical_names():
  assert module_name(("layer1_0", "bn1")) == "layer1.0.bn1"
  assert module_name(()) == ""


def test_timm_and_torchvision_give_equal_variables(mobilenetv2, assert_same):
  torchvision, timm = (
    pytorch.from_state_dict(MOBILENET, 1000, t) for t in mobilenetv2
  )
  assert jax.tree.structure(torchvision) == jax.tree.structure(timm)
  jax.tree.map(np.testing.assert_array_equal, torchvision, timm)
  # It is written as torchvision and SimKD do, wherever it comes from.
  assert_same(pytorch.to_state_dict(MOBILENET, timm), mobilenetv2[0])
  _, mapping = models.entry(MOBILENET).weight_names
  assert mapping.toolboxes == "timm"
  written = pytorch.tensors_from_variables(timm, rename=mapping.rename)
  assert_same(written, mobilenetv2[1])


def test_a_misfit_is_reported_in_the_names_of_the_file(mobilenetv2):
  timm = {k: v for k, v in mobilenetv2[1].items()
          if k != "blocks.2.1.conv_dw.weight"}  # fmt: skip
  with pytest.raises(ValueError, match=f"{MOBILENET} with 10") as e:
    pytorch.from_state_dict(MOBILENET, 10, timm)
  message = str(e.value)
  assert "Missing (1): blocks.2.1.conv_dw.weight." in message
  assert "classifier.weight (expected [10, 1280], got [1000, 1280])" in message
  assert "Unexpected" not in message
  with pytest.raises(ValueError, match=r"Missing \(262\): classifier\.1\.bias"):
    pytorch.from_state_dict(MOBILENET, 10, {})


@pytest.mark.parametrize(
  ("name", "blocks", "convs"),
  [
    ("ResNet18", (2, 2, 2, 2), 2),
    ("ResNet34", (3, 4, 6, 3), 2),
    ("ResNet50", (3, 4, 6, 3), 3),
    ("resnext50_32x4d", (3, 4, 6, 3), 3),
    ("wrn_50_2", (3, 4, 6, 3), 3),
  ],
)
def test_torchvision_and_timm_names_of_resnets(name, blocks, convs):
  (mapping,) = models.entry(name).weight_names
  counters = {n for n in resnet(blocks, convs) if n.endswith(NORM[-1])}
  shapes = pytorch.tensor_shapes(name, 10, mapping)
  assert shapes.keys() | counters == resnet(blocks, convs)


@pytest.mark.parametrize("name", [MOBILENET, "ShuffleV2_Imagenet"])
def test_tables_rename_every_layer_to_another(name):
  shapes = model_lib.variable_shapes(models.create(name, 3), (32, 32, 3))
  layers = {
    module_name(tuple(key.key for key in path[1:-1]))
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
  }
  for mapping in models.entry(name).weight_names:
    assert mapping.table.keys() == layers
    assert len(set(mapping.table.values())) == len(layers)
