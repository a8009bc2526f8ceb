"""Six SGD steps of every method against the reference toolboxes' curves."""

import functools
import json

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import optax
import pytest
from method_cases import Curve

from kd_jax import distillers, models
from kd_jax.interop import pytorch
from kd_jax.training import loss, optim
from kd_jax.training import state as state_lib
from kd_jax.training import step as step_lib

CURVES = [
  (name, curve)
  for name, method in method_cases.methods().items()
  for curve in method.curves
]


@pytest.fixture(scope="module")
def read(golden):
  """read(folder, pair) -> the curves of one pair of networks."""

  @functools.cache
  def read(folder, pair=-1):
    path = sorted((golden / folder).glob("*.json"))[pair]
    return json.loads(path.read_text())

  return read


def term_weights(curves, word, method):
  """(weights of the terms, steps over which they grow)."""
  if "weights_cls_div_beta" in curves:
    ce, kd, own = curves["weights_cls_div_beta"][word]
    return {method: own, "ce": ce, "kd": kd}, {}
  weights = dict(curves["weights"][word])
  ramp = weights.pop("warmup", None)
  weights = {method if n == word else n: w for n, w in weights.items()}
  return weights, {method: ramp} if ramp else {}


def torch_variables(rebuild, name, seed):
  model = models.create(name, 100)
  image = jnp.zeros((1, 32, 32, 3))
  template = jax.eval_shape(model.init, jax.random.key(0), image)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
  tensors = {
    key: value
    if key.endswith("num_batches_tracked")
    else rebuild.fill(key, value.shape, seed=seed)
    for key, value in pytorch.to_state_dict(name, zeros).items()
  }
  return model, pytorch.from_state_dict(name, 100, tensors)


def images(rebuild, name, size, seed):
  x = rebuild.normal(name, (size, 3, 32, 32), seed=seed)
  return x.transpose(0, 2, 3, 1)


def batch_of(curves, rebuild, step, seed):
  crd = curves.get("crd", {"n_data": 64, "k": 8})
  size, n, k = curves["batch"], crd["n_data"], crd["k"]
  index = np.random.default_rng([seed, step]).permutation(n)[:size]
  label = rebuild.integers(f"label{step}", 100, (size,), seed=seed)
  negatives = rebuild.integers(f"negatives{step}", n, (size, k), seed=seed)
  return {
    "image": images(rebuild, f"batch{step}", size, seed),
    "label": label.astype(np.int32),
    "index": index.astype(np.int32),
    "mask": np.ones(size, bool),
    "negatives": negatives.astype(np.int32),
  }


def relative_error(ours, theirs):
  theirs = np.asarray(theirs)
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
  ("method", "curve"),
  [
    pytest.param(
      name,
      curve,
      marks=pytest.mark.full
      if method_cases.method(name).plain or curve.pair != Curve.pair
      else (),
      id=f"{name}-{curve.word}" + "-other" * (curve.pair != Curve.pair),
    )
    for name, curve in CURVES
  ],
)
def test_six_steps(method, curve, read, rebuild, fill_distiller, quick):
  curves = read(curve.folder, curve.pair)
  expected, tolerance = curves["methods"][curve.word], curve.tolerance
  seed = curves["student_seed"]
  student, student_variables = torch_variables(rebuild, curves["student"], seed)
  teacher, frozen = torch_variables(
    rebuild, curves["teacher"], curves["teacher_seed"]
  )
  distiller = distillers.create(method, **curve.fields(curves))
  batches = [batch_of(curves, rebuild, i, seed) for i in range(curves["steps"])]
  views = {}
  if distiller.views > 1:
    views["strong_transform"] = lambda key, batch: batch["strong_image"]
    for i, batch in enumerate(batches):
      batch["strong_image"] = images(
        rebuild, f"batch_strong{i}", curves["batch"], seed
      )

  def given(student_variables, frozen, batch, train):
    x = batch["image"]
    outputs, heads = loss.run_teachers((teacher,), (frozen,), x)
    return {
      "student": student.apply(student_variables, x, train=False),
      "teachers": outputs,
      "batch": batch,
      "teacher_heads": heads,
      "student_head": loss.classifier(student, student_variables),
      **{"step": 0, "epoch": 1, "train": train, "method": "distill"},
    }

  @quick
  def initialize(student_variables, frozen, batch):
    labels = np.arange(64, dtype=np.int32) % 8
    if "crd" in curves:
      labels = np.arange(curves["crd"]["n_data"], dtype=np.int32) % 8
    return loss.init_distiller(
      distiller,
      jax.random.key(0),
      student=student,
      student_variables=student_variables,
      teachers=(teacher,),
      teacher_variables=(frozen,),
      images=batch["image"],
      batch={**batch, "train_labels": labels},
    )

  variables = initialize(student_variables, frozen, batches[0])
  variables, used = fill_distiller(method, variables, curve.prefix, seed)
  params = jax.tree.leaves(variables.get("params", {}))
  assert bool(used) == any(x.ndim for x in params)
  variables = curve.prepare(variables, rebuild, seed)

  weights, ramps = term_weights(curves, curve.word, method)
  weights |= curve.also
  sgd = optim.sgd
  if curve.dot_delta:
    params = {"student": student_variables["params"], "distiller": {}}
    shared = jax.tree.map(lambda _: True, params)
    sgd = functools.partial(optim.dot, delta=curve.dot_delta, shared=shared)
  optimizer = sgd(
    optax.constant_schedule(curves["lr"]),
    momentum=curves["momentum"],
    weight_decay=curves["weight_decay"],
  )
  step = quick(
    step_lib.make_train_step(
      optimizer=optimizer,
      split_ce=bool(curve.dot_delta),
      student=student,
      teachers=(teacher,),
      distiller=distiller,
      loss_weights={name: weight for name, weight in weights.items() if weight},
      steps_per_epoch=1,
      ramp_steps=ramps,
      transform=lambda key, batch: batch["image"],
      **views,
    )
  )
  state = state_lib.create(student_variables, variables, optimizer)
  losses = []
  for batch in batches:
    state, sums = step(state, (frozen,), batch, step_lib.make_seeds(0))
    losses.append(float(sums["loss"] / sums["count"]))
  np.testing.assert_allclose(losses, expected["loss"], rtol=tolerance)
  if "theta" in expected:  # it moves by thousandths
    theta = state.params["distiller"]["theta"]
    np.testing.assert_allclose(1 - theta, 1 - expected["theta"][-1], rtol=1e-3)

  @quick
  def evaluate(state, frozen, batch):
    return distiller.apply(
      state.variables("distiller"),
      **given(state.variables("student"), frozen, batch, False),
    ).logits

  x = images(rebuild, "eval_batch", 8, seed)
  batch = {"image": x, "label": np.zeros(8, np.int32)}
  error = relative_error(
    evaluate(state, frozen, batch), expected["eval_logits"]
  )
  # Rounding flips a ReLU here and there. The reference's own float32 runs
  # stray from its float64 runs; ours may stray three times as far.
  strays = 3 * max(
    read(other.folder, other.pair)["methods"][other.word][
      "float32_rel_eval_error"
    ]
    for _, other in CURVES
    if (other.folder, other.tolerance) == (curve.folder, tolerance)
  )
  assert error < max(tolerance, strays), (error, strays)
  statistics = state.collections["student"]["batch_stats"]["bn1"]
  for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
    error = relative_error(statistics[ours], expected[f"stem_{theirs}"])
    assert error < tolerance, (ours, error)


def test_every_curve_is_compared(read):
  words = {curve.word for _, curve in CURVES if curve.folder == "train"}
  assert set(read("train")["methods"]) == words
