import jax
import jax.numpy as jnp
import numpy as np
from method_cases import Golden, LossCase, Method, normal

from kd_jax import distillers, losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "tfkd_loss": LossCase(
      (S, T),
      kwargs={"temperature": 4.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T),
    )
  },
  fields={"correct_prob": None},
  weights={"ce": 0.1, "kd": 0, "tfkd": 0.9},
  golden=(
    Golden(
      "tfkd_self",
      lambda case: {"temperature": case["temperature"]},
      weights=lambda case: {"ce": 1 - case["alpha"], "tfkd": case["alpha"]},
    ),
  ),
)


def test_without_a_teacher(golden_inputs):
  inputs = golden_inputs
  ((_, case),) = inputs.cases("tfkd_reg")
  module = distillers.create(
    "tfkd", **{n: case[n] for n in ("temperature", "correct_prob")}
  )
  student = inputs.output("", "s")

  def loss(logits):
    terms = module.apply(
      {},
      student._replace(logits=logits),
      (),
      {"label": inputs.labels(case)},
      teacher_heads=(),
      **{"step": 0, "epoch": 1, "train": True, "method": "distill"},
    ).terms
    assert set(terms) == {"ce", "tfkd"}
    alpha = case["alpha"]
    return jnp.mean((1 - alpha) * terms["ce"] + alpha * terms["tfkd"])

  value, gradient = jax.jit(jax.value_and_grad(loss))(student.logits)
  np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
  inputs.assert_gradient(gradient, case["grad"]["logits_s"], "tfkd_reg")


def test_a_label_that_does_not_exist_is_not_a_number():
  labels = np.array([0, 7, -1, 6])
  run = jax.jit(
    lambda labels: losses.tfkd_regularization(
      S, labels, temperature=20.0, correct_prob=0.99
    )
  )
  np.testing.assert_array_equal(np.isnan(run(labels)), [0, 1, 1, 0])
