"""Several methods at once: the terms of all, and whose a field is."""

import types

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import pytest
from method_cases import normal

from kd_jax import distillers
from kd_jax.distillers import simkd

CRD = {"k": 16, "feat_dim": 8}


class Again(simkd.base.Distiller):
  """A method of a user's, whose term is another's."""

  def __call__(self, student, teacher, batch, **more):
    terms = self.logit_terms(student, teacher, batch)
    return simkd.base.DistillOutput(
      student.logits, {**terms, "dkd": terms["kd"]}
    )


class Head(Again):
  """Another method that predicts with its teacher's classifier."""

  predicts_with_teacher_head = True


def fixed(tiny):
  """Arguments of `distill` with CRD's negatives, so that nothing is drawn."""
  negatives = np.arange(8 * 16, dtype=np.int32).reshape(8, 16) % 40
  return tiny.given(batch={**tiny.batch, "negatives": negatives})


def total(module, variables, given, weights):
  def loss(student, params):
    rest = {k: v for k, v in variables.items() if k != "params"}
    output, moved = module.apply(
      {"params": params, **rest},
      **{**given, "student": student},
      mutable=list(rest),
    )
    sums = {name: jnp.mean(x) for name, x in output.terms.items()}
    return sum(weights[n] * sums[n] for n in weights), (sums, moved)

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
    given["student"], variables["params"]
  )


def test_terms_and_gradients_are_the_sum_of_both(tiny):
  both = distillers.create("crd+dkd", **CRD, beta=2.0)
  crd = distillers.create("crd", **CRD)
  dkd = distillers.create("dkd", beta=2.0)
  variables, given = tiny.init(both), fixed(tiny)
  assert {k: [*v] for k, v in variables.items()} == {
    "params": ["crd"],
    "memory": ["crd"],
  }
  weights = {"ce": 1.0, "kd": 2.0, "crd": 0.8, "dkd": 3.0}
  (value, (sums, moved)), (by_student, by_params) = total(
    both, variables, given, weights
  )
  assert sums.keys() == weights.keys()
  own = {kind: tree["crd"] for kind, tree in variables.items()}
  (one, (_, one_moved)), (g_one, p_one) = total(
    crd, own, given, {"ce": 1.0, "kd": 2.0, "crd": 0.8}
  )
  (other, _), (g_other, _) = total(dkd, {"params": {}}, given, {"dkd": 3.0})
  np.testing.assert_allclose(value, one + other, rtol=1e-6)
  expected = jax.tree.map(jnp.add, g_one, g_other)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9),
    (by_student, by_params, moved),
    (expected, {"crd": p_one}, {"memory": {"crd": one_moved["memory"]}}),
  )


def test_every_method_goes_with_every_other():
  methods = [name for name in distillers.names() if name != "none"]
  module = distillers.create("+".join(methods))
  assert [member.name for member in module.members] == methods
  own = [term for n in methods for term in method_cases.terms(n)[1]]
  assert len({*own}) == len(own)


def test_whose_a_field_is():
  module = distillers.create(
    "dkd+nkd+kd_jax.distillers.simkd:SimKD",
    beta=2.0,
    temperature=1.0,
    nkd={"temperature": 5.0, "gamma": 7.0},
    factor=4,
  )
  dkd, nkd, other = module.members
  assert (dkd.name, nkd.name, other.name) == ("dkd", "nkd", "simkd")
  assert (dkd.beta, dkd.temperature) == (2.0, 1.0)
  assert (nkd.gamma, nkd.temperature) == (7.0, 5.0)
  assert (other.factor, other.temperature) == (4, 1.0)


@pytest.mark.parametrize("name", ["kd+nkd", "nkd+kd", "nkd+dkd", "dkd+nkd"])
def test_the_term_kd_is_that_of_kd_or_of_the_first(tiny, name):
  output = distillers.create(name).apply({}, **tiny.given())
  first = "kd" if "kd" in name.split("+") else name.split("+")[0]
  expected = distillers.create(first).apply({}, **tiny.given())
  np.testing.assert_array_equal(output.terms["kd"], expected.terms["kd"])


