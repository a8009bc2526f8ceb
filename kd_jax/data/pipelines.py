"""Pipelines and evaluation streams by name, imported when they are used."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from kd_jax.data.batch import Pipeline
from kd_jax.data.common import EncodedSource, Source
from kd_jax.data.evaluation import EvalStream
from kd_jax.registry import resolve

_STREAM = "kd_jax.data.evaluation:EvalStream"
# name -> its training pipeline and its evaluation stream
_PIPELINES = {
  "dali": ("kd_jax.data.dali:DaliPipeline", "kd_jax.data.dali:DaliEvalStream"),
  "device": ("kd_jax.data.device:DevicePipeline", _STREAM),
  "grain": ("kd_jax.data.grain:GrainPipeline", _STREAM),
}
# Import name -> package to install.
_PACKAGES = {"grain": "grain", "nvidia": "nvidia-dali-cuda120"}


def names() -> list[str]:
  """Lists the names that `create` knows."""
  return sorted(_PIPELINES)


def create(
  name: str,
  source: Source | EncodedSource,
  *,
  settings: Mapping[str, Any] | None = None,
  **options: Any,
) -> Pipeline:
  """Builds a training pipeline.

  Args:
    name: "device" (the set stays on the device), "grain" (host memory or
      image files), "dali" (image files), or "package.module:class", a
      `Pipeline` of your own.
    source: the training set.
    settings: options of any pipeline; those that this one does not have are
      ignored.
    **options: batch_size (global), seed, process_index=0, process_count=1,
      shuffle=True, and the options of the pipeline's class.

  Returns:
    The pipeline; see `kd_jax.data.batch.Pipeline`.

  Raises:
    ValueError: unknown name, or an option out of range.
    ImportError: the pipeline's package is not installed.
  """
  make = _find(name, 0)
  return make(source, **options, **_known(make, settings or {}))


def eval_stream(
  source: Source | EncodedSource,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  *,
  pipeline: str = "device",
  device: str = "cpu",
) -> EvalStream:
  """Streams the padded batches of a set.

  Args:
    source: the set.
    batch_size: global, in examples; a multiple of `process_count`.
    process_index: this process.
    process_count: of all processes.
    pipeline: see `create`. "dali" decodes image files with DALI, the others
      with Pillow.
    device: of "dali": "cpu" or "gpu".

  Returns:
    See `EvalStream`.

  Raises:
    ValueError: unknown name, or a value out of range.
    ImportError: the pipeline's package is not installed.
  """
  make = _find(pipeline, 1)
  options = _known(make, {"device": device})
  return make(source, batch_size, process_index, process_count, **options)


def _find(name: str, part: int) -> Any:
  """A pipeline's class (part 0), or its evaluation stream's (part 1)."""
  found = resolve(name, _PIPELINES, what="pipeline")
  if not isinstance(found, tuple):  # a user's own class
    return EvalStream if part else found
  module, attribute = found[part].split(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except ModuleNotFoundError as error:
    package = _PACKAGES.get((error.name or "").split(".")[0])
    if package is None:
      raise
    raise ImportError(
      f"The pipeline {name!r} needs the package {package}, which is not"
      f" installed. Install it (pip install {package}), or use another pipeline"
      f" ({', '.join(other for other in names() if other != name)})."
    ) from error


def _known(make: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
  known = inspect.signature(make).parameters
  return {key: value for key, value in settings.items() if key in known}
