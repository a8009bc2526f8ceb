"""Statistics over trials."""

import numpy as np

# Below this p, one mean counts as better than another.
LEVEL = 0.05


def mean_std(values: np.ndarray, digits: int) -> str:
  """Mean ± sample standard deviation; one value stands alone."""
  text = f"{values.mean():.{digits}f}"
  if len(values) > 1:
    text += f" ± {values.std(ddof=1):.{digits}f}"
  return text


def welch(a: np.ndarray, b: np.ndarray) -> dict[str, str]:
  """Compares two means by Welch's two-sided t-test (Biometrika, 1947).

  Args:
    a: [n] values, of the higher mean.
    b: [m] values.

  Returns:
    Cells of a table: t, degrees of freedom, p and the verdict. Without a test
    (one trial, no spread, a value that is not finite) numbers are "-".
  """
  from scipy import stats  # takes half a second

  numbers = dict.fromkeys(("t", "degrees of freedom", "p"), "-")
  if not np.isfinite([*a, *b]).all():
    return {**numbers, "verdict": "no test: not finite"}
  if min(len(a), len(b)) < 2:
    return {**numbers, "verdict": "no test: one trial"}
  if not np.ptp(a) and not np.ptp(b):
    return {**numbers, "verdict": "no test: no spread"}
  test = stats.ttest_ind(a, b, equal_var=False)
  return {
    "t": f"{test.statistic:.2f}",
    "degrees of freedom": f"{test.df:.1f}",
    "p": f"{test.pvalue:.2g}",
    "verdict": "better" if test.pvalue < LEVEL else "not told apart",
  }
