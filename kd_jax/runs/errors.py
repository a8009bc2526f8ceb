"""Errors that end a run on every process at the same step."""

import logging

from kd_jax.runs import checkpoint

_log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
  """The loss became infinite or not a number."""


class PreemptedError(RuntimeError):
  """The run was asked to stop, and has saved what it needs to go on."""


class UnsavedStopError(PreemptedError):
  """The run was asked to stop, and could not save what it had come to."""


# What ends a run in all processes, at the same step.
AGREED = (NonFiniteLossError, PreemptedError, checkpoint.UnsavedError)
