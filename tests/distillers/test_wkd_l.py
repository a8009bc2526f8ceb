import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import LossCase, Method, normal

from kd_jax import distillers, losses

S, T = 3 * normal(0, 2, 4, 7)
LABELS = np.array([0, 6, 2, 2], np.int32)
COST = np.asarray(losses.wkd_l_cost(normal(1, 7, 5)))
SETTINGS = {
  **{"temperature": 4.0, "gamma": 2.0, "regularization": 0.05},
  "iterations": 1,
}
METHOD = Method(
  losses={
    "wkd_l_loss": LossCase(
      (S, T, LABELS, COST),
      kwargs=SETTINGS,
      refused={
        "temperature": (0.0, -1.0),
        "gamma": (-1.0,),
        "regularization": (0.0, -1.0),
        "iterations": (0, -1, 2.5),
      },
      trained=(0, 1, 3),
    )
  },
  fields={
    **{"gamma": 2.0, "regularization": 0.1, "iterations": 1, "sharpen": 3.0},
    **{"decay_start": None, "decay_end": None},
  },
  weights={"ce": 1, "kd": 0, "wkd_l": 1},
)


def test_golden(golden_inputs):
  """Its case has the classifier's weights in place of features."""
  inputs = golden_inputs
  ((_, case),) = inputs.cases("wkd_logit")
  name, _, shape = case["teacher"][1].partition(":")
  shape = [int(n) for n in shape.split(",")]
  weights = inputs.rebuild.fill(name, shape, seed=inputs.seed)
  module = distillers.create(
    "wkd_l",
    **{name: case[name] for name in ("temperature", "gamma", "sharpen")},
    regularization=case["sinkhorn_reg"],
    iterations=case["sinkhorn_iterations"],
  )
  student, teacher = (inputs.output("", side) for side in "st")
  pooled = jnp.zeros((inputs.batch, shape[1]))
  teacher = teacher._replace(features={"pooled": pooled})

  def loss(logits):
    output = module.apply(
      {},
      student._replace(logits=logits),
      teacher,
      {"label": inputs.labels(case)},
      teacher_head=lambda x: x @ weights.T + 1.0,
      **{"step": 0, "epoch": 1, "train": True},
    )
    return jnp.mean(output.terms["wkd_l"])

  value, gradient = jax.jit(jax.value_and_grad(loss))(student.logits)
  np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
  inputs.assert_gradient(gradient, case["grad"]["logits_s"], "wkd_l")


def test_what_a_flow_costs():
  """Many iterations find the cheapest: here only one class has to move."""
  line = np.abs(np.arange(4.0)[:, None] - np.arange(4.0)[None]) / 20
  p, q = (
    np.array([[1.0, a, b, c]], np.float32)
    for a, b, c in ((0.5, 0.3, 0.2), (0.3, 0.3, 0.4))
  )
  label = np.array([0])

  def cost(gamma):
    return losses.wkd_l_loss(
      *(np.log(p), np.log(q), label, line.astype(np.float32)),
      **{"temperature": 1.0, "gamma": gamma, "regularization": 0.01},
      iterations=300,
    )[0]

  # 0.2 goes two classes up.
  np.testing.assert_allclose(cost(1.0) - cost(0.0), 0.2 * 2 / 20, rtol=1e-3)


def test_costs_of_a_classifier():
  rows = np.array([[2, 0], [1, 0], [0, 3], [-1, 0]], np.float32)
  found = losses.wkd_l_cost(rows, sharpen=2.0)
  cosine = [[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]]
  expected = 1 - np.exp(-2 * (1 - np.array(cosine)))
  np.testing.assert_allclose(found, expected, atol=1e-6)
  for x in (np.zeros((3, 2), np.float32), 1e20 * rows, 1e-20 * rows):
    assert np.isfinite(losses.wkd_l_cost(x)).all()


def test_the_cost_fades_out(golden):
  schedules = json.loads((golden / "losses_2.json").read_text())["schedules"]
  for epoch, factor in schedules["wkd_weight"].items():
    found = losses.wkd_decay(int(epoch), start=150, end=240)
    np.testing.assert_allclose(found, factor, rtol=1e-5, atol=1e-7)
  assert float(losses.wkd_decay(300, start=150, end=240)) == 0.0
  with pytest.raises(ValueError, match=r"end: expected .* at least 151"):
    losses.wkd_decay(1, start=150, end=150)


def test_the_cost_of_an_epoch(tiny):
  """Epoch 1 of a decay from 0 to 2 has half of it."""
  full, half, none = (
    tiny.term("wkd_l", decay_start=start, decay_end=end)
    for start, end in ((1, 2), (0, 2), (0, 1))
  )
  np.testing.assert_allclose(half, (full + none) / 2, rtol=1e-5)
  assert full > 1.1 * none > 0  # the part of the label stays


def test_two_classes_are_refused():
  with pytest.raises(ValueError, match="at least 3 classes, got 2"):
    losses.wkd_l_loss(S[:, :2], T[:, :2], LABELS // 6, COST, **SETTINGS)


def test_costs_of_other_classes_are_refused():
  with pytest.raises(ValueError, match=r"cost: expected shape \(7, 7\).*\(6, "):
    losses.wkd_l_loss(S, T, LABELS, COST[:6], **SETTINGS)
