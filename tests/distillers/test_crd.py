import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def crd(tiny):
  module = tiny.create("crd")
  return module, tiny.init(module)


def test_init_makes_banks_of_the_training_set(tiny, crd):
  module, variables = crd
  memory = tiny.real_init(module)["memory"]
  for name in ("order", "class_start", "class_count"):
    np.testing.assert_array_equal(memory[name], variables["memory"][name])
  assert memory["bank_s"].shape == memory["bank_t"].shape == (40, 8)
  bound = 1 / np.sqrt(8 / 3)
  for bank in (memory["bank_s"], memory["bank_t"]):
    assert float(jnp.abs(bank).max()) <= bound
    np.testing.assert_allclose(jnp.std(bank), bound / np.sqrt(3), rtol=0.15)
  assert not np.array_equal(memory["bank_s"], memory["bank_t"])
  assert float(memory["z_s"]) == float(memory["z_t"]) == 0.0
  assert sorted(np.asarray(memory["order"])) == list(range(40))


def test_a_step_moves_only_its_own_rows(tiny, crd):
  module, variables = crd
  _, moved = tiny.apply(module, variables)
  for bank in ("bank_s", "bank_t"):
    before, after = variables["memory"][bank], moved["memory"][bank]
    rows = np.flatnonzero(np.any(np.asarray(before != after), axis=1))
    assert list(rows) == sorted(tiny.batch["index"])
    np.testing.assert_allclose(
      np.linalg.norm(np.asarray(after)[rows], axis=1), 1.0, rtol=1e-5
    )


def test_momentum_one_only_normalises(tiny, crd):
  _, variables = crd
  _, moved = tiny.apply(tiny.create("crd", momentum=1.0), variables)
  index = tiny.batch["index"]
  old = np.asarray(variables["memory"]["bank_s"])[index]
  np.testing.assert_allclose(
    np.asarray(moved["memory"]["bank_s"])[index],
    old / np.linalg.norm(old, axis=1, keepdims=True),
    rtol=1e-5,
  )


def test_the_first_batch_fixes_the_normalisers(tiny, crd):
  module, variables = crd
  _, first = tiny.apply(module, variables, seed=1)
  z = float(first["memory"]["z_s"])
  assert z > 0
  _, second = tiny.apply(module, {**variables, **first}, seed=2)
  assert float(second["memory"]["z_s"]) == z
  assert float(second["memory"]["z_t"]) == float(first["memory"]["z_t"])


def test_negatives_follow_the_step_key_unless_given(tiny, crd):
  module, variables = crd

  def term(seed, **extra):
    batch = {**tiny.batch, **extra}
    output, _ = tiny.apply(module, variables, seed=seed, batch=batch)
    return np.asarray(output.terms["crd"])

  assert np.array_equal(term(1), term(1))
  assert not np.array_equal(term(1), term(2))
  given = {"negatives": np.full((8, 5), 9, np.int32)}
  assert np.array_equal(term(1, **given), term(2, **given))


def test_an_examples_draw_does_not_depend_on_its_place(tiny, crd):
  """Order in the batch, and so the split over devices, changes nothing."""
  module, variables = crd

  def flip(tree):
    return jax.tree.map(lambda x: x[::-1], tree)

  plain, _ = tiny.apply(module, variables)
  flipped, _ = tiny.apply(
    module,
    variables,
    student=flip(tiny.student),
    teacher=flip(tiny.teacher),
    batch=flip(tiny.batch),
  )
  np.testing.assert_allclose(
    plain.terms["crd"], flipped.terms["crd"][::-1], rtol=1e-5
  )


def test_evaluation_leaves_the_term_out(tiny, crd):
  module, variables = crd
  batch = {"label": tiny.batch["label"]}
  output, _ = tiny.apply(module, variables, train=False, batch=batch)
  assert set(output.terms) == {"ce", "kd"}


def test_bad_input(tiny, crd):
  module, variables = crd
  with pytest.raises(ValueError, match=r"train_labels.*got only index, label"):
    tiny.init(module, batch=tiny.batch)
  with pytest.raises(ValueError, match=r"batch\['index'\].*got only label"):
    tiny.apply(module, variables, batch={"label": tiny.batch["label"]})
  with pytest.raises(ValueError, match="'exact' or 'relax', got 'loose'"):
    tiny.init(tiny.create("crd", mode="loose"))
