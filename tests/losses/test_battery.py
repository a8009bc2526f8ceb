"""What every loss must do; `tests/distillers/test_x.py` declares the cases."""

import doctest
import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax import losses
from kd_jax.distributed import collectives

CASES = {
  name: case
  for method in method_cases.methods().values()
  for name, case in method.losses.items()
}


def pytest_generate_tests(metafunc):
  if "case" in metafunc.fixturenames:
    metafunc.parametrize("name, case", CASES.items(), ids=list(CASES))


def fn(name, case):
  return functools.partial(getattr(losses, name), **case.kwargs)


def batch_size(case):
  return jax.tree.leaves(case.args)[0].shape[0]


def is_batched(case, x):
  return np.ndim(x) > 0 and x.shape[0] == batch_size(case)


def is_float(x):
  return jnp.issubdtype(jnp.result_type(x), jnp.floating)


@functools.cache
def compiled(name, case):
  """(loss, mean loss and gradients) of a case, each compiled once."""

  def mean(trained, args):
    full = list(args)
    for position, value in zip(case.trained, trained):
      full[position] = value
    return jnp.mean(fn(name, case)(*full))

  return jax.jit(fn(name, case)), jax.jit(jax.value_and_grad(mean))


def value_and_grads(name, case, args):
  return compiled(name, case)[1]([args[i] for i in case.trained], args)


def test_every_loss_has_a_case_and_a_file_of_its_name():
  """Or a place in the file of its method's name."""
  assert set(CASES) == {n for n in vars(losses) if n.endswith("_loss")}
  for method, declared in method_cases.methods().items():
    for name in declared.losses:
      module = getattr(losses, name).__module__.removeprefix("kd_jax.losses.")
      assert module in (name.removesuffix("_loss"), method)


def test_shape_dtype_and_compilation(name, case):
  value = fn(name, case)(*case.args)
  assert value.dtype == jnp.float32
  assert value.shape == ((batch_size(case),) if case.per_example else ())
  jitted = compiled(name, case)[0](*case.args)
  np.testing.assert_allclose(jitted, value, rtol=1e-5, atol=1e-7)


def test_examples_are_independent_or_equivariant(name, case):
  """vmap over single examples = batch; a permuted batch permutes the loss."""
  function = compiled(name, case)[0]
  value = function(*case.args)
  order = np.array([3, 2, 1, 0] if case.ordered else [2, 0, 3, 1])
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

  singles = jax.jit(jax.vmap(single, in_axes=axes))(*case.args)
  np.testing.assert_allclose(singles, value, rtol=1e-5)


@pytest.mark.parametrize(
  "name", [n for n, case in CASES.items() if case.minimum is not None]
)
def test_a_student_that_equals_its_teacher_is_at_the_minimum(name):
  case = CASES[name]
  value, gradients = value_and_grads(name, case, case.minimum)
  for x in jax.tree.leaves((value, gradients)):
    np.testing.assert_allclose(x, 0.0, atol=1e-6)


def one_hot(x):
  """1e4 at the largest value of each row, -1e4 elsewhere."""
  return np.where(x == x.max(-1, keepdims=True), 1e4, -1e4).astype(np.float32)


STRESSES = {
  "bfloat16": lambda x, case, first: jnp.asarray(x, jnp.bfloat16),
  "huge": lambda x, case, first: np.float32(case.huge) * x,
  "tiny": lambda x, case, first: np.float32(1e-12) * x,
  "equal rows": lambda x, case, first: np.broadcast_to(x[:1], x.shape),
  "equal inputs": lambda x, case, first: first if x.shape == first.shape else x,
  "zeros": lambda x, case, first: np.zeros_like(x),
  "one hot": lambda x, case, first: one_hot(x),
  "batch of one": lambda x, case, first: x[:1],
}


@pytest.mark.parametrize("stress", STRESSES)
def test_stays_finite(name, case, stress):
  first = jax.tree.leaves(case.args)[0]

  def change(x):
    # Arrays of parameters, such as a variance, have their own ranges.
    if not is_batched(case, x):
      return x
    if not is_float(x):
      return x[:1] if stress == "batch of one" else x
    return STRESSES[stress](x, case, first)

  value, gradients = value_and_grads(
    name, case, jax.tree.map(change, case.args)
  )
  assert value.dtype == jnp.float32
  for x in jax.tree.leaves((value, gradients)):
    assert np.all(np.isfinite(np.asarray(x, np.float32)))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.scale_free])
def test_the_scale_of_features_does_not_count(name, scale):
  case = CASES[name]
  value, gradients = value_and_grads(name, case, case.args)
  scaled = jax.tree.map(lambda x: np.float32(scale) * x, case.args)
  found, found_gradients = value_and_grads(name, case, scaled)
  np.testing.assert_allclose(found, value, rtol=1e-5)
  for g, f in zip(*map(jax.tree.leaves, (gradients, found_gradients))):
    np.testing.assert_allclose(scale * f, g, rtol=1e-4, atol=1e-6)


