import numpy as np
import pytest
from method_cases import Golden, LossCase, Method, normal

from kd_jax import losses

S, T = normal(0, 4, 4, 4, 3), normal(1, 4, 8, 8, 3)
METHOD = Method(
  losses={
    "wkd_f_loss": LossCase(
      (S, T),
      kwargs={"mean_weight": 4.0, "grid": 1},
      refused={"mean_weight": (-1.0,), "grid": (0, -1, 2.5, 5)},
      minimum=(T, T),
    )
  },
  fields={
    **{"mean_weight": 2.0, "grid": 2},
    **{"decay_start": None, "decay_end": None},
  },
  weights={"ce": 1, "kd": 0, "wkd_f": 0.08},
  reference=((r"regressor/(de)?conv", "conv"), (r"regressor/bn", "bn")),
  golden=(
    Golden(
      "wkd_feature",
      lambda case: {"mean_weight": case["mean_cov_ratio"]},
      prefix=lambda case: "conv_reg.",
    ),
  ),
)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_the_distance_of_gaussians_in_each_region(grid):
  """Regions overlap if they do not divide the side, as in adaptive pooling."""

  def moments(x):
    size = x.shape[1]
    edges = [
      slice(int(np.floor(i * size / grid)), int(np.ceil((i + 1) * size / grid)))
      for i in range(grid)
    ]
    parts = [
      x[:, a, b].reshape(len(x), -1, x.shape[-1]).astype(np.float64)
      for a in edges
      for b in edges
    ]
    return [x.mean(1) for x in parts], [x.std(1, ddof=1) for x in parts]

  (mean_s, std_s), (mean_t, std_t) = moments(S), moments(T)
  expected = np.mean(
    [
      (2 * (a - b) ** 2 + (c - d) ** 2).sum(1)
      for a, b, c, d in zip(mean_s, mean_t, std_s, std_t)
    ],
    axis=0,
  )
  found = losses.wkd_f_loss(S, T, mean_weight=2.0, grid=grid)
  np.testing.assert_allclose(found, expected, rtol=1e-3)  # without the epsilon


def test_a_single_position_has_a_mean_only():
  s, t = S[:, :1, :1], T[:, :1, :1]
  found = losses.wkd_f_loss(s, t, mean_weight=1.0, grid=1)
  np.testing.assert_allclose(found, ((s - t) ** 2).sum((1, 2, 3)), rtol=1e-5)


def test_the_term_fades_out(tiny):
  """Epoch 1 of a decay from 0 to 2 has half of it."""
  full, half, none = (
    tiny.term("wkd_f", decay_start=start, decay_end=end)
    for start, end in ((1, 2), (0, 2), (0, 1))
  )
  np.testing.assert_allclose(half, full / 2, rtol=1e-5)
  assert full > none == 0.0
