"""Images that a run leaves out because they cannot be decoded."""

import logging

from kd_jax.data.common import EncodedSource
from kd_jax.data.images import BadImageError

_log = logging.getLogger(__name__)

# After so many bad images in a row, the data are assumed to be gone.
MOST_IN_A_ROW = 100


class Skipped:
  """The images that a run left out as bad, each counted once.

  Each process adds those that it finds, and merges those of the other
  processes and of the run before a restart.
  """

  def __init__(self):
    self._found: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._found)

  def add(self, index: int, reason: str) -> None:
    """Adds an image, and logs it the first time.

    Args:
      index: its position in the set.
      reason: a text that names the file.
    """
    if index not in self._found:
      self._found[index] = reason
      _log.warning("Left out (%d so far): %s", len(self._found), reason)

  def reasons(self) -> list[str]:
    """Returns the reason of each, in the order of the set."""
    return [self._found[index] for index in sorted(self._found)]

  def get_state(self) -> dict[str, str]:
    """Returns the reasons by position, as a dict that JSON can hold."""
    return {str(index): reason for index, reason in self._found.items()}

  def merge(self, state: dict[str, str]) -> None:
    """Adds what is in a state of `get_state`, without logging it."""
    for index, reason in state.items():
      self._found.setdefault(int(index), reason)


def check_in_a_row(source: EncodedSource, in_a_row: int, last: str) -> None:
  """Raises BadImageError if too many images in a row are bad.

  Args:
    source: the set.
    in_a_row: how many.
    last: the reason of the last one.
  """
  if in_a_row >= min(len(source), MOST_IN_A_ROW):
    raise BadImageError(
      f"{in_a_row} images in a row cannot be decoded; the last: {last}. Check"
      " that the data are still whole."
    )
