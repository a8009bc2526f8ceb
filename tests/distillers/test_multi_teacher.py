"""Several teachers: means of one teacher's terms, one joined classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import normal

from kd_jax import distillers
from kd_jax.interop import model

ABLE = [n for n, c in distillers.DISTILLERS.items() if c.takes_many_teachers]
WEIGHTS = (3.0, 1.0)
HEADS = [{"kernel": normal(i, 16, 5), "bias": normal(i, 5)} for i in range(2)]


def head(params):
  return lambda pooled: pooled @ params["kernel"] + params["bias"][None]


def given(tiny, **more):
  heads = tuple(map(head, HEADS))
  return {**tiny.given(train=False), "teacher_heads": heads, **more}


@pytest.mark.parametrize("name", ABLE)
def test_terms_and_prediction_are_weighted_means(tiny, name):
  alone = distillers.create(name)
  joined = distillers.create_for_teachers(name, WEIGHTS)
  other = jax.tree.map(lambda x: 1.5 * x[::-1], tiny.teacher)
  both = given(tiny, teachers=(tiny.teacher, other))

  @jax.jit
  def outputs(key):
    variables = joined.init(key, **both)
    single = [
      alone.apply(
        {k: v[f"members_{i}"] for k, v in variables.items()},
        **{**both, "teachers": (teacher,), "teacher_heads": (one,)},
      )
      for i, (teacher, one) in enumerate(
        zip(both["teachers"], both["teacher_heads"], strict=True)
      )
    ]
    return joined.apply(variables, **both), single

  output, single = outputs(jax.random.key(0))
  assert output.terms.keys() == single[0].terms.keys()
  for term, value in output.terms.items():
    expected = 0.75 * single[0].terms[term] + 0.25 * single[1].terms[term]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    if term != "ce":  # the teachers do differ
      assert not np.allclose(single[0].terms[term], single[1].terms[term])
  if alone.predicts_with_teacher_head:
    expected = 0.75 * single[0].logits + 0.25 * single[1].logits
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-6)
  else:
    np.testing.assert_array_equal(output.logits, tiny.student.logits)


@pytest.mark.parametrize("size", [8, 4])
def test_a_joined_classifier_predicts_the_mean(tiny, make_output, size):
  """Also if one teacher's map is half as large as the other's."""
  joined = distillers.create_for_teachers("simkd", WEIGHTS)
  teachers = tuple(
    make_output(i, widths=(8, 16), sizes=(8, s)) for i, s in ((6, 8), (7, size))
  )
  student = make_output(5, widths=(6, 12), sizes=(8, 8))
  both = given(tiny, student=student, teachers=teachers)

  @jax.jit
  def outputs(key):
    variables = joined.init(key, **both)
    last = joined.apply(variables, student, teachers, method="last_map")
    return joined.apply(variables, **both).logits, last

  logits, last = outputs(jax.random.key(0))
  assert last.shape == (8, size, size, 32)
  mean = model.mean_classifier(HEADS, joined.weights)
  together = head(mean)(jnp.mean(last, (1, 2)))
  np.testing.assert_allclose(together, logits, rtol=1e-4, atol=1e-5)


def test_maps_that_cannot_be_joined(make_output):
  joined = distillers.create_for_teachers("simkd", (1, 1))
  student = make_output(5, sizes=(8, 8))
  teachers = tuple(make_output(i, sizes=(8, s)) for i, s in ((6, 8), (7, 3)))
  init = functools.partial(joined.init, method="last_map")
  with pytest.raises(ValueError, match="divide each other, got 8x8 and 3x3"):
    jax.eval_shape(init, jax.random.key(0), student, teachers)


def test_methods_for_one_teacher_refuse():
  for name in set(distillers.names()) - set(ABLE):
    with pytest.raises(
      ValueError, match=rf"{name} learns from one teacher, got 2: .*{ABLE[-1]}"
    ):
      distillers.create_for_teachers(name, (1, 1))


def test_weights_are_divided_by_their_sum():
  module = distillers.create_for_teachers("kd", WEIGHTS, temperature=2.0)
  assert module.weights == (0.75, 0.25)
  assert [m.temperature for m in module.members] == [2.0, 2.0]
  for weights in ((), (3.0,)):
    assert type(distillers.create_for_teachers("kd", weights)).__name__ == "KD"
