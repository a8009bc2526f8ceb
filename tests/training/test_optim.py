"""Schedules at their boundaries; SGD against PyTorch's rule in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.training import optim

STEPS = 7  # in an epoch


def make(schedule, **settings):
  settings = {
    "epochs": 240,
    "steps_per_epoch": STEPS,
    "milestones": (150, 180, 210),
    **settings,
  }
  made = optim.learning_rate_schedule(0.05, schedule=schedule, **settings)
  return lambda step: float(made(step))


@pytest.mark.parametrize(
  ("epoch", "before", "after"),
  [(150, 0.05, 0.005), (180, 5e-3, 5e-4), (210, 5e-4, 5e-5)],
)
def test_rate_drops_when_the_epoch_exceeds_the_milestone(epoch, before, after):
  rate = make("step")
  last, first = epoch * STEPS - 1, epoch * STEPS  # of epochs 150 and 151
  assert rate(last) == pytest.approx(before, rel=1e-6)
  assert rate(first) == pytest.approx(after, rel=1e-6)


def test_rate_is_constant_between_milestones():
  rate = make("step")
  assert {rate(s) for s in (0, 1, 149 * STEPS)} == {rate(0)}
  assert rate(0) == pytest.approx(0.05)
  assert rate(240 * STEPS - 1) == pytest.approx(5e-5)


def test_decay_rate():
  rate = make("step", decay_rate=0.5)
  assert rate(150 * STEPS) == pytest.approx(0.025)


def test_two_milestones_at_one_step_both_count():
  rate = make("step", milestones=(150, 150))
  assert rate(150 * STEPS) == pytest.approx(0.0005)
  rate = make("step", milestones=(1, 2), warmup_epochs=3)
  assert rate(3 * STEPS) == pytest.approx(0.0005)


def test_warm_up_is_linear_from_zero_and_milestones_stay():
  rate = make("step", warmup_epochs=2.0)
  warmup = 2 * STEPS
  for step in range(warmup):
    assert rate(step) == pytest.approx(0.05 * step / warmup, abs=1e-8)
  assert rate(warmup) == pytest.approx(0.05)
  assert rate(150 * STEPS - 1) == pytest.approx(0.05)
  assert rate(150 * STEPS) == pytest.approx(0.005)


def test_warm_up_of_a_part_of_an_epoch():
  rate = make("constant", warmup_epochs=3 / STEPS)
  assert [rate(s) for s in range(5)] == pytest.approx(
    [0, 0.05 / 3, 0.1 / 3, 0.05, 0.05]
  )


def test_cosine():
  rate = make("cosine", epochs=10)
  total = 10 * STEPS
  for step in range(total + 1):
    expected = 0.05 * (1 + np.cos(np.pi * step / total)) / 2
    assert rate(step) == pytest.approx(expected, abs=1e-8)
  assert rate(total) == 0
  assert rate(total - 1) > 0


def test_cosine_after_warm_up_ends_at_zero():
  rate = make("cosine", epochs=10, warmup_epochs=2.0)
  assert rate(0) == 0
  assert rate(2 * STEPS) == pytest.approx(0.05)
  assert rate(6 * STEPS) == pytest.approx(0.025)
  assert rate(10 * STEPS) == 0


def test_constant_ignores_milestones():
  rate = make("constant")
  assert {rate(s) for s in (0, 150 * STEPS, 240 * STEPS)} == {rate(0)}
  assert rate(0) == pytest.approx(0.05)


def test_unknown_schedule():
  with pytest.raises(
    ValueError,
    match=r"config\.optim\.schedule: expected one of 'step', 'cosine',"
    " 'constant', got 'steps'",
  ):
    make("steps")


def torch_sgd(p, gradients, rates, *, momentum, nesterov, weight_decay):
  """torch.optim.SGD, float64: the first velocity is the gradient itself."""
  p, velocity = p.astype(np.float64), None
  for g, rate in zip(gradients, rates, strict=True):
    d = g.astype(np.float64) + weight_decay * p
    velocity = d.copy() if velocity is None else momentum * velocity + d
    p = p - rate * (d + momentum * velocity if nesterov else velocity)
  return p


def run(optimizer, params, gradients):
  state = optimizer.init(params)
  for g in gradients:
    updates, state = optimizer.update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.fixture
def problem():
  rng = np.random.default_rng(0)
  params = {name: rng.standard_normal(5).astype(np.float32) for name in "ab"}
  gradients = [
    {name: rng.standard_normal(5).astype(np.float32) for name in "ab"}
    for _ in range(6)
  ]
  return params, gradients


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(problem, nesterov, weight_decay):
  params, gradients = problem
  schedule = optax.piecewise_constant_schedule(0.5, {3: 0.1})
  rates = [0.5] * 3 + [0.05] * 3
  settings = {
    "momentum": 0.9,
    "nesterov": nesterov,
    "weight_decay": weight_decay,
  }
  got = run(optim.sgd(schedule, **settings), params, gradients)
  for name in params:
    expected = torch_sgd(
      params[name], [g[name] for g in gradients], rates, **settings
    )
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_leaves_out_what_the_mask_leaves_out(problem):
  params, gradients = problem
  zeros = [jax.tree.map(jnp.zeros_like, g) for g in gradients]
  optimizer = optim.sgd(
    optax.constant_schedule(0.5),
    weight_decay=0.1,
    decay_mask={"a": True, "b": False},
  )
  got = run(optimizer, params, zeros)
  np.testing.assert_array_equal(got["b"], params["b"])
  expected = torch_sgd(
    params["a"],
    [np.zeros(5)] * 6,
    [0.5] * 6,
    momentum=0.9,
    nesterov=False,
    weight_decay=0.1,
  )
  np.testing.assert_allclose(got["a"], expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_gradient_is_clipped_by_its_global_norm_before_decay(problem, scale):
  params, gradients = problem
  gradient = {name: scale * g for name, g in gradients[0].items()}
  norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
  factor = min(1.0, 2.0 / norm)
  optimizer = optim.sgd(
    optax.constant_schedule(1.0), weight_decay=0.1, gradient_clip=2.0
  )
  got = run(optimizer, params, [gradient])
  for name, p in params.items():
    expected = p - (factor * gradient[name] + 0.1 * p)
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


def test_zero_does_not_clip(problem):
  params, gradients = problem
  gradient = {name: 1e6 * g for name, g in gradients[0].items()}
  got = run(optim.sgd(optax.constant_schedule(1.0)), params, [gradient])
  for name, p in params.items():
    np.testing.assert_allclose(got[name], p - gradient[name], rtol=1e-5)


def test_the_rate_grows_with_the_batch():
  scaled = functools.partial(optim.scaled_learning_rate, 0.1)
  assert scaled(batch_size=1024, reference_batch_size=256) == 0.4
  assert scaled(batch_size=64, reference_batch_size=256) == 0.025
  assert scaled(batch_size=1024, reference_batch_size=0) == 0.1
