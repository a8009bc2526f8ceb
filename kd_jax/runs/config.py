"""What a config says before a run: defaults, checks, data."""

import copy
import logging
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax import data, models, registry
from kd_jax.interop import card
from kd_jax.runs import presets

_log = logging.getLogger(__name__)

Source = data.Source | data.EncodedSource

# Free-form sections: a delta that names one replaces it.
_REPLACED = ("distiller", "loss_weights", "loss_ramp_epochs", "stages")


def with_delta(config: ConfigDict, delta: ConfigDict, where: str) -> ConfigDict:
  """Return a locked copy of a config with some of its fields replaced.

  Args:
    config: made by a file of `configs/`.
    delta: section -> field -> value. A free-form section replaces the whole.
    where: the field of the config that holds the delta, for errors.

  Raises:
    ValueError: for an unknown field, or a value of another kind.
  """
  changed = copy.deepcopy(config)
  fields = delta.to_dict()
  with changed.unlocked():
    for section in _REPLACED:
      if section in fields:
        changed[section] = ConfigDict(fields.pop(section))
  _apply(fields, changed.lock(), where)
  return changed


def _apply(delta: dict[str, Any], section: ConfigDict, where: str) -> None:
  for name, value in delta.items():
    place = f"{where}.{name}"
    if name not in section:
      hint = registry.did_you_mean(name, section)
      raise ValueError(
        f"{place}: no such field.{hint} The fields are: {', '.join(section)}"
      )
    if isinstance(section[name], ConfigDict) != isinstance(value, dict):
      raise ValueError(
        f"{place}: expected what configs/base.py has there, got {value!r}"
      )
    if isinstance(value, dict):
      _apply(value, section[name], place)
      continue
    try:
      section[name] = value
    except (OverflowError, TypeError) as error:
      kind = section.get_type(name).__name__
      raise ValueError(f"{place}: expected {kind}, got {value!r}") from error


def load_data(config: ConfigDict) -> tuple[Source, Source]:
  """Load the training set and the test set of a config."""
  train, test = (
    data.load(
      config.data.name,
      split=split,
      dir=config.data.dir,
      on_bad_image=config.data.on_bad_image,
      **{name: config.data[name] for name in card.DATA_OPTIONS},
    )
    for split in ("train", "test")
  )
  return train, test


def resolve_defaults(config: ConfigDict) -> ConfigDict:
  """Return a copy of a config with its defaults filled in, and log them.

  Args:
    config: with its networks named.

  Raises:
    ValueError: for an unknown preset or network.
  """
  config = copy.deepcopy(config)
  if told := presets.fill(config):
    _log.info("%s", told)
  if config.optim.learning_rate is None:
    name = config.student.name
    with config.unlocked():
      config.optim.learning_rate = models.entry(name).learning_rate
    _log.info(
      "config.optim.learning_rate: %g, the default for %s",
      config.optim.learning_rate,
      name,
    )
  if config.teacher.cache and config.teacher.cache_dtype is None:
    with config.unlocked():
      config.teacher.cache_dtype = "float16"
  return config


