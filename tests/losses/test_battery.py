"""What every loss must do; the cases are in conftest.py."""

import doctest
import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses

# Milliseconds of work: compiling fast is what counts.
QUICK = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


def fn(name, case):
  return functools.partial(getattr(losses, name), **case.kwargs)


def batch_size(case):
  return jax.tree.leaves(case.args)[0].shape[0]


def to_double(x):
  floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
  return np.asarray(x, np.float64 if floating else None)


def is_batched(case, x):
  return jnp.ndim(x) > 0 and x.shape[0] == batch_size(case)


def map_floats(change, tree):
  """Applies `change` to floating-point arrays."""

  def leaf(x):
    floating = isinstance(x, jax.Array) and jnp.issubdtype(
      x.dtype, jnp.floating
    )
    return change(x) if floating else x

  return jax.tree.map(leaf, tree)


@functools.cache
def compiled(name, case):
  """(loss, mean loss and gradients) of a case, each compiled once."""

  def mean(trained, args):
    full = list(args)
    for position, value in zip(case.trained, trained):
      full[position] = value
    return jnp.mean(fn(name, case)(*full))

  return QUICK(fn(name, case)), QUICK(jax.value_and_grad(mean))


def value_and_grads(name, case, args):
  return compiled(name, case)[1]([args[i] for i in case.trained], args)


def test_every_loss_has_a_case(cases):
  assert set(cases) == {n for n in losses.__all__ if n.endswith("_loss")}


def test_equals_the_transcription(name, case):
  expected = case.reference(*jax.tree.map(to_double, case.args), **case.kwargs)
  value = fn(name, case)(*case.args)
  assert value.dtype == jnp.float32
  assert value.shape == ((batch_size(case),) if case.per_example else ())
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
  jitted = compiled(name, case)[0](*case.args)
  np.testing.assert_allclose(jitted, value, rtol=1e-5, atol=1e-7)


def test_examples_are_independent_or_equivariant(name, case):
  """vmap over single examples = batch; a permuted batch permutes the loss."""
  function = compiled(name, case)[0]
  value = function(*case.args)
  order = np.array([2, 0, 3, 1])
  permuted = function(
    *jax.tree.map(lambda x: x[order] if is_batched(case, x) else x, case.args)
  )
  if not case.per_example:
    np.testing.assert_allclose(permuted, value, rtol=1e-5)
    return
  np.testing.assert_allclose(permuted, value[order], rtol=1e-5)
  axes = jax.tree.map(lambda x: 0 if is_batched(case, x) else None, case.args)

  def single(*args):
    args = jax.tree.map(
      lambda x, axis: x if axis is None else x[None],
      args,
      axes,
      is_leaf=lambda x: x is None,
    )
    return fn(name, case)(*args)[0]

  singles = QUICK(jax.vmap(single, in_axes=axes))(*case.args)
  np.testing.assert_allclose(singles, value, rtol=1e-5)


def test_a_student_that_equals_its_teacher_is_at_the_minimum(name, case):
  if case.minimum is None:
    # These have no zero: see test_vid.py, test_crd.py, test_cross_entropy.py.
    assert name in ("vid_loss", "crd_loss", "cross_entropy_loss")
    return
  value, gradients = value_and_grads(name, case, case.minimum)
  np.testing.assert_allclose(value, 0.0, atol=1e-6)
  for g in jax.tree.leaves(gradients):
    np.testing.assert_allclose(g, 0.0, atol=1e-6)


def test_gradients(name, case):
  """Along a random direction, against central differences."""
  trained = [case.args[i] for i in case.trained]
  rng = np.random.default_rng(1)
  direction = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), trained
  )
  _, gradients = value_and_grads(name, case, case.args)
  slope = sum(
    np.vdot(np.asarray(g), d)
    for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction))
  )
  # In float64, through the transcription, so that the step can be small.
  ends = []
  for sign in (1, -1):
    args = jax.tree.map(to_double, list(case.args))
    for i, d in zip(case.trained, direction):
      args[i] = jax.tree.map(lambda x, d, s=sign: x + s * 1e-5 * d, args[i], d)
    ends.append(np.mean(case.reference(*args, **case.kwargs)))
  np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-3)


@pytest.mark.parametrize("stress", ["bfloat16", "huge", "equal rows", "zeros"])
def test_stays_finite(name, case, stress):
  change = {
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "huge": lambda x: 1e4 * x if name != "crd_loss" else 20 * x,
    "equal rows": lambda x: jnp.broadcast_to(x[:1], x.shape),
    "zeros": jnp.zeros_like,
  }[stress]
  args = map_floats(change, case.args)
  if name == "vid_loss" and stress == "zeros":  # a variance is never 0
    args = (args[0], case.args[1], args[2])
  value, gradients = value_and_grads(name, case, args)
  assert value.dtype == jnp.float32
  for x in jax.tree.leaves((value, gradients)):
    assert np.all(np.isfinite(np.asarray(x, np.float32)))


def test_every_hyper_parameter_counts(name, case):
  for key, value in case.kwargs.items():
    changed = {**case.kwargs, key: type(value)(value * 2)}
    other = getattr(losses, name)(*case.args, **changed)
    assert not np.allclose(other, fn(name, case)(*case.args), rtol=1e-3)


def test_every_loss_lives_in_the_file_of_its_name():
  for name in losses.__all__:
    if name.endswith("_loss"):
      module = getattr(losses, name).__module__
      assert module == f"kd_jax.losses.{name.removesuffix('_loss')}"


def test_docstring_examples():
  attempted = 0
  for info in pkgutil.iter_modules(losses.__path__):
    module = importlib.import_module(f"kd_jax.losses.{info.name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    attempted += result.attempted
  assert doctest.testmod(losses).failed == 0
  assert attempted > 20
