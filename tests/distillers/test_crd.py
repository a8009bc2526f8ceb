import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, LossCase, Method, normal

from kd_jax import distillers
from kd_jax.models.layers import ModelOutputs


def with_golden_banks(variables, rebuild, seed):
  """Banks as the golden values have them."""
  memory = dict(variables["memory"])
  for bank, name in (("bank_s", "memory_v1"), ("bank_t", "memory_v2")):
    rows = rebuild.normal(name, memory[bank].shape, seed=seed)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    memory[bank] = jnp.asarray(rows)
  return {**variables, "memory": memory}


def golden_fields(case):
  return {
    "k": case["k"],
    "nce_temperature": case["temperature"],
    "momentum": case["momentum"],
  }


METHOD = Method(
  losses={
    "crd_loss": LossCase(
      (*(5 * normal(0, 2, 4, 9)), 3.4, 3.9),
      kwargs={"num_examples": 20},
      refused={"num_examples": (0, -1, 20.0)},
    )
  },
  fields={
    **{"k": 24, "nce_temperature": 0.08, "feat_dim": 12, "mode": "relax"},
    "momentum": None,
  },
  small={"k": 16, "feat_dim": 8},
  reference=(("embed_([st])/linear", r"embed_\1.linear"),),
  weights={"ce": 1, "kd": 1, "crd": 0.8},
  relational=True,
  curves=(
    Curve(
      "crd",
      lambda curves: golden_fields(curves["crd"]),
      prepare=with_golden_banks,
    ),
  ),
)