def check(
  config: ConfigDict,
  source: Source,
  *,
  num_devices: int,
) -> None:
  """Check what a config's values have to do with each other and the data.

  Args:
    config: with all defaults resolved.
    source: the training set.
    num_devices: over which a batch is split.

  Raises:
    ValueError: that says which field, what was expected, and what to do.
  """
  size, parts = config.batch_size, num_devices * config.accumulate_steps
  if size <= 0 or size % parts:
    raise ValueError(
      f"config.batch_size: expected a multiple of {parts} ({num_devices}"
      f" devices x {config.accumulate_steps} accumulate_steps), got {size}."
      f" Take {max(round(size / parts), 1) * parts}, or fewer devices with"
      " config.parallel.num_devices"
    )
  if size > len(source.labels):
    raise ValueError(
      f"config.batch_size: expected at most the {len(source.labels)} images"
      f" of {source.name}, got {size}"
    )
  steps = config.epochs * (len(source.labels) // size)
  if steps >= 2**31:
    raise ValueError(
      f"config.epochs: expected fewer than 2^31 updates, got {steps}"
      f" ({config.epochs} epochs)"
    )
  side = min(source.image_shape[:2])
  if config.data.crop_padding > side:
    raise ValueError(
      f"config.data.crop_padding: expected at most the image's {side} pixels,"
      f" got {config.data.crop_padding}"
    )
  _check_mixing(config, parts)
  if config.dtype not in ("float32", "bfloat16"):
    raise ValueError(
      f"config.dtype: expected 'float32' or 'bfloat16', got {config.dtype!r}"
    )
  weights = config.loss_weights.to_dict()
  if config.optim.dot_delta and not (
    weights.pop("ce", 0.0) and any(weights.values())
  ):
    raise ValueError(
      "config.optim.dot_delta: expected a weight of 'ce' and of another term in"
      f" config.loss_weights, got {config.loss_weights.to_dict()}. Set it to 0"
      " or give both a weight"
    )
  for name in config.loss_ramp_epochs:
    if name not in config.loss_weights:
      raise ValueError(
        f"config.loss_ramp_epochs: expected terms of config.loss_weights"
        f" ({', '.join(config.loss_weights)}), got {name!r}. Give it a weight"
        " or leave it out"
      )


def _check_mixing(config: ConfigDict, parts: int) -> None:
  """Check mixing, for a batch cut into so many parts."""
  for name in ("mixup", "cutmix"):
    if config.data[name] and config.batch_size // parts % 2:
      raise ValueError(
        f"config.data.{name} mixes pairs: expected an even number of images"
        f" for each device and accumulate_step, got"
        f" {config.batch_size // parts}. Set config.batch_size to a multiple"
        f" of {2 * parts}"
      )


def decoders(num_workers: int | None, source: Source) -> dict[str, int]:
  """Choose how many threads or processes make batches ahead.

  Args:
    num_workers: `config.data.num_workers`.
    source: the training set.

  Returns:
    "num_threads" and "num_workers", one of which is 0; both for a set in
    memory, whose batches are made at once.
  """
  cores = len(os.sched_getaffinity(0))
  if isinstance(source, data.Source):
    return {"num_threads": 0, "num_workers": num_workers or 0}
  if num_workers is None:
    num_workers = cores if cores > 4 else 0
  threads = 0 if num_workers else cores
  return {"num_threads": threads, "num_workers": num_workers}


def steps_per_dispatch(
  wanted: int, *, steps_per_epoch: int, resident: bool
) -> int:
  """Choose how many optimiser updates one dispatch makes.

  Args:
    wanted: `config.steps_per_dispatch`.
    steps_per_epoch: which it has to divide.
    resident: whether the data set is on the device, so that more steps cost
      no more memory.

  Returns:
    The number.

  Raises:
    ValueError: if it does not divide an epoch.
  """
  divisors = [
    d for d in range(1, steps_per_epoch + 1) if steps_per_epoch % d == 0
  ]
  if wanted == 0:
    if jax.default_backend() == "cpu":
      return 1
    return max(d for d in divisors if resident or d <= 64)
  if wanted not in divisors:
    near = sorted(divisors, key=lambda d: abs(d - wanted))[:3]
    raise ValueError(
      "config.steps_per_dispatch: expected a divisor of the"
      f" {steps_per_epoch} steps of an epoch, got {wanted}. Near it:"
      f" {', '.join(map(str, sorted(near)))}; 0 chooses one"
    )
  return wanted


def compilation_cache(setting: str, workdir: pathlib.Path) -> None:
  """Keep compiled programs in a folder; see `config.parallel`."""
  if setting == "auto":
    if jax.default_backend() == "cpu":
      return
    setting = str(workdir.parent / ".compilation_cache")
  if setting:
    folder = os.path.expanduser(setting)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
