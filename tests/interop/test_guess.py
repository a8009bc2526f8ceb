"""Telling a network from its tensors."""

import re

import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import guess, naming, pytorch


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


def renamed(tensors, *pairs):
  new = {}
  for name, value in tensors.items():
    for old, other in pairs:
      name = name.replace(old, other)
    new[name] = value
  return new


@pytest.mark.parametrize(
  "pairs",
  [
    (("layer", "stage"), ("downsample", "shortcut"), ("fc", "linear")),
    (("fc.", "head.fc."),),
    (("layer", "stage_"), ("bn", "norm"), ("fc.", "head.")),
  ],
)
def test_a_rule_that_renames_is_suggested(pairs, layouts):
  tensors = tensors_of(layouts["resnet20"], 7)
  found = guess.explain(renamed(tensors, *pairs))
  assert "are those of resnet20 with 7 classes" in found
  rule = re.search("--rename '(.*)'", found)[1]
  rule = naming.Names(rename=naming.parse_rename(rule))
  again = naming.strip_prefixes(renamed(tensors, *pairs), rule)
  assert guess.guess_model(again) == ("resnet20", 7)


def test_option_a_and_several_networks_are_recognised(layouts):
  tensors = tensors_of(layouts["resnet32"], 7)
  plain = {k: v for k, v in tensors.items() if "downsample" not in k}
  found = guess.explain(renamed(plain, ("fc.", "linear.")))
  assert re.search("resnet32 with option-A .* not supported yet", found)
  both = {
    f"{p}.{k}": v for p in ("student", "teacher") for k, v in plain.items()
  }
  assert re.search(
    r"student\. \(no .* convert --prefix stud", guess.explain(both)
  )
  both = {f"student.{k}": v for k, v in tensors.items()}
  both["embed.weight"] = np.zeros((3, 2))
  assert re.search(
    r"student\. \(resnet32 with 7 classes\) and embed\. \(no known network\)\."
    r" .* convert --prefix student",
    guess.explain(both),
  )


def test_the_nearest_networks_are_named(layouts):
  tensors = tensors_of(layouts["resnet8x4"], 7)
  tensors["conv1.weight"] = np.zeros((48, 3, 3, 3))
  del tensors["fc.bias"]
  assert re.match(
    r"the nearest networks are resnet8x4: 1 tensors missing \(fc\.bias\), 1 of"
    r" another shape \(conv1\.weight \[48, 3, 3, 3\] instead of \[32, 3, 3, 3\]"
    r"\); resnet\w+: .*; resnet\w+: ",
    guess.explain(tensors),
  )


@pytest.mark.parametrize("text", ["stage", "=layer", "a=b,c", "a=b,"])
def test_rules_that_are_none(text):
  with pytest.raises(ValueError, match=r"expected old=new.*got"):
    naming.parse_rename(text)


def test_nothing_fits():
  assert guess.guess_model({}) is None
  assert guess.guess_model({"fc.bias": np.zeros(())}) is None
  assert guess.count_classes("resnet8", {"linear.bias": np.zeros(3)}) is None
