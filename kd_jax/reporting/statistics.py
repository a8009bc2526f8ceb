"""Statistics over trials."""

import dataclasses

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

  if min(len(a), len(b)) < 2 or not (np.ptp(a) or np.ptp(b)):
    return None
  test = stats.ttest_ind(a, b, equal_var=False)
  return Welch(float(test.statistic), float(test.df), float(test.pvalue))
