"""The names that toolboxes give to the networks' tensors."""

import functools
import json

import jax
import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import naming, pytorch

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# timm's mobilenetv2_100: layers of its blocks, in forward order.
TIMM_FIRST = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
TIMM_OTHERS = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))


def _pair(prefix, pair):
  conv, norm = pair
  yield f"{prefix}{conv}.weight"
  yield from (f"{prefix}{norm}.{leaf}" for leaf in NORM)


def _timm_mobilenetv2_100():
  """All names of the checkpoint, in its order."""
  names = [*_pair("", ("conv_stem", "bn1"))]
  for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
    for block in range(blocks):
      for pair in TIMM_OTHERS if stage else TIMM_FIRST:
        names += _pair(f"blocks.{stage}.{block}.", pair)
  names += _pair("", ("conv_head", "bn2"))
  return [*names, "classifier.weight", "classifier.bias"]


def _resnet(blocks, convs):
  """All names of a checkpoint of torchvision's and timm's ResNets."""
  names = [*_pair("", ("conv1", "bn1"))]
  for stage, count in enumerate(blocks, start=1):
    for block in range(count):
      prefix = f"layer{stage}.{block}."
      for i in range(1, convs + 1):
        names += _pair(prefix, (f"conv{i}", f"bn{i}"))
      if block == 0 and (stage > 1 or convs == 3):
        names += _pair(f"{prefix}downsample.", ("0", "1"))
  return {*names, "fc.weight", "fc.bias"}


def _tensors(spec):
  """Small integers, different in every tensor."""
  return {
    name: np.zeros((), np.int64)
    if name.endswith("num_batches_tracked")
    else np.full(shape, i, np.float32)
    for i, (name, shape) in enumerate(spec["state_dict"])
  }


@pytest.fixture(scope="module")
def specs(golden):
  return json.loads((golden / "models" / "simkd.json").read_text())


@pytest.fixture(scope="module")
def mobilenetv2(specs):
  """The same weights under torchvision's names and under timm's."""
  theirs = _tensors(specs["MobileNetV2_Imagenet"])
  # Both toolboxes list their layers in forward order.
  timm = dict(zip(_timm_mobilenetv2_100(), theirs.values(), strict=True))
  return theirs, timm


def test_mechanical_names():
  assert naming.module_name(("layer1_0", "bn1")) == "layer1.0.bn1"
  assert naming.module_name(()) == ""


def test_timm_names_of_mobilenetv2():
  names = _timm_mobilenetv2_100()
  assert len(names) == len(set(names)) == 314
  assert {
    "conv_stem.weight",
    "blocks.0.0.conv_dw.weight",
    "blocks.0.0.bn2.running_var",
    "blocks.1.1.conv_pwl.weight",
    "blocks.6.0.bn3.bias",
    "conv_head.weight",
    "bn2.running_mean",
    "classifier.bias",
  } < set(names)


def test_timm_and_torchvision_checkpoints_give_equal_variables(mobilenetv2):
  read = functools.partial(
    pytorch.from_state_dict, "MobileNetV2_Imagenet", 1000
  )
  torchvision, timm = (read(tensors) for tensors in mobilenetv2)
  assert jax.tree.structure(torchvision) == jax.tree.structure(timm)
  jax.tree.map(np.testing.assert_array_equal, torchvision, timm)
  # It is written as torchvision and SimKD do, wherever it comes from.
  written = pytorch.to_state_dict("MobileNetV2_Imagenet", timm)
  assert written.keys() == mobilenetv2[0].keys()
  for name, tensor in mobilenetv2[0].items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_any_dialect_can_be_written(mobilenetv2):
  theirs, timm = mobilenetv2
  variables = pytorch.from_state_dict("MobileNetV2_Imagenet", 1000, theirs)
  _, dialect = naming.of("MobileNetV2_Imagenet")
  assert dialect.toolboxes == "timm"
  written = pytorch.tensors_from_variables(variables, rename=dialect.rename)
  assert written.keys() == timm.keys()
  np.testing.assert_array_equal(
    written["blocks.3.2.conv_dw.weight"], timm["blocks.3.2.conv_dw.weight"]
  )


def test_a_misfit_is_reported_in_the_names_of_the_file(mobilenetv2):
  _, timm = mobilenetv2
  timm = {k: v for k, v in timm.items() if k != "blocks.2.1.conv_dw.weight"}
  with pytest.raises(ValueError, match="MobileNetV2_Imagenet with 10") as e:
    pytorch.from_state_dict("MobileNetV2_Imagenet", 10, timm)
  message = str(e.value)
  assert "Missing (1): blocks.2.1.conv_dw.weight." in message
  assert "classifier.weight (expected [10, 1280], got [1000, 1280])" in message
  assert "Unexpected" not in message


def test_a_foreign_file_is_reported_in_the_first_dialect():
  with pytest.raises(ValueError, match=r"Missing \(262\): classifier\.1\.bias"):
    pytorch.from_state_dict("MobileNetV2_Imagenet", 10, {})


def test_exporting_another_models_variables():
  foreign = {"params": {"linear": {"bias": np.zeros(3, np.float32)}}}
  with pytest.raises(ValueError, match=r"fit ShuffleV2_Imagenet .*Missing"):
    pytorch.to_state_dict("ShuffleV2_Imagenet", foreign)


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
  model = models.create(name, 10)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  # Shapes suffice; broadcasting makes arrays that take no memory.
  variables = jax.tree.map(
    lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes
  )
  written = pytorch.to_state_dict(name, variables)
  assert written.keys() == _resnet(blocks, convs)


def test_torchvision_names_of_shufflenetv2():
  (dialect,) = naming.of("ShuffleV2_Imagenet")
  rename = dialect.rename
  assert rename(("conv1",)) == "conv1.0"
  assert rename(("layer1_0", "conv2")) == "stage2.0.branch1.2"
  assert rename(("layer2_0", "bn5")) == "stage3.0.branch2.6"
  assert rename(("layer3_3", "conv2")) == "stage4.3.branch2.3"
  assert rename(("bn2",)) == "conv5.1"
  assert rename(("linear",)) == "fc"


@pytest.mark.parametrize("name", ["MobileNetV2_Imagenet", "ShuffleV2_Imagenet"])
def test_tables_rename_every_layer_to_another(name):
  layers = {
    pytorch.module_name(tuple(key.key for key in path[1:-1]))
    for path, _ in jax.tree_util.tree_leaves_with_path(
      jax.eval_shape(
        models.create(name, 3).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32),
      )
    )
  }
  for dialect in naming.of(name):
    assert dialect.table.keys() == layers
    assert len(set(dialect.table.values())) == len(layers)
