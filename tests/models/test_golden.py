"""Every network of the reference toolboxes, against their numbers."""

import functools
import json
import os
import pathlib
import types

import jax
import numpy as np
import pytest

from kd_jax import models
from kd_jax.interop import pytorch
from kd_jax.models import (
  layers,
  mobilenetv2,
  resnet,
  resnet_cifar,
  shufflenetv1,
  shufflenetv2,
)

FOLDER = pathlib.Path(
  os.environ.get("KD_JAX_GOLDEN")
  or pathlib.Path(__file__).resolve().parents[1] / "golden"
)
# Compiled whole; the others repeat a few shapes so often that running them op
# by op, each compiled once for all of them, takes a fraction of the time.
COMPILED = (
  mobilenetv2.MobileNetV2Classifier,
  resnet.ResNet,
  resnet_cifar.BottleneckResNetCifar,
  shufflenetv1.ShuffleNetV1,
  shufflenetv2.ShuffleNetV2,
)
# Its linear bottlenecks amplify rounding: the reference's stage4 itself is 8e-6
# from the one computed in float64.
FEATURE_TOLERANCE = {"MobileNetV2_Imagenet": 3e-5}


def _has_dropout(name):
  """Whether training logits depend on the toolbox's random numbers."""
  return getattr(models.create(name, 2), "dropout_rate", 0) > 0


def _cases():
  cases = []
  for path in sorted((FOLDER / "models").glob("*.json")):
    for name, spec in json.loads(path.read_text()).items():
      ours = name
      if spec["image_size"] == 32 and f"{name}_cifar" in models.names():
        ours = f"{name}_cifar"
      values = path.with_suffix("") / f"{name}.npz"
      cases.append(pytest.param((ours, spec, values), id=f"{path.stem}-{name}"))
  return sorted(cases, key=lambda case: _has_dropout(case.values[0][0]))


CASES = _cases()
DETERMINISTIC = [c for c in CASES if not _has_dropout(c.values[0][0])]


def _state_dict(spec, rebuild):
  tensors = {}
  for name, shape in spec["state_dict"]:
    if name.endswith("num_batches_tracked"):
      tensors[name] = np.zeros((), np.int64)
    else:
      tensors[name] = rebuild.fill(
        name, shape, seed=spec["seed"], bn_gain=spec["bn_gain"]
      )
  return tensors


def _nhwc(images):
  return images.transpose(0, 2, 3, 1)


def _nchw(feature):
  feature = np.asarray(feature)
  return feature.transpose(0, 3, 1, 2) if feature.ndim == 4 else feature


@functools.cache
def _run(name, fields, rebuild):
  """Both toolboxes hold some networks, with equal weights: run those once."""
  spec = json.loads(fields)
  model = models.create(name, spec["num_classes"])
  variables = pytorch.from_state_dict(
    name, spec["num_classes"], _state_dict(spec, rebuild)
  )
  size, seed = spec["image_size"], spec["seed"]
  images = rebuild.normal("image", (2, 3, size, size), seed=seed)
  train_images = rebuild.normal("image_train", (4, 3, size, size), seed=seed)
  eval_images = images
  if not isinstance(model, COMPILED):
    # As many images as in training, so that both modes share their shapes; an
    # image's logits do not depend on its neighbours in evaluation mode.
    eval_images = np.concatenate([images, train_images[:2]])

  def both(variables, eval_images, train_images):
    evaluated = model.apply(variables, eval_images, train=False)
    trained, state = model.apply(
      variables,
      train_images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.key(0)},
    )
    return evaluated, list(evaluated.features), trained.logits, state

  run = both
  if isinstance(model, COMPILED):
    keys = []

    # Optimising the program would take longer than running it does.
    @functools.partial(
      jax.jit, compiler_options={"xla_backend_optimization_level": 0}
    )
    def compiled(*args):
      evaluated, order, logits, state = both(*args)
      keys[:] = order  # a compiled function returns its dicts sorted
      return evaluated, logits, state

    def run(*args):
      evaluated, logits, state = compiled(*args)
      return evaluated, keys, logits, state

  evaluated, keys, train_logits, state = run(
    variables, _nhwc(eval_images), _nhwc(train_images)
  )
  after_train = pytorch.to_state_dict(name, {**variables, **state})
  params = variables["params"]
  # Only what the tests need, as the largest networks have 100 M parameters.
  return types.SimpleNamespace(
    name=name,
    model=model,
    num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
    head={model.head: params[model.head]},
    keys=keys,
    logits=np.asarray(evaluated.logits)[:2],
    features={k: np.asarray(v)[:2] for k, v in evaluated.features.items()},
    output=evaluated,
    train_logits=np.asarray(train_logits),
    after_train={k: v for k, v in after_train.items() if ".running_" in k},
  )


