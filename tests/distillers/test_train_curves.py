"""Six SGD steps of every method against the reference toolboxes' curves."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import optax
import pytest
from method_cases import Curve

from kd_jax import distillers, models
from kd_jax.distillers import base
from kd_jax.interop import pytorch
from kd_jax.training import loss, optim
from kd_jax.training import state as state_lib
from kd_jax.training import step as step_lib

SEEDS = step_lib.make_seeds(0)
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


class Networks(NamedTuple):
  """The pair of a folder's curves, and what no method changes.

  Attributes:
    student: network.
    student_variables: as the toolbox starts.
    student_output: its shapes.
    teacher: network.
    frozen: its variables.
    batches: of each step, with the teacher's outputs.
    predict: (student's variables, images) -> logits in evaluation mode.
  """

  student: models.Classifier
  student_variables: Any
  student_output: Any
  teacher: models.Classifier
  frozen: Any
  batches: list[dict[str, Any]]
  predict: Callable[..., jax.Array]


@pytest.fixture(scope="module")
def networks(read, rebuild):
  """networks(folder, pair) -> its `Networks`, compiled for all methods."""

  @functools.cache
  def make(folder, pair):
    curves = read(folder, pair)
    seed = curves["student_seed"]
    student, variables = torch_variables(rebuild, curves["student"], seed)
    teacher, frozen = torch_variables(
      rebuild, curves["teacher"], curves["teacher_seed"]
    )
    precompute = jax.jit(
      loss.make_precompute_teacher(teachers=(teacher,), transform=as_it_is)
    )
    batches = [
      precompute((frozen,), batch_of(curves, rebuild, i, seed), 0, SEEDS)
      for i in range(curves["steps"])
    ]
    output = jax.eval_shape(
      lambda v, x: student.apply(v, x, train=False),
      *(variables, batches[0]["image"]),
    )
    predict = jax.jit(lambda v, x: student.apply(v, x, train=False).logits)
    return Networks(
      *(student, variables, output, teacher, frozen, batches, predict)
    )

  return make


def as_it_is(key, batch):
  return batch["image"]


def relative_error(ours, theirs):
  theirs = np.asarray(theirs)
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
  ("method", "curve"),
  [
    pytest.param(
      name,
      curve,
      marks=() if curve.word in ("dot", "crd", "simkd") else pytest.mark.full,
      id=f"{name}-{curve.word}" + "-other" * (curve.pair != Curve.pair),
    )
    for name, curve in CURVES
  ],
)
def test_six_steps(method, curve, read, networks, rebuild, fill_distiller):
  curves = read(curve.folder, curve.pair)
  expected, tolerance = curves["methods"][curve.word], curve.tolerance
  seed = curves["student_seed"]
  student, student_variables, student_output, *fixed = networks(
    curve.folder, curve.pair
  )
  teacher, frozen, batches, predict = fixed
  distiller = distillers.create(method, **curve.fields(curves))
  first, views = batches[0], {}
  if distiller.views > 1:
    views["strong_transform"] = lambda key, batch: batch["strong_image"]
    batches = [
      {
        **batch_of(curves, rebuild, i, seed),
        "strong_image": images(rebuild, f"batch_strong{i}", size, seed),
      }
      for i, size in enumerate([curves["batch"]] * curves["steps"])
    ]

  def given(output, teacher_outputs, batch, train):
    return {
      "student": output,
      "teachers": teacher_outputs,
      "batch": batch,
      "teacher_heads": loss.teacher_heads((teacher,), (frozen,)),
      "student_head": loss.classifier(student, student_variables),
      **{"step": 0, "epoch": 1, "train": train, "method": "distill"},
    }

  def initialize(student_output):
    batch = dict(first)
    labels = np.arange(64, dtype=np.int32) % 8
    if "crd" in curves:
      labels = np.arange(curves["crd"]["n_data"], dtype=np.int32) % 8
    batch["train_labels"] = labels
    outputs = batch.pop("teacher_outputs")
    if distiller.views > 1:
      batch |= {"strong_student": student_output, "strong_teachers": outputs}
    return distiller.init(
      jax.random.key(0), **given(student_output, outputs, batch, True)
    )

  variables = jax.eval_shape(initialize, student_output)
  if "memory" in variables:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), student_output)
    memory = jax.jit(lambda output: initialize(output)["memory"])(zeros)
    variables = {**variables, "memory": memory}
  if constants := distiller.teacher_constants((teacher,), (frozen,)):
    variables = {**variables, base.CONSTANTS: constants}
  variables, used = fill_distiller(method, variables, curve.prefix, seed)
  params = jax.tree.leaves(variables.get("params", {}))
  assert bool(used) == any(x.ndim for x in params)
  variables = curve.prepare(variables, rebuild, seed)

  def train(state, weights, ramps, rate, batches, reached=None):
    sgd = optim.sgd
    if curve.dot_delta:
      params = {"student": student_variables["params"], "distiller": {}}
      shared = jax.tree.map(lambda _: True, params)
      sgd = functools.partial(optim.dot, delta=curve.dot_delta, shared=shared)
    optimizer = sgd(
      optax.constant_schedule(rate),
      momentum=curves["momentum"],
      weight_decay=curves["weight_decay"],
      decay_mask=reached,
    )
    step = jax.jit(
      step_lib.make_train_step(
        optimizer=optimizer,
        split_ce=bool(curve.dot_delta),
        ramp_steps=ramps,
        idle=optim.idle_parts(reached or {}),
        **loss_arguments(weights),
      )
    )
    state = state_lib.create(*state, optimizer)  # whose momentum is fresh
    losses = []
    for batch in batches:
      state, sums = step(state, (frozen,), batch, SEEDS)
      losses.append(float(sums["loss"] / sums["count"]))
    return state, losses

  def loss_arguments(weights):
    return {
      "student": student,
      "teachers": (teacher,),
      "distiller": distiller,
      "loss_weights": {name: w for name, w in weights.items() if w},
      "steps_per_epoch": 1,
      "transform": as_it_is,
      **views,
    }

  def reached(state, weights):
    """What a stage trains; the other methods train everything."""
    params, rest = zip(*map(state_lib.split_params, state), strict=True)
    parts = ("student", "distiller")
    return optim.parameter_uses(
      loss.make_loss_fn(**loss_arguments(weights)),
      *(dict(zip(parts, params)), dict(zip(parts, rest)), (frozen,)),
      *(batches[0], jnp.zeros((), jnp.int32), SEEDS),
    ).reached

  weights, ramps = term_weights(curves, curve.word, method)
  weights |= curve.also
  state, mask = (student_variables, variables), None
  if curve.init:
    firsts = [
      {
        **batch_of(curves, rebuild, i, seed),
        "image": images(rebuild, f"init_batch{i}", size, seed),
      }
      for i, size in enumerate([curves["batch"]] * curves["steps"])
    ]
    made, losses = train(
      *(state, curve.init, {}, curves["init_lr"][curve.word], firsts),
      reached(state, curve.init),
    )
    np.testing.assert_allclose(losses, expected["init_loss"], rtol=tolerance)
    state = made.variables("student"), made.variables("distiller")
    mask = reached(state, weights)
  state, losses = train(state, weights, ramps, curves["lr"], batches, mask)
  np.testing.assert_allclose(losses, expected["loss"], rtol=tolerance)
  if "theta" in expected:  # it moves by thousandths
    theta = state.params["distiller"]["theta"]
    np.testing.assert_allclose(1 - theta, 1 - expected["theta"][-1], rtol=1e-3)

  @jax.jit
  def evaluate(state, x):
    outputs, _ = loss.run_teachers((teacher,), (frozen,), x)
    output = student.apply(state.variables("student"), x, train=False)
    batch = {"label": jnp.zeros(len(x), jnp.int32)}
    return distiller.apply(
      state.variables("distiller"), **given(output, outputs, batch, False)
    ).logits

  x = images(rebuild, "eval_batch", 8, seed)
  if distiller.predicts_with_teacher_head:
    logits = evaluate(state, x)
  else:
    logits = predict(state.variables("student"), x)
  error = relative_error(logits, expected["eval_logits"])
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