def test_golden(golden_inputs, fill_distiller, rebuild):
  """Two calls: the second sees the banks that the first has moved."""
  inputs = golden_inputs
  calls = {}
  for pair, case in inputs.cases(r"crd_call\d+"):
    calls.setdefault(pair, []).append(case)
  for pair, cases in calls.items():
    n = cases[0]["n_data"]
    student, teacher = inputs.output(pair, "s"), inputs.output(pair, "t")
    module = distillers.create("crd", **golden_fields(cases[0]))
    given = {"teacher_head": None, "step": 0, "epoch": 1, "train": True}
    label = inputs.labels({})
    batch = {"label": label, "train_labels": jnp.arange(n) % inputs.classes}
    variables = jax.jit(
      lambda key, m=module, s=student, t=teacher, b=batch, g=given: m.init(
        key, s, t, b, **g
      )
    )(jax.random.key(0))
    variables, _ = fill_distiller("crd", variables, "", inputs.seed)
    variables = with_golden_banks(variables, rebuild, inputs.seed)

    def loss(pooled, variables, batch, s=student, t=teacher, m=module, g=given):
      student = ModelOutputs(s.logits, {**s.features, "pooled": pooled})
      output, moved = m.apply(
        variables, student, t, batch, mutable=["memory"], **g
      )
      return jnp.mean(output.terms["crd"]), moved

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    start = variables["memory"]["bank_s"]
    for number, case in enumerate(cases):
      negatives = rebuild.integers(
        f"negatives{number}", n, (inputs.batch, case["k"]), seed=inputs.seed
      )
      batch = {
        "label": label,
        "index": jnp.asarray(case["index"], jnp.int32),
        "negatives": jnp.asarray(negatives, jnp.int32),
      }
      (value, moved), gradient = value_and_grad(
        student.features["pooled"], variables, batch
      )
      variables = {**variables, **moved}
      memory = variables["memory"]
      np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
      (expected,) = case["grad"].values()
      inputs.assert_gradient(gradient, expected, f"{pair} {number}")
      np.testing.assert_allclose(memory["z_s"], case["z_v1"], rtol=1e-5)
      np.testing.assert_allclose(memory["z_t"], case["z_v2"], rtol=1e-5)
      for bank, name in (("bank_s", "memory_v1"), ("bank_t", "memory_v2")):
        expected = case[f"{name}_probe"]
        found = rebuild.probe(memory[bank], len(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
      change = np.linalg.norm(memory["bank_s"] - start)
      np.testing.assert_allclose(
        change, case["memory_v1_norm_change"], rtol=1e-4
      )


@pytest.fixture(scope="module")
def made(tiny):
  module = tiny.create("crd")
  return module, tiny.init(module)


def test_init_makes_banks_of_the_training_set(tiny, made):
  memory = made[1]["memory"]
  assert memory["bank_s"].shape == memory["bank_t"].shape == (40, 8)
  bound = 1 / np.sqrt(8 / 3)
  for bank in (memory["bank_s"], memory["bank_t"]):
    assert float(jnp.abs(bank).max()) <= bound
    np.testing.assert_allclose(jnp.std(bank), bound / np.sqrt(3), rtol=0.15)
  assert not np.array_equal(memory["bank_s"], memory["bank_t"])
  assert float(memory["z_s"]) == float(memory["z_t"]) == 0.0
  order = np.argsort(tiny.train_labels, kind="stable")
  np.testing.assert_array_equal(memory["order"], order)
  np.testing.assert_array_equal(memory["class_count"], [8] * 5)
  np.testing.assert_array_equal(memory["class_start"], 8 * np.arange(5))


def test_a_step_moves_only_its_own_rows(tiny, made):
  module, variables = made
  index = tiny.batch["index"]
  _, moved = tiny.apply(module, variables)
  for bank in ("bank_s", "bank_t"):
    before, after = variables["memory"][bank], moved["memory"][bank]
    rows = np.flatnonzero(np.any(np.asarray(before != after), axis=1))
    assert list(rows) == sorted(index)
    lengths = np.linalg.norm(np.asarray(after)[rows], axis=1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)
  # With momentum 1, rows are only normalised.
  _, moved = tiny.apply(tiny.create("crd", momentum=1.0), variables)
  old = np.asarray(variables["memory"]["bank_s"])[index]
  np.testing.assert_allclose(
    np.asarray(moved["memory"]["bank_s"])[index],
    old / np.linalg.norm(old, axis=1, keepdims=True),
    rtol=1e-5,
  )


def test_the_first_batch_fixes_the_normalisers(tiny, made):
  module, variables = made
  _, first = tiny.apply(module, variables, seed=1)
  _, second = tiny.apply(module, {**variables, **first}, seed=2)
  for z in ("z_s", "z_t"):
    assert 0 < float(first["memory"][z]) == float(second["memory"][z])


@pytest.mark.parametrize("temperature", [0.012, 0.002])
def test_a_low_temperature_has_a_normaliser(tiny, made, temperature):
  """exp(1 / t) is beyond float32 below t = 0.0113."""
  module = tiny.create("crd", nce_temperature=temperature)
  output, first = tiny.apply(module, made[1], seed=1)
  variables = {**made[1], **first}
  again, second = tiny.apply(module, variables, seed=1)
  for z in ("z_s", "z_t"):
    assert float(first["memory"][z]) == float(second["memory"][z]) != 0
  for terms in (output.terms, again.terms):
    assert np.all(np.isfinite(terms["crd"]))


def test_negatives_follow_the_step_key_unless_given(tiny, made):
  module, variables = made

  def term(seed, **extra):
    batch = {**tiny.batch, **extra}
    output, _ = tiny.apply(module, variables, seed=seed, batch=batch)
    return np.asarray(output.terms["crd"])

  assert np.array_equal(term(1), term(1))
  assert not np.array_equal(term(1), term(2))
  given = {"negatives": np.full((8, 5), 9, np.int32)}
  assert np.array_equal(term(1, **given), term(2, **given))


def test_evaluation_leaves_the_term_out(tiny, made):
  module, variables = made
  batch = {"label": tiny.batch["label"]}
  output, _ = tiny.apply(module, variables, train=False, batch=batch)
  assert set(output.terms) == {"ce", "kd"}


def test_bad_input(tiny, made):
  module, variables = made
  with pytest.raises(ValueError, match=r"train_labels.*got only index, label"):
    tiny.shapes(module, batch=tiny.batch)
  with pytest.raises(ValueError, match=r"batch\['index'\].*got only label"):
    tiny.apply(module, variables, batch={"label": tiny.batch["label"]})
  with pytest.raises(ValueError, match="'exact' or 'relax', got 'loose'"):
    tiny.shapes(tiny.create("crd", mode="loose"))