@pytest.fixture(scope="module", params=CASES)
def case(request, rebuild):
  name, spec, values = request.param
  run = _run(name, json.dumps(spec, sort_keys=True), rebuild)
  with np.load(values) as reference:
    return types.SimpleNamespace(spec=spec, run=run, reference=dict(reference))


def _error(actual, expected):
  """Largest difference, relative to the largest expected value."""
  assert np.shape(actual) == np.shape(expected)
  scale = np.abs(expected).max()
  return np.abs(np.asarray(actual, np.float64) - expected).max() / scale


def _reference_features(run):
  """The reference's list of features: stem, stages, pooled."""
  output = layers.ModelOutputs(run.logits, run.features)
  return [*output.stages(stem=True), run.features["pooled"]]


def test_the_cases_are_those_of_the_golden_folder(golden):
  assert golden == FOLDER
  assert len(CASES) >= 40
  assert len(DETERMINISTIC) == len(CASES) - 1


def test_number_of_parameters(case):
  assert case.run.num_params == case.spec["num_params"]


def test_evaluation_logits(case):
  assert _error(case.run.logits, case.reference["logits"]) < 1e-5


def test_feature_shapes(case):
  shapes = [list(_nchw(f).shape) for f in _reference_features(case.run)]
  assert shapes == case.spec["feature_shapes"]


def test_feature_values(case, rebuild):
  tolerance = FEATURE_TOLERANCE.get(case.run.name, 1e-5)
  for i, feature in enumerate(_reference_features(case.run)):
    probe = rebuild.probe(_nchw(feature))
    assert _error(probe, case.reference[f"feat{i}_probe"]) < tolerance, i
    norm = np.linalg.norm(feature.astype(np.float64))
    assert _error(norm, case.reference[f"feat{i}_norm"]) < 1e-5, i


@pytest.mark.parametrize("case", DETERMINISTIC, indirect=True)
def test_training_logits(case):
  assert _error(case.run.train_logits, case.reference["train_logits"]) < 1e-4


def test_running_statistics_after_a_training_step(case):
  updated = [k for k in case.reference if k.startswith("after_train/")]
  assert len(updated) == 4
  for key in updated:
    tensor = case.run.after_train[key.removeprefix("after_train/")]
    assert _error(tensor, case.reference[key]) < 5e-5, key


def test_features_come_in_forward_order(case):
  stages = len(case.spec["feature_shapes"]) - 2
  maps = ["stem", *(f"stage{i + 1}" for i in range(stages))]
  keys = case.run.keys
  assert [k for k in keys if not k.endswith("_preact")] == [
    *maps,
    "last",
    "pooled",
  ]
  preacts = [k for k in keys if k.endswith("_preact")]
  assert preacts == [f"{k}_preact" for k in maps][: len(preacts)]


def test_the_classifier_reads_the_pool_of_the_last_map(case):
  run, output = case.run, case.run.output
  last, pooled = output.features["last"], output.features["pooled"]
  assert np.asarray(last).min() >= 0
  np.testing.assert_allclose(
    layers.global_average_pool(last), pooled, rtol=1e-5, atol=1e-6
  )
  logits = run.model.classify(run.head, pooled)
  assert _error(logits, np.asarray(output.logits)) < 1e-6


def test_a_changed_weight_is_noticed(golden, rebuild):
  """The tolerance of the parity tests is tight enough to see 0.1 %."""
  specs = json.loads((golden / "models" / "repdistiller.json").read_text())
  spec = specs["resnet8"]
  tensors = _state_dict(spec, rebuild)
  tensors["layer2.0.bn1.weight"] = tensors["layer2.0.bn1.weight"] * 1.001
  variables = pytorch.from_state_dict("resnet8", spec["num_classes"], tensors)
  size = spec["image_size"]
  images = rebuild.normal("image", (2, 3, size, size), seed=spec["seed"])
  model = models.create("resnet8", spec["num_classes"])
  output = model.apply(variables, _nhwc(images), train=False)
  path = golden / "models" / "repdistiller" / "resnet8.npz"
  with np.load(path) as reference:
    assert _error(np.asarray(output.logits), reference["logits"]) > 1e-5
