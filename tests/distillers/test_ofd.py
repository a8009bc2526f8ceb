import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, normal
from scipy import stats

from kd_jax import losses, models
from kd_jax.training import loss

S, T = normal(0, 2, 4, 6, 6, 5)
SMALL_S, SMALL_T = normal(1, 4, 3, 3, 7), normal(2, 4, 6, 6, 7)
MARGINS = [-np.abs(normal(3, 5)), -np.abs(normal(4, 7))]


def margins(inputs, case):
  """Of the BatchNorms that the golden case names."""
  found = {}
  for i, name in enumerate(case["teacher"]):
    shape = inputs.tensor(name).shape[-1:]
    scale, bias = (
      inputs.rebuild.fill(f"ofd_teacher_bn{i}.{leaf}", shape, seed=inputs.seed)
      for leaf in ("weight", "bias")
    )
    found[f"margin{i + 1}"] = margin = losses.ofd_margin(scale, bias)
    np.testing.assert_allclose(margin[:8], case["margins"][i], rtol=1e-6)
  return found


METHOD = Method(
  losses={
    "ofd_loss": LossCase(
      ([S, SMALL_S], [T, SMALL_T], MARGINS),
      minimum=([S, SMALL_T], [S, SMALL_T], [m - 9 for m in MARGINS]),
    )
  },
  weights={"ce": 1, "kd": 0, "ofd": 0.001},
  reference=(
    (r"connector(\d+)/conv", lambda m: f"connectors.{int(m[1]) - 1}.0"),
    (r"connector(\d+)/bn", lambda m: f"connectors.{int(m[1]) - 1}.1"),
  ),
  golden=(
    Golden("ofd", prefix=lambda case: "ofd.connectors.", constants=margins),
  ),
  curves=(
    Curve("ofd", folder="train_2"),
    Curve("ofd", folder="train_2", pair=0),
  ),
)


def test_margins_are_the_means_of_truncated_normals():
  scale, bias = np.array(
    [[1, 0], [-0.5, 0.3], [2, -5], [0.7, 2.1], [1e-3, -1]], np.float32
  ).T
  expected = [
    stats.truncnorm(-np.inf, -mu / s, loc=mu, scale=s).mean()
    for s, mu in zip(np.abs(scale.astype(float)), bias.astype(float))
  ]
  found = losses.ofd_margin(scale, bias)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  # Rarely negative: three deviations. Never varying: the negative part.
  scale, bias = np.float32([[0.7, 2.8], [1e-9, 1], [0, -0.4], [0, 0], [0, 1]]).T
  expected = np.float32([-2.1, -3e-9, -0.4, 0, 0])
  np.testing.assert_allclose(losses.ofd_margin(scale, bias), expected)


def test_the_three_cases_and_the_stages_weights():
  """Element by element, as the paper writes it."""
  expected = np.zeros(4)
  target = np.asarray(losses.adaptive_average_pool(SMALL_T, (3, 3)))
  for weight, s, t, m in zip((0.5, 1), (S, SMALL_S), (T, target), MARGINS):
    case = np.zeros(s.shape)
    for at in np.ndindex(s.shape):
      x, y, margin = float(s[at]), float(t[at]), float(m[at[-1]])
      if y > 0:
        case[at] = (x - y) ** 2
      elif y > margin:
        case[at] = (x - y) ** 2 if x > y else 0
      else:
        case[at] = (x - margin) ** 2 if x > margin else 0
    expected += weight * case.sum((1, 2, 3))
  found = losses.ofd_loss([S, SMALL_S], [T, SMALL_T], MARGINS)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (([S], [T], MARGINS), r"student_maps and margins.*1 and 2"),
    ((S, T, MARGINS[1]), r"teacher_maps and margins.*one width"),
    ((S, SMALL_T, MARGINS[0]), r"student_maps and teacher_maps.*one width"),
  ],
)
def test_bad_input(arguments, words):
  with pytest.raises(ValueError, match=words):
    losses.ofd_loss(*arguments)


def test_stages_are_paired_from_the_last(tiny, make_output):
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  module = tiny.create("ofd")
  shapes = tiny.shapes(module, teacher=teacher)
  assert set(shapes["constants"]) == {"margin1", "margin2", "margin3"}
  kernels = [
    shapes["params"][f"connector{i}"]["conv"]["kernel"] for i in (1, 2)
  ]
  assert [x.shape[2:] for x in kernels] == [(6, 8), (12, 16)]
  variables = tiny.init(module, teacher=teacher)
  output, _ = tiny.apply(module, variables, teacher=teacher)
  variables["constants"]["margin1"] = jnp.full(8, jnp.nan)
  again, _ = tiny.apply(module, variables, teacher=teacher)
  assert np.isfinite(output.terms["ofd"]).all()
  np.testing.assert_array_equal(output.terms["ofd"], again.terms["ofd"])


def test_maps_without_a_preactivation_are_taken_as_they_are(tiny):
  def plain(output):
    features = {k: v for k, v in output.features.items() if "preact" not in k}
    return output._replace(features=features)

  module = tiny.create("ofd")
  variables = tiny.init(module)
  terms = [
    float(jnp.mean(tiny.apply(module, variables, **given)[0].terms["ofd"]))
    for given in ({}, {"student": plain(tiny.student)})
  ]
  assert terms[0] != terms[1]


@pytest.mark.parametrize(
  ("teacher", "student"),
  # Fewer stages and larger maps than the student's; then the other way round.
  [("wrn_16_1", "vgg8"), ("vgg8", "_tiny")],
)
def test_any_pair_needs_no_shapes_from_the_user(tiny, teacher, student):
  """Only the constants' and parameters' shapes: nothing is computed."""
  networks = [models.create(name, 5) for name in (student, teacher)]
  images = jnp.zeros((2, 32, 32, 3))

  def init(key):
    own, theirs = (network.init(key, images) for network in networks)
    return loss.init_distiller(
      tiny.create("ofd"),
      key,
      student=networks[0],
      student_variables=own,
      teachers=networks[1:],
      teacher_variables=(theirs,),
      images=images,
      batch={"label": jnp.zeros(2, jnp.int32)},
    )

  with jax.numpy_rank_promotion("allow"):  # by the networks
    shapes = jax.eval_shape(init, jax.random.key(0))
  assert all(x.ndim == 1 for x in shapes["constants"].values())
