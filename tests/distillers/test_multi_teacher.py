"""Several teachers: means of one teacher's losses, one joined classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers
from kd_jax.distillers import multi_teacher
from kd_jax.interop import model
from kd_jax.models.layers import ModelOutputs

ABLE = [n for n, c in distillers.DISTILLERS.items() if c.takes_many_teachers]
WEIGHTS = (3.0, 1.0)


def heads(tiny, count=2):
  rng = np.random.default_rng(1)
  channels = tiny.teacher.features["pooled"].shape[-1]
  return [
    {
      "kernel": rng.standard_normal((channels, 5), np.float32),
      "bias": rng.standard_normal(5, np.float32),
    }
    for _ in range(count)
  ]


def classifier(head):
  return lambda pooled: pooled @ head["kernel"] + head["bias"]


def other_teacher(teacher):
  features = {k: 1.5 * v[::-1] for k, v in teacher.features.items()}
  return ModelOutputs(teacher.logits[::-1], features)


@pytest.fixture(params=ABLE)
def both(request, tiny):
  """The method's own module, that of two teachers, and what they are given."""
  alone = distillers.create(request.param)
  joined = distillers.create_for_teachers(request.param, WEIGHTS)
  teachers = (tiny.teacher, other_teacher(tiny.teacher))
  classifiers = tuple(map(classifier, heads(tiny)))
  arguments = {"step": 0, "epoch": 1, "train": False}
  variables = joined.init(
    {"params": jax.random.key(0), "distiller": jax.random.key(1)},
    tiny.student,
    teachers,
    tiny.batch,
    teacher_heads=classifiers,
    method="distill",
    **arguments,
  )
  output = joined.apply(
    variables,
    tiny.student,
    teachers,
    tiny.batch,
    teacher_heads=classifiers,
    method="distill",
    **arguments,
  )
  single = [
    alone.apply(
      {k: v[f"members_{i}"] for k, v in variables.items()},
      tiny.student,
      teacher,
      tiny.batch,
      teacher_head=classify,
      **arguments,
    )
    for i, (teacher, classify) in enumerate(
      zip(teachers, classifiers, strict=True)
    )
  ]
  return alone, output, single


def test_terms_are_weighted_means(both):
  _, output, single = both
  assert output.terms.keys() == single[0].terms.keys()
  for name, value in output.terms.items():
    expected = 0.75 * single[0].terms[name] + 0.25 * single[1].terms[name]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    if name != "ce":  # the teachers do differ
      assert not np.allclose(single[0].terms[name], single[1].terms[name])


def test_the_prediction_is_the_mean_of_the_methods(both, tiny):
  alone, output, single = both
  if alone.predicts_with_teacher_head:
    expected = 0.75 * single[0].logits + 0.25 * single[1].logits
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-6)
  else:
    np.testing.assert_array_equal(output.logits, tiny.student.logits)


@pytest.mark.parametrize("size", [8, 4])
def test_a_joined_classifier_predicts_the_mean(tiny, make_output, size):
  """Also where a teacher's map is half as large as the other's."""
  joined = distillers.create_for_teachers("simkd", WEIGHTS)
  second = make_output(7, widths=(8, 16), sizes=(8, size))
  first = make_output(6, widths=(8, 16), sizes=(8, 8))
  student = make_output(5, widths=(6, 12), sizes=(8, 8))
  own = heads(tiny)
  given = (student, (first, second), tiny.batch)
  arguments = {
    "teacher_heads": tuple(map(classifier, own)),
    "step": 0,
    "epoch": 1,
    "train": False,
    "method": "distill",
  }
  variables = joined.init(jax.random.key(0), *given, **arguments)
  logits = joined.apply(variables, *given, **arguments).logits
  last = joined.apply(variables, student, (first, second), method="last_map")
  assert last.shape == (8, size, size, 32)
  head = model.mean_classifier(own, joined.weights)
  together = jnp.mean(last, (1, 2)) @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(together, logits, rtol=1e-4, atol=1e-5)


def test_maps_that_cannot_be_joined(make_output):
  joined = distillers.create_for_teachers("simkd", (1, 1))
  student = make_output(5, sizes=(8, 8))
  teachers = [make_output(i, sizes=(8, s)) for i, s in ((6, 8), (7, 3))]
  with pytest.raises(ValueError, match="divide each other, got 8x8 and 3x3"):
    joined.init(jax.random.key(0), student, tuple(teachers), method="last_map")


def test_methods_for_one_teacher_refuse():
  assert set(ABLE) == {"kd", "srrl", "simkd"}
  for name in set(distillers.names()) - set(ABLE):
    with pytest.raises(
      ValueError, match=rf"{name} learns from one teacher, got 2: .*kd, srrl, s"
    ):
      distillers.create_for_teachers(name, (1, 1))


def test_weights_are_shares():
  module = distillers.create_for_teachers("kd", WEIGHTS, temperature=2.0)
  assert isinstance(module, multi_teacher.MultiTeacher)
  assert module.weights == (0.75, 0.25)
  assert [m.temperature for m in module.members] == [2.0, 2.0]
