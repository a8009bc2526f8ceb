import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Curve, Golden, LossCase, Method, log_softmax, normal

from kd_jax import losses

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "kd_loss": LossCase(
      (S, T),
      kwargs={"temperature": 4.0},
      refused={"temperature": (0.0, -1.0)},
      minimum=(T, T),
    )
  },
  fields={"temperature": 4.5},
  weights={"ce": 1, "kd": 1},
  golden=(
    Golden(
      r"(kd|funmatch_kl)_T[\d.]+",
      lambda case: {"temperature": case["temperature"]},
    ),
    Golden(
      r"lskd_T\d",
      lambda case: {"temperature": case["temperature"], "standardize": True},
    ),
  ),
  curves=(
    Curve("kd"),
    Curve(
      "lskd",
      lambda curves: {"temperature": 2.0, "standardize": True},
      folder="train_2",
    ),
    Curve("dot", folder="train_2", dot_delta=0.075),
  ),
)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("temperature", [0.5, 4.0, 1e3, 1e5])
def test_in_float64(temperature, scale):
  """Where predictions are alike, a difference of logarithms is all rounding."""
  z, t = np.float32(scale) * S, np.float32(scale) * T
  log_q, log_p = (log_softmax(x.astype(float) / temperature) for x in (z, t))
  p = np.exp(log_p)
  q_minus_p = np.exp(log_q) - p

  def loss(z):
    return losses.kd_loss(z, t, temperature=temperature)

  value, vjp = jax.vjp(loss, z)
  expected = temperature**2 * np.sum(p * (log_p - log_q), 1)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(
    vjp(jnp.ones(4))[0],
    temperature * q_minus_p,
    rtol=1e-4,
    atol=1e-6 * temperature * np.abs(q_minus_p).max(),
  )


@pytest.mark.parametrize("temperature", [3.0, 5.0, 6.0])
def test_huge_logits_at_temperatures_that_are_rounded(temperature):
  """XLA may round z / T in two ways; 1e10 / 3 once came out as infinite."""
  z = 1e10 * normal(5, 2, 8, 100)

  @jax.jit
  def value(s, t):
    return losses.kd_loss(s, t, temperature=temperature)

  assert np.isfinite(value(*z)).all()
