"""What every method must do, driven by the registry."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import pytest

from kd_jax import distillers
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs

METHODS = method_cases.methods()


@pytest.fixture(scope="module")
def made(tiny_for):
  """(networks, module, variables) per method, made once."""
  cache = {}

  def make(method):
    if method not in cache:
      tiny = tiny_for(method)
      module = tiny.create(method)
      cache[method] = tiny, module, tiny.init(module)
    return cache[method]

  return make


@pytest.mark.parametrize("method", method_cases.stepped())
def test_descent_reaches_every_parameter(made, method):
  tiny, module, variables = made(method)
  _, own = method_cases.terms(method)
  rest = {k: v for k, v in variables.items() if k != "params"}
  # The student's features stand for its weights.
  trained = {"student": tiny.student, "distiller": variables.get("params", {})}

  @jax.jit
  def step(trained, rest, teacher):
    def loss(trained):
      output, moved = module.apply(
        {"params": trained["distiller"], **rest},
        rngs={"distiller": jax.random.key(1)},
        mutable=list(rest),
        **tiny.given(trained["student"], teacher),
      )
      return sum(jnp.mean(output.terms[name]) for name in own), moved

    (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    trained = jax.tree.map(lambda p, g: p - 0.1 * g / norm, trained, grads)
    return trained, moved, value, grads

  values = []
  for i in range(11):
    trained, rest, value, grads = step(trained, rest, tiny.teacher)
    values.append(float(value))
    if i == 0:
      for path, g in jax.tree_util.tree_leaves_with_path(grads["distiller"]):
        assert float(jnp.abs(g).max()) > 0, jax.tree_util.keystr(path)
      assert any(
        float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads["student"])
      )
  assert values[-1] < values[0], values
  assert step._cache_size() == 1


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_pure(made, method):
  """It traces without a random stream and without a collection that moves."""
  tiny, module, variables = made(method)
  given = tiny.given(train=False)
  output = jax.eval_shape(lambda v: module.apply(v, **given), variables)
  assert isinstance(output, base.DistillOutput)
  assert output.logits.dtype == jnp.float32
  assert output.logits.shape == tiny.student.logits.shape


@pytest.mark.parametrize("method", method_cases.stepped())
def test_terms_in_float32_and_bfloat16(made, method):
  """Parameters and terms stay float32; terms are [B] or scalar."""
  tiny, module, variables = made(method)
  half = tiny.create(method, dtype=jnp.bfloat16)

  def to_half(output):
    features = jax.tree.map(lambda x: x.astype(jnp.bfloat16), output.features)
    return ModelOutputs(output.logits, features)

  inputs = {n: to_half(getattr(tiny, n)) for n in ("student", "teacher")}
  assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
    lambda x: (x.shape, x.dtype), tiny.shapes(half, **inputs)
  )
  full, _ = tiny.apply(module, variables)
  output, _ = tiny.apply(half, variables, **inputs)
  expected, _ = method_cases.terms(method)
  assert full.terms.keys() == output.terms.keys() == expected
  for name, term in output.terms.items():
    assert term.dtype == full.terms[name].dtype == jnp.float32
    assert term.shape == full.terms[name].shape and term.shape in ((), (8,))
    np.testing.assert_allclose(
      jnp.mean(term), jnp.mean(full.terms[name]), rtol=0.05
    )


def test_every_field_is_declared():
  common = {field.name for field in dataclasses.fields(base.Distiller)}
  for name, cls in distillers.DISTILLERS.items():
    own = {field.name for field in dataclasses.fields(cls)} - common
    assert own <= set(METHODS[name].fields), name


@pytest.fixture(scope="module")
def plain_term(tiny_for):
  return functools.cache(lambda method: tiny_for(method).term(method))


@pytest.mark.parametrize(
  ("method", "field", "value"),
  [
    pytest.param(
      *(name, field, value),
      marks=() if name in method_cases.KINDS else pytest.mark.full,
    )
    for name, method in METHODS.items()
    for field, value in method.fields.items()
    if value is not None
  ],
)
def test_every_field_counts(plain_term, tiny_for, method, field, value):
  """A golden value would not notice a field that nothing reads."""
  plain = plain_term(method)
  changed = tiny_for(method).term(method, **{field: value})
  assert abs(plain - changed) > 1e-4 * abs(plain)
