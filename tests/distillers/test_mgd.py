import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 2, 4, 4, 4, 3)


def golden_noise(inputs, case):
  channels = dict(case["modules"]["mgd"])["generation.2.bias"][0]
  thousandths = inputs.rebuild.integers(
    "mgd_noise", 1000, (inputs.batch, channels, 1, 1), seed=inputs.seed
  )
  return {"noise": jnp.asarray(thousandths[:, :, 0, 0] / 1000, jnp.float32)}


METHOD = Method(
  losses={"mgd_loss": LossCase((S, T), minimum=(T, T))},
  fields={"mask_ratio": 0.5},
  weights={"ce": 1, "kd": 0, "mgd": 7e-5},
  reference=(
    (r"generate(\d)", lambda m: f"generation.{2 * int(m[1]) - 2}"),
    ("align", "align"),
  ),
  golden=(
    Golden(
      "mgd",
      lambda case: {"mask_ratio": case["mask_ratio"]},
      prefix=lambda case: "mgd.",
      weights=lambda case: {"mgd": case["alpha"]},
      batch=golden_noise,
    ),
  ),
)


def test_a_channel_is_masked_where_its_noise_is_low():
  noise = np.array([[0.1, 0.5, 0.9]] * 3 + [[0.6, 0.4, 0.2]], np.float32)
  masked = losses.mgd_mask(S, noise, ratio=0.5)
  visible = np.array([[0, 1, 1]] * 3 + [[1, 0, 0]])
  np.testing.assert_array_equal(masked, S * visible[:, None, None])
  for ratio in (-0.1, 1.0):
    with pytest.raises(ValueError, match="ratio: expected"):
      losses.mgd_mask(S, noise, ratio=ratio)


def test_masks_change_with_the_key_and_follow_their_examples(tiny):
  module = tiny.create("mgd", mask_ratio=0.5)
  variables = tiny.init(module)

  def term(order=slice(None), **given):
    inputs = ((n, getattr(tiny, n)) for n in ("student", "teacher", "batch"))
    given |= {n: jax.tree.map(lambda x: x[order], x) for n, x in inputs}
    return tiny.apply(module, variables, **given)[0].terms["mgd"]

  first, order = term(), np.arange(8)[::-1]
  np.testing.assert_allclose(term(order), first[order], rtol=1e-5)
  assert np.all(np.abs(term(seed=2) - first) > 1e-3 * first)


def test_a_step_without_positions_is_refused(tiny):
  module = tiny.create("mgd")
  batch = {"label": tiny.batch["label"]}
  with pytest.raises(ValueError, match=r"batch\['index'\].*got only label"):
    module.apply(tiny.init(module), **tiny.given(batch=batch))
