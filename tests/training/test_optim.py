"""Schedules at their boundaries; SGD against PyTorch's rule in numpy."""

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
  ("settings", "rates"),
  [
    # The rate drops when the 1-based epoch exceeds the milestone.
    (
      {},
      {
        0: 0.05,
        150 * STEPS - 1: 0.05,
        150 * STEPS: 0.005,
        180 * STEPS - 1: 0.005,
        180 * STEPS: 5e-4,
        210 * STEPS: 5e-5,
        240 * STEPS - 1: 5e-5,
      },
    ),
    ({"decay_rate": 0.5}, {150 * STEPS: 0.025}),
    # Two milestones at one step both count.
    ({"milestones": (150, 150)}, {150 * STEPS: 5e-4}),
    ({"milestones": (1, 2), "warmup_epochs": 3}, {3 * STEPS: 5e-4}),
    # Warm-up is linear from 0, and the milestones stay.
    (
      {"warmup_epochs": 2.0},
      {
        **{s: 0.05 * s / (2 * STEPS) for s in range(2 * STEPS + 1)},
        150 * STEPS - 1: 0.05,
        150 * STEPS: 0.005,
      },
    ),
  ],
)
def test_step_schedule(settings, rates):
  rate = make("step", **settings)
  for step, expected in rates.items():
    assert rate(step) == pytest.approx(expected, rel=1e-6, abs=1e-9), step


def test_cosine_schedule():
  rate, total = make("cosine", epochs=10), 10 * STEPS
  for step in range(total + 1):
    expected = 0.05 * (1 + np.cos(np.pi * step / total)) / 2
    assert rate(step) == pytest.approx(expected, abs=1e-8)
  rate = make("cosine", epochs=10, warmup_epochs=2.0)
  ends = [rate(s * STEPS) for s in (0, 2, 6, 10)]
  assert ends == pytest.approx([0, 0.05, 0.025, 0], abs=1e-8)


def test_constant_schedule():
  rate = make("constant")
  assert {rate(s) for s in (0, 150 * STEPS, 240 * STEPS)} == {rate(0)}
  rate = make("constant", warmup_epochs=3 / STEPS)
  assert [rate(s) for s in range(5)] == pytest.approx(
    [0, 0.05 / 3, 0.1 / 3, 0.05, 0.05]
  )


def test_unknown_schedule():
  with pytest.raises(ValueError, match=r"expected one of 'step'.*'steps'"):
    make("steps")


@pytest.mark.parametrize(
  ("batch", "reference", "rate"),
  [(1024, 256, 0.4), (64, 256, 0.025), (1024, 0, 0.1)],
)
def test_the_rate_grows_with_the_batch(batch, reference, rate):
  got = optim.scaled_learning_rate(
    0.1, batch_size=batch, reference_batch_size=reference
  )
  assert got == pytest.approx(rate)


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


@pytest.mark.parametrize(("scale", "clip"), [(0.01, 2), (100, 2), (1e6, 0)])
def test_gradient_is_clipped_by_its_global_norm(problem, scale, clip):
  params, gradients = problem
  gradient = {name: scale * g for name, g in gradients[0].items()}
  norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
  factor = min(1.0, clip / norm) if clip else 1.0
  optimizer = optim.sgd(
    optax.constant_schedule(1.0), weight_decay=0.1, gradient_clip=clip
  )
  got = run(optimizer, params, [gradient])
  for name, p in params.items():
    expected = p - (factor * gradient[name] + 0.1 * p)
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_dot_has_two_momenta_where_both_gradients_reach(problem, nesterov):
  params, first = problem
  _, second = problem[0], [{n: g[n][::-1] for n in g} for g in first]
  zero = np.zeros(5)
  for g in second:
    g["b"] = zero.astype(np.float32)
  settings = {"momentum": 0.5, "nesterov": nesterov, "weight_decay": 0.1}
  got = run(
    optim.dot(
      optax.constant_schedule(0.5),
      delta=0.2,
      shared={"a": True, "b": False},
      **settings,
    ),
    params,
    list(zip(first, second)),
  )
  for name, low, high in (("a", 0.3, 0.7), ("b", 0.5, 0.5)):
    p, v_ce, v_rest = params[name].astype(np.float64), zero, zero
    for g_ce, g_rest in zip(first, second):
      decayed = g_ce[name] + 0.1 * p
      v_ce = low * v_ce + decayed
      v_rest = high * v_rest + g_rest[name]
      if nesterov:
        step = decayed + low * v_ce + g_rest[name] + high * v_rest
      else:
        step = v_ce + v_rest
      p = p - 0.5 * step
    np.testing.assert_allclose(got[name], p, rtol=1e-5, atol=1e-6)


def test_dot_without_delta_is_sgd(problem):
  params, gradients = problem
  settings = {
    "weight_decay": 0.1,
    "decay_mask": {"a": True, "b": False},
    "gradient_clip": 2.0,
  }
  schedule = optax.constant_schedule(0.1)
  shared = jax.tree.map(lambda _: True, params)
  parts = [
    (jax.tree.map(lambda x: 3 * x, g), jax.tree.map(lambda x: -2 * x, g))
    for g in gradients
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    run(optim.sgd(schedule, **settings), params, gradients),
    run(
      optim.dot(schedule, delta=0.0, shared=shared, **settings), params, parts
    ),
  )


@pytest.mark.parametrize(("momentum", "delta"), [(0.9, 0.1), (0.05, 0.075)])
def test_momenta_of_dot_that_leave_their_range(momentum, delta):
  words = rf"dot_delta: expected momenta .* got {momentum} -\+ {delta}"
  with pytest.raises(ValueError, match=words):
    optim.dot(
      optax.constant_schedule(0.1), momentum=momentum, delta=delta, shared={}
    )
