"""Every network of the reference toolboxes, against their numbers.

Names, shapes, dtypes and values of the smallest member of each family, and of
all with `pytest -m full`.
"""

import flax.traverse_util
import golden_models
import jax
import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import pytorch
from kd_jax.models import base

# Its linear bottlenecks amplify rounding: the reference's stage4 itself is 8e-6
# from the one computed in float64.
FEATURE_TOLERANCE = {"MobileNetV2_Imagenet": 3e-5}
SUFFIXES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def _cases():
  cases = [
    (f"{values.parent.name}-{values.stem}", name, spec, values)
    for values, name, spec in golden_models.networks()
  ]
  smallest = {}
  for case in sorted(cases, key=lambda case: case[2]["num_params"]):
    _, name, spec, _ = case
    family = type(models.create(name, 2)), spec["image_size"]
    smallest.setdefault(family, case)
  return cases, list(smallest.values())


CASES, SMALLEST = _cases()


EACH = pytest.mark.parametrize(
  ("name", "spec", "values"),
  [
    pytest.param(
      *case[1:],
      id=case[0],
      marks=() if case in SMALLEST else pytest.mark.full,
    )
    for case in CASES
  ],
)


def _state_dict(spec, rebuild):
  return {
    name: np.zeros((), np.int64)
    if name.endswith("num_batches_tracked")
    else rebuild.fill(name, shape, seed=spec["seed"], bn_gain=spec["bn_gain"])
    for name, shape in spec["state_dict"]
  }


def _images(rebuild, spec, name, count):
  size = spec["image_size"]
  images = rebuild.normal(name, (count, 3, size, size), seed=spec["seed"])
  return images.transpose(0, 2, 3, 1)


def _nchw(feature):
  feature = np.asarray(feature)
  return feature.transpose(0, 3, 1, 2) if feature.ndim == 4 else feature


def _error(actual, expected):
  """Largest difference, relative to the largest expected value."""
  assert np.shape(actual) == np.shape(expected)
  scale = np.abs(expected).max()
  return np.abs(np.asarray(actual, np.float64) - expected).max() / scale


def test_the_cases_are_those_of_the_golden_folder(golden):
  assert golden == golden_models.FOLDER
  assert len(CASES) >= 40 and len(SMALLEST) >= 10


@EACH
def test_names_shapes_and_dtypes(name, spec, values):
  assert values.exists()
  model = models.create(name, spec["num_classes"], dtype="bfloat16")
  order = []

  def init(key, images):
    output, variables = model.init_with_output(key, images, train=True)
    order.extend(output.features)
    return output, variables

  size = spec["image_size"]
  assert size == models.entry(name).image_size
  images = jax.ShapeDtypeStruct((2, size, size, 3), "float32")
  output, variables = jax.eval_shape(init, jax.random.key(0), images)
  assert base.count_parameters(variables["params"]) == spec["num_params"]
  rename = models.entry(name).weight_names[0].rename
  shapes = {}
  for (_, *path, kind), leaf in flax.traverse_util.flatten_dict(
    variables
  ).items():
    assert leaf.dtype == "float32"
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
    shape = [leaf.shape[i] for i in axes]
    shapes[f"{rename(path)}.{SUFFIXES[kind]}"] = shape
  assert shapes == {
    name: shape
    for name, shape in spec["state_dict"]
    if "num_batches" not in name
  }
  features = {**output.features}
  assert output.logits.dtype == features.pop("pooled").dtype == "float32"
  assert {x.dtype.name for x in features.values()} == {"bfloat16"}
  # The reference's list: stem, stages, pooled.
  stages = len(spec["feature_shapes"]) - 2
  maps = ["stem", *(f"stage{i + 1}" for i in range(stages))]
  for key, (_, *shape) in zip([*maps, "pooled"], spec["feature_shapes"]):
    _, *got = output.features[key].shape
    assert [*got[-1:], *got[:-1]] == shape, key
  ends = ["last", "pooled"]
  assert [k for k in order if not k.endswith("_preact")] == [*maps, *ends]
  preacts = [k for k in order if k.endswith("_preact")]
  assert preacts == [f"{k}_preact" for k in maps][: len(preacts)]


@EACH
def test_values(name, spec, values, rebuild):
  model = models.create(name, spec["num_classes"])
  variables = pytorch.from_state_dict(
    name, spec["num_classes"], _state_dict(spec, rebuild)
  )

  @jax.jit
  def run(variables, images, train_images):
    evaluated = model.apply(variables, images, train=False)
    trained, state = model.apply(
      variables,
      train_images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.key(0)},
    )
    return evaluated, trained.logits, state

  evaluated, train_logits, state = run(
    variables,
    _images(rebuild, spec, "image", 2),
    _images(rebuild, spec, "image_train", 4),
  )
  with np.load(values) as file:
    arrays = dict(file)
  assert _error(evaluated.logits, arrays["logits"]) < 1e-5
  tolerance = FEATURE_TOLERANCE.get(name, 1e-5)
  features = [*evaluated.stages(stem=True), evaluated.features["pooled"]]
  for i, feature in enumerate(features):
    probe = rebuild.probe(_nchw(feature))
    assert _error(probe, arrays[f"feat{i}_probe"]) < tolerance, i
    norm = np.linalg.norm(np.asarray(feature, np.float64))
    assert _error(norm, arrays[f"feat{i}_norm"]) < 1e-5, i
  if not getattr(model, "dropout_rate", 0):  # else random
    assert _error(train_logits, arrays["train_logits"]) < 1e-4
  after_train = pytorch.to_state_dict(name, {**variables, **state})
  updated = [k for k in arrays if k.startswith("after_train/")]
  assert len(updated) == 4
  for key in updated:
    tensor = after_train[key.removeprefix("after_train/")]
    assert _error(tensor, arrays[key]) < 5e-5, key
