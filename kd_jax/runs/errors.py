"""Errors that end a run."""


class NonFiniteLossError(RuntimeError):
  """The loss became infinite or not a number."""


class PreemptedError(RuntimeError):
  """The run was asked to stop, and has saved what it needs to resume."""


class UnsavedError(RuntimeError):
  """A checkpoint, a metric or a result could not be written."""


class StoppedUnsavedError(UnsavedError):
  """The run was asked to stop, and what it needs could not be written."""


class CellsFailedError(RuntimeError):
  """Runs of a grid have failed; the others have been run."""


# Raised by every process at the same step: they can take leave of each other.
AGREED = (NonFiniteLossError, PreemptedError, CellsFailedError)