@pytest.mark.parametrize(
  ("name", "fields", "facts"),
  [
    ("dkd+dkd", {}, "expected different methods, got dkd and dkd"),
    ("none+dkd", {}, "expected methods that learn from a teacher, got none"),
    ("crd+dkdd", {}, "unknown method 'dkdd'. Did you mean dkd"),
    ("crd+dkd", {"betta": 1.0}, "no field 'betta'.*mean beta"),
    ("crd+dkd", {"dkd": {"k": 1}}, "dkd has no field 'k'"),
    ("crd+dkd", {"dkd": {"name": "kd"}}, "dkd has no field 'name'"),
    ("crd+dkd", {"dkd": 2.0}, r"fields of dkd as a dict, got 2\.0"),
    (
      *("dkd+sdd", {"alpha": 2.0}),
      r"dkd and sdd each have a field 'alpha'.*dkd=\{'alpha': 2\.0\}",
    ),
    (
      *(f"simkd+{__name__}:Head", {}),
      "classifier, got simkd and head",
    ),
  ],
)
def test_what_does_not_go_together(name, fields, facts):
  with pytest.raises(ValueError, match=facts):
    distillers.create(name, **fields)


def test_two_terms_of_one_name(tiny):
  module = distillers.create(f"dkd+{__name__}:Again")
  with pytest.raises(ValueError, match="dkd and again both have the term"):
    module.apply({}, **tiny.given())


def test_one_member_predicts(tiny):
  module = distillers.create("dkd+simkd")
  variables = tiny.init(module)
  output, _ = tiny.apply(module, variables, train=False)
  alone = {kind: tree["simkd"] for kind, tree in variables.items()}
  simkd = distillers.create("simkd")
  expected, _ = tiny.apply(simkd, alone, train=False)
  np.testing.assert_allclose(output.logits, expected.logits, rtol=1e-6)
  assert module.predictor.name == "simkd"
  pair = (tiny.student, (tiny.teacher,))
  found, wanted = (
    jax.jit(lambda v, m=m: m.apply(v, *pair, method="last_map"))(v)
    for m, v in ((module, variables), (simkd, alone))
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  plain = distillers.create("dkd+sp")
  assert not plain.needs_logits_only
  assert distillers.create("dkd+kd").needs_logits_only
  assert not plain.predicts_with_teacher_head
  last = plain.apply({}, *pair, method="last_map")
  np.testing.assert_array_equal(last, tiny.student.features["last"])


def test_several_teachers(tiny):
  module = distillers.create_for_teachers("kd+simkd", (3.0, 1.0))
  other = jax.tree.map(lambda x: 1.5 * x[::-1], tiny.teacher)
  weights = normal(9, 16, 5)
  given = {
    **tiny.given(train=False, teacher=None),
    "teachers": (tiny.teacher, other),
    "teacher_heads": (tiny.head, lambda pooled: pooled @ weights),
  }
  variables = jax.jit(lambda: module.init(jax.random.key(0), **given))()
  output = jax.jit(lambda v: module.apply(v, **given))(variables)
  alone = distillers.create_for_teachers("simkd", (3.0, 1.0))
  own = {kind: tree["simkd"] for kind, tree in variables.items()}
  expected = jax.jit(lambda v: alone.apply(v, **given))(own)
  np.testing.assert_allclose(output.logits, expected.logits, rtol=1e-6)
  for term, value in expected.terms.items():
    np.testing.assert_allclose(output.terms[term], value, rtol=1e-6)
  with pytest.raises(ValueError, match="crd learns from one teacher, got 2"):
    distillers.create_for_teachers("kd+crd", (3.0, 1.0))


def test_constants_are_those_of_the_members(tiny):
  norms = [(jnp.ones(8), jnp.zeros(8)), (jnp.ones(16), jnp.zeros(16))]
  teacher = types.SimpleNamespace(stage_norms=lambda params: norms)
  both = distillers.create("dkd+ofd")
  found = both.teacher_constants((teacher,), ({"params": {}},))
  expected = tiny.shapes(both)["constants"]
  assert [*expected] == ["ofd"]
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
