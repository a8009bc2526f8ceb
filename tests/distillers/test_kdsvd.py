import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

from kd_jax import losses

# The second map of each has fewer positions than channels.
STUDENTS = [normal(0, 4, 4, 4, 3), normal(1, 4, 2, 2, 5)]
TEACHERS = [normal(2, 4, 5, 5, 3), normal(3, 4, 2, 2, 5)]
METHOD = Method(
  losses={
    "kdsvd_loss": LossCase(
      (STUDENTS, TEACHERS),
      minimum=(STUDENTS, [2 * STUDENTS[0], -3 * STUDENTS[1]]),
      scale_free=True,
    )
  },
  fields={"over": None},
  small={"over": "width"},  # the tiny networks have unequal channels
  weights={"ce": 1, "kd": 0, "kdsvd": 1},
  golden=(
    Golden("kdsvd"),
    Golden("kdsvd_width", lambda case: {"over": "width"}),
  ),
  curves=(Curve("kdsvd", folder="train_2"),),
)


def transcribed(students, teachers):
  """The formula in float64, of one example's matrices [P, C]."""
  total, before = 0, None
  for s, t in zip(students, teachers):
    w = np.linalg.svd(t, full_matrices=False)[2][0]
    w = w * np.sign(w.sum())
    rows = np.linalg.svd(s, full_matrices=False)[2][:4]
    v = rows[np.argmax(np.abs(rows @ w))]
    v = v * np.sign(v @ w)
    if before:
      v_g, w_g = (
        np.exp(-np.square(x[:, None] - y[None]) / 8)
        for x, y in zip((v, w), before)
      )
      total += np.sum(np.square(v_g - w_g))
    before = v, w
  return total


def matrices(maps, example):
  return [np.float64(x[example]).reshape(-1, x.shape[-1]) for x in maps]


@pytest.fixture(scope="module")
def value_and_grad():
  def loss(students, teachers):
    value = losses.kdsvd_loss(students, teachers)
    return jnp.sum(value), value

  compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def run(students, teachers):
    (_, value), gradients = compiled(students, teachers)
    return value, gradients

  return run


def test_value_and_gradient_are_the_formulas(value_and_grad):
  """Of vectors that are not the student's first, too."""
  value, gradients = value_and_grad(STUDENTS, TEACHERS)
  positions = set()
  for b in range(4):
    s, t = matrices(STUDENTS, b), matrices(TEACHERS, b)
    np.testing.assert_allclose(value[b], transcribed(s, t), rtol=1e-5)
    for x, y in zip(s, t):
      rows, (w, *_) = (np.linalg.svd(m, full_matrices=False)[2] for m in (x, y))
      positions.add(int(np.argmax(np.abs(rows @ w))))
    for i, gradient in enumerate(gradients):
      moved = np.random.default_rng(i).standard_normal(s[i].shape)
      ends = []
      for step in (-1e-5, 1e-5):
        changed = [x + step * moved if j == i else x for j, x in enumerate(s)]
        ends.append(transcribed(changed, t))
      slope = (ends[1] - ends[0]) / 2e-5
      found = np.sum(gradient[b].reshape(s[i].shape) * moved)
      np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-5)
  assert positions > {0}


def test_no_one_and_equal_singular_values(value_and_grad):
  """Zeros, rank 1, and three equal values; the last map is as any."""
  maps = np.copy(STUDENTS[0])
  maps[:3] = 0
  maps[1, 0, 0] = 1
  maps[2] = np.eye(16, 3).reshape(4, 4, 3)
  value, gradients = value_and_grad([maps, STUDENTS[1]], TEACHERS)
  assert np.isfinite(value).all()
  assert all(np.isfinite(g).all() for g in gradients)
  sizes = np.abs(gradients[0]).max(axis=(1, 2, 3))
  np.testing.assert_array_equal(sizes > 0, [False, True, False, True])


def test_signs_do_not_count(value_and_grad):
  """Those of a map are those that the decomposition happens to return."""
  value, _ = value_and_grad(STUDENTS, TEACHERS)
  turned, _ = value_and_grad([-x for x in STUDENTS], [-x for x in TEACHERS])
  np.testing.assert_allclose(turned, value, rtol=1e-5)


def test_a_single_map_is_refused():
  with pytest.raises(ValueError, match="expected at least two maps, got one"):
    losses.kdsvd_loss(STUDENTS[:1], TEACHERS[:1])


def test_channels(tiny, make_output):
  """They must be equal, unless columns are compared."""
  words = r"student_maps\[0\] .* expected equal channels, got 6 and 8; choose"
  with pytest.raises(ValueError, match=words):
    tiny.shapes(tiny.create("kdsvd", over="channels"))
  with pytest.raises(ValueError, match="'channels' or 'width', got 'height'"):
    tiny.shapes(tiny.create("kdsvd", over="height"))
  teacher = make_output(5, sizes=(8, 2))
  module = tiny.create("kdsvd", over="channels")
  output, _ = tiny.apply(module, {}, teacher=teacher)
  expected = losses.kdsvd_loss(tiny.student.stages(), teacher.stages())
  np.testing.assert_allclose(output.terms["kdsvd"], expected, rtol=1e-4)
