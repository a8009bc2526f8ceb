"""Statistics over trials."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Welch:
  """Welch's test of two means that need not have the same variance."""

  t: float
  degrees: float
  p: float


def welch(a: np.ndarray, b: np.ndarray) -> Welch | None:
  """Welch's two-sided t-test (Biometrika, 1947) of two means.

  Args:
    a: [n] values.
    b: [m] values.

  Returns:
    t (above 0 if a's mean is higher), the degrees of freedom of Welch and
    Satterthwaite, and p; None if a sample has one value, or neither varies.
  """
  from scipy import stats  # takes half a second

  if min(len(a), len(b)) < 2:
    return None
  parts = np.array([np.var(x, ddof=1) / len(x) for x in (a, b)])
  if not parts.sum():
    return None
  t = (np.mean(a) - np.mean(b)) / math.sqrt(parts.sum())
  freedoms = np.array([len(a) - 1, len(b) - 1])
  degrees = parts.sum() ** 2 / (parts**2 / freedoms).sum()
  return Welch(float(t), float(degrees), float(2 * stats.t.sf(abs(t), degrees)))
