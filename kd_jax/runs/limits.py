"""Which values the numbers of a config may have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kd_jax import storage

_INT32 = 2**31 - 1


class Limits(NamedTuple):
  """Values that a field may have.

  Attributes:
    low: the least.
    high: the most.
    whole: integers alone.
    above: `low` itself is excluded.
    below: `high` itself is excluded.
    optional: None may stand for a default.
    note: what a value means, for the error.
  """

  low: float
  high: float
  whole: bool = False
  above: bool = False
  below: bool = False
  optional: bool = False
  note: str = ""

  def allow(self, value: Any) -> bool:
    """Whether a field may have this value."""
    if value is None:
      return self.optional
    if isinstance(value, bool) or not isinstance(value, int | float):
      return False
    if not self.low <= value <= self.high:  # or not a number
      return False
    if (self.above and value == self.low) or (
      self.below and value == self.high
    ):
      return False
    return not self.whole or value == int(value)

  def __str__(self) -> str:
    kind = "a whole number" if self.whole else "a number"
    low = f"{'above' if self.above else 'of at least'} {self.low:.10g}"
    high = f"{'below' if self.below else 'at most'} {self.high:.10g}"
    return f"{kind} {low} and {high}{self.note and f' ({self.note})'}"


def _count(low: int = 1, high: int = _INT32, note: str = "") -> Limits:
  return Limits(low, high, whole=True, note=note)


_SEED = _count(0, 2**32 - 1)
_EPOCHS = _count(1, 10**6)
_RATE = Limits(0, 1e6, above=True)
_WEIGHT = Limits(0, 1e6, note="0 leaves the term out")
_ALPHA = Limits(0, 1e3, note="0 is off")

LIMITS = {
  "seed": _SEED,
  "epochs": _EPOCHS,
  "batch_size": _count(),
  "accumulate_steps": _count(),
  "steps_per_dispatch": _count(0, note="0 chooses one"),
  "label_smoothing": Limits(0, 1, below=True, note="0 is off"),
  "trials": _count(1, 10**4),
  "teacher.epochs": _EPOCHS._replace(optional=True),
  "teacher.learning_rate": _RATE._replace(optional=True),
  "teacher.seed": _SEED,
  "teacher.cache_top_k": _count(0, note="0 keeps all classes"),
  "optim.learning_rate": _RATE._replace(optional=True),
  "optim.reference_batch_size": _count(0, note="0 is off"),
  "optim.decay_rate": Limits(0, 1, above=True),
  "optim.warmup_epochs": Limits(0, 1e6, note="0 is off"),
  "optim.momentum": Limits(0, 1, below=True, note="0 is off"),
  "optim.weight_decay": Limits(0, 1, note="0 is off"),
  "optim.gradient_clip": Limits(0, 1e6, note="0 is off"),
  "optim.dot_delta": Limits(0, 1, below=True, note="0 is off"),
  "data.crop_padding": _count(0, 1024, note="0 is off"),
  "data.seed": _SEED._replace(optional=True),
  "data.mixup": _ALPHA,
  "data.cutmix": _ALPHA,
  "data.image_size": _count(1, 2048)._replace(optional=True),
  "data.resize": _count(1, 8192)._replace(optional=True),
  "data.num_workers": _count(0, 1024)._replace(optional=True),
  "data.num_examples": _count(1, 10**6)._replace(optional=True),
  "data.num_classes": _count(1, 10**6)._replace(optional=True),
  "eval.every_epochs": _count(),
  "eval.batch_size": _count(),
  "checkpoint.every_minutes": Limits(0, 1e6),
  "checkpoint.every_steps": _count(0, note="0 is off"),
  "checkpoint.keep": _count(),
  "log.every_steps": _count(),
  "parallel.num_devices": _count(0, note="0 is all"),
  "parallel.heartbeat_seconds": _count(5, 10**6),
}
# Of each value of a free-form section, and of each number of a tuple.
_SECTIONS = {"loss_weights": _WEIGHT, "loss_ramp_epochs": Limits(0, 1e6)}
_TUPLES = {
  "optim.milestones": Limits(0, 1e6),
  "teacher.milestones": Limits(0, 1e6),
  "data.crop_area": Limits(0, 1, above=True),
  "data.crop_aspect": Limits(0, 100, above=True),
}


def check(config: ConfigDict) -> None:
  """Check every number of a config on its own.

  Args:
    config: made by a file of `configs/`.

  Raises:
    ValueError: that says which field, what was expected, and what came.
  """
  others: dict[str, Any] = {"grid": {}, "stages": {}, "teachers": ()}
  flat = storage.flatten({**config.to_dict(), **others})
  for name, value in flat.items():
    section = name.partition(".")[0]
    if name in _SECTIONS or (name in _TUPLES and value is None):
      continue  # empty
    limits = LIMITS.get(name) or _TUPLES.get(name) or _SECTIONS.get(section)
    is_tuple = name in _TUPLES and isinstance(value, tuple | list)
    values = list(value) if is_tuple else [value]
    if limits is not None:
      if wrong := [each for each in values if not limits.allow(each)]:
        raise ValueError(f"config.{name}: expected {limits}, got {wrong[0]!r}")
    elif section == "distiller" and _not_finite(value):
      raise ValueError(f"config.{name}: expected a finite number, got {value}")
  for name in ("optim.milestones", "teacher.milestones"):
    found = list(flat[name] or ())
    if found != sorted(found):
      raise ValueError(f"config.{name}: expected ascending epochs, got {found}")
  _check_weights(config.loss_weights.to_dict())


def _not_finite(value: Any) -> bool:
  return isinstance(value, int | float) and not abs(value) < 1e30


def _check_weights(weights: Mapping[str, float]) -> None:
  if not any(weights.values()):
    raise ValueError(
      "config.loss_weights: expected a weight above 0 for some term, got"
      f" {dict(weights)}"
    )
