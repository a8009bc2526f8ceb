"""What every method must do, driven by the registry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers
from kd_jax.models.layers import ModelOutputs
from kd_jax.training import loss as loss_lib

METHODS = [name for name in distillers.names() if name != "none"]

# Hyper-parameter -> (method that reads it, another value).
FIELDS = {
  "temperature": ("kd", 4.5),
  "hint_layer": ("fitnet", "stage2"),
  "factor": ("simkd", 4),
  "student_map": ("simkd", "stage1"),
  "soft": ("semckd", 0.2),
  "max_mid": ("reviewkd", 6),
  "k": ("crd", 24),
  "nce_temperature": ("crd", 0.08),
  "feat_dim": ("crd", 12),
  "mode": ("crd", "relax"),
}


@pytest.fixture(scope="module")
def made(tiny):
  """(module, variables) per method, made once."""
  cache = {}

  def make(method):
    if method not in cache:
      module = tiny.create(method)
      cache[method] = module, tiny.init(module)
    return cache[method]

  return make


@pytest.mark.parametrize("method", METHODS)
def test_descent_reaches_every_parameter(tiny, made, quick, method):
  module, variables = made(method)
  rest = {k: v for k, v in variables.items() if k != "params"}
  # The student's features stand for its weights.
  trained = {"student": tiny.student, "distiller": variables.get("params", {})}

  @quick
  def step(trained, rest, teacher):
    def loss(trained):
      output, moved = module.apply(
        {"params": trained["distiller"], **rest},
        trained["student"],
        (teacher,),
        tiny.batch,
        teacher_heads=(tiny.classifier,),
        step=0,
        epoch=1,
        train=True,
        method="distill",
        rngs={"distiller": jax.random.key(1)},
        mutable=list(rest),
      )
      return loss_lib.weighted_sum(output.terms, {method: 1.0}), moved

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


@pytest.mark.parametrize("method", distillers.names())
def test_evaluation_is_pure(tiny, made, method):
  """No random stream, nothing moves, twice the same."""
  module, variables = made(method)
  first, moved = tiny.apply(module, variables, train=False)
  second, _ = tiny.apply(module, variables, train=False)
  assert not jax.tree.leaves(moved)
  assert first.logits.dtype == jnp.float32
  assert first.logits.shape == tiny.student.logits.shape
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("method", distillers.names())
def test_terms(tiny, made, method):
  """ "ce", "kd" and the own word; batch values or scalars; float32."""
  module, variables = made(method)
  output, _ = jax.eval_shape(
    lambda v: module.apply(
      v,
      tiny.student,
      (tiny.teacher,),
      tiny.batch,
      teacher_heads=(tiny.classifier,),
      step=0,
      epoch=1,
      train=True,
      method="distill",
      rngs={"distiller": jax.random.key(0)},
      mutable=["batch_stats", "memory"],
    ),
    variables,
  )
  own = {"none": {"ce"}, "kd": {"ce", "kd"}}
  assert set(output.terms) == own.get(method, {"ce", "kd", method})
  for term in output.terms.values():
    assert term.dtype == jnp.float32
    assert term.shape in ((), (8,))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_keeps_parameters_and_losses_in_float32(tiny, made, method):
  module, variables = made(method)
  half = tiny.create(method, dtype=jnp.bfloat16)

  def to_half(output):
    features = jax.tree.map(lambda x: x.astype(jnp.bfloat16), output.features)
    return ModelOutputs(output.logits, features)

  student, teacher = to_half(tiny.student), to_half(tiny.teacher)
  init = jax.eval_shape(
    lambda: half.init(
      jax.random.key(0),
      student,
      (teacher,),
      {**tiny.batch, "train_labels": tiny.train_labels},
      teacher_heads=(tiny.classifier,),
      step=0,
      epoch=1,
      train=True,
      method="distill",
    )
  )
  assert jax.tree.map(lambda x: (x.shape, x.dtype), init) == jax.tree.map(
    lambda x: (x.shape, x.dtype), variables
  )
  output, _ = tiny.apply(half, variables, student=student, teacher=teacher)
  full, _ = tiny.apply(module, variables)
  for name, term in output.terms.items():
    assert term.dtype == jnp.float32
    np.testing.assert_allclose(
      jnp.mean(term), jnp.mean(full.terms[name]), rtol=0.05
    )


@pytest.mark.parametrize("field", FIELDS)
def test_every_hyper_parameter_counts(tiny, field):
  """A golden value would not notice a field that nothing reads."""
  method, value = FIELDS[field]
  plain, changed = tiny.term(method), tiny.term(method, **{field: value})
  assert abs(plain - changed) > 1e-4 * abs(plain)


def test_the_table_above_names_every_field():
  fields = set()
  for cls in distillers.DISTILLERS.values():
    fields |= {field.name for field in dataclasses.fields(cls)}
  elsewhere = {"momentum", "initial_variance", "label_smoothing"}  # test_*.py
  others = {"parent", "name", "axis_name", "sync", "dtype"} | elsewhere
  assert fields - others == set(FIELDS)


def test_only_simkd_predicts_with_the_teachers_head():
  heads = [
    name
    for name, cls in distillers.DISTILLERS.items()
    if cls().predicts_with_teacher_head
  ]
  assert heads == ["simkd"]
  for cls in distillers.DISTILLERS.values():
    assert cls.__final__
