import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Golden, LossCase, Method, normal

from kd_jax import distillers, losses
from kd_jax.losses import funmatch

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "funmatch_loss": LossCase(
      (S, T),
      kwargs={"temperature": 4.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T),
    )
  },
  fields={"distance": "l2", "teacher_smoothing": None},
  weights={"ce": 0, "kd": 0, "funmatch": 1},
  data={"mixup": 1.0},
  golden=(
    Golden(
      r"funmatch_kl_T\d+", lambda case: {"temperature": case["temperature"]}
    ),
    *(
      Golden(f"funmatch_{name}", lambda case, name=name: {"distance": name})
      for name in ("l2", "euclidean", "logsoftmax_euclidean")
    ),
    Golden(
      r"funmatch_hard_ls[\d.]+",
      lambda case: {
        "distance": "hard",
        "teacher_smoothing": case["label_smoothing"],
      },
    ),
  ),
)


def test_two_teachers_give_the_mean(golden_inputs):
  """The golden value is the sum."""
  ((_, case),) = golden_inputs.cases("funmatch_kl_two_teachers")
  module = distillers.create_for_teachers(
    "funmatch", (1.0, 1.0), temperature=case["temperature"]
  )
  student, *teachers = (
    golden_inputs.output("", "s")._replace(logits=golden_inputs.tensor(name))
    for name in (*case["student"], *case["teacher"])
  )

  def loss(logits):
    output = module.apply(
      {},
      student._replace(logits=logits),
      tuple(teachers),
      {"label": golden_inputs.labels(case)},
      teacher_heads=(None, None),
      **{"step": 0, "epoch": 1, "train": True, "method": "distill"},
    )
    return 2 * jnp.mean(output.terms["funmatch"])

  value, gradient = jax.jit(jax.value_and_grad(loss))(student.logits)
  np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
  golden_inputs.assert_gradient(gradient, case["grad"]["logits_s"], "two")


@pytest.mark.parametrize("distance", funmatch.DISTANCES[1:])
def test_every_distance_stays_finite(distance):
  """For huge logits, equal networks and a batch of one."""
  largest = T.max(-1, keepdims=True)
  one_hot = np.where(largest == T, 1e4, -1e4)

  def loss(s, t):
    return jnp.mean(losses.funmatch_loss(s, t, distance=distance))

  both = jax.jit(jax.value_and_grad(loss, (0, 1)))
  for s, t in ((1e4 * S, one_hot), (T, T), (0 * S, 0 * T), (S[:1], T[:1])):
    s, t = (x.astype(np.float32) for x in (s, t))
    for x in jax.tree.leaves(both(s, t)):
      assert np.isfinite(x).all()
  if distance != "hard":
    np.testing.assert_allclose(both(T, T)[0], 0, atol=1e-5)


def test_bad_input():
  with pytest.raises(ValueError, match=r"expected one of kl, l2.*got 'l3'"):
    losses.funmatch_loss(S, T, distance="l3")
  with pytest.raises(ValueError, match=r"teacher_smoothing: expected.*below 1"):
    losses.funmatch_loss(S, T, distance="hard", teacher_smoothing=1.0)