def test_a_class_that_does_not_exist_is_not_a_number(name, case):
  """Under jit; a known one is refused, see `test_wrong_arrays_are_refused`."""
  for i, x in enumerate(case.args):
    if isinstance(x, np.ndarray) and x.dtype == np.int32:
      for bad in (-1, 10**6):
        rows = np.array([*x[:2], bad, *x[3:]], np.int32)
        args = [*case.args[:i], rows, *case.args[i + 1 :]]
        value = compiled(name, case)[0](*args)
        np.testing.assert_array_equal(np.isnan(value), [0, 0, 1, 0])


def wrong(case, x):
  """Variants of an argument that no loss may take."""
  if np.ndim(x) == 0:
    return [np.ones(3, np.float32), np.nan, np.inf]
  found = [x[0], x[..., None], x.astype(np.int32 if is_float(x) else float)]
  # A list of one array would become a batch of one.
  found += [[x]] if is_float(x) else [x - x.min() - 1, x + 10**6]
  # A single array has nothing to disagree with.
  return found + [x[:2]] * (len(jax.tree.leaves(case.args)) > 1)


def test_wrong_arrays_are_refused(name, case):
  leaves, tree = jax.tree.flatten(case.args)
  for i, leaf in enumerate(leaves):
    for j, bad in enumerate(wrong(case, leaf)):
      args = jax.tree.unflatten(tree, [*leaves[:i], bad, *leaves[i + 1 :]])
      with pytest.raises(ValueError, match="expected"):
        fn(name, case)(*args)
        pytest.fail(f"argument {i}, variant {j}: {np.shape(bad)}")


def test_hyper_parameters(name, case):
  """They count, are checked, and never broadcast over the batch."""
  size = batch_size(case)
  base = fn(name, case)(*case.args)
  for key, value in case.kwargs.items():

    def run(x, key=key):
      kwargs = {**case.kwargs, key: x}
      return getattr(losses, name)(*case.args, **kwargs)

    assert not np.allclose(run(type(value)(value * 2)), base, rtol=1e-3)
    wrong_shapes = [np.full(s, value) for s in ((size + 1,), (size, 2), (1, 1))]
    for bad in (np.nan, np.inf, *wrong_shapes, *case.refused[key]):
      with pytest.raises(ValueError, match=f"{key}: expected"):
        run(bad)
    if isinstance(value, int):  # a count, which sets shapes or constants
      continue
    for scalar in (np.float32(value), jnp.float32(value)):
      np.testing.assert_allclose(run(scalar), base, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(run)(value), base, rtol=1e-5)
    values = value * np.linspace(0.5, 1, size, dtype=np.float32)
    for rows in (values, values[:, None]):
      try:
        found = run(rows)
      except ValueError as error:
        assert f"{key}: expected" in str(error)
        continue
      for i in (0, size - 1):
        expected = run(float(values[i]))[i]
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)


@pytest.mark.parametrize(
  "devices", [pytest.param(2, marks=pytest.mark.full), 4]
)
@pytest.mark.parametrize(
  "name", [n for n, case in CASES.items() if not case.per_example]
)
def test_the_mean_over_devices_is_the_global_loss(name, devices):
  """Value and gradient of a relational loss, of replicated weights."""
  case = CASES[name]
  args = jax.tree.map(lambda x: np.concatenate([x, 2 * x[::-1]]), case.args)
  weights = [1.0 + 0.1 * method_cases.normal(7, *x.shape[1:]) for x in args]

  def value_and_grad(weights, args, axis_name=None):
    def loss(weights):
      weighted = [w[None] * x for w, x in zip(weights, args, strict=True)]
      return fn(name, case)(*weighted, axis_name=axis_name)

    return collectives.axis_mean(jax.value_and_grad(loss)(weights), axis_name)

  mapped = jax.jit(
    jax.shard_map(
      lambda weights, args: value_and_grad(weights, args, "d"),
      mesh=jax.sharding.Mesh(jax.devices()[:devices], ("d",)),
      in_specs=(P(), P("d")),
      out_specs=P(),
      check_vma=False,
    )
  )
  (value, gradients), expected = (
    f(weights, args) for f in (mapped, jax.jit(value_and_grad))
  )
  np.testing.assert_allclose(value, expected[0], rtol=1e-5)
  for g, e in zip(gradients, expected[1], strict=True):
    np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-7)


def test_docstring_examples():
  attempted = 0
  for info in pkgutil.iter_modules(losses.__path__, "kd_jax.losses."):
    result = doctest.testmod(importlib.import_module(info.name))
    assert result.failed == 0
    attempted += result.attempted
  assert doctest.testmod(losses).failed == 0
  assert attempted > 20
