"""Data: sources (what), pipelines (in which order), augmentation (how)."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from kd_jax.data.batch import Batch, EvalStream, Pipeline, eval_batches
from kd_jax.data.common import unknown_name
from kd_jax.data.folder import EncodedSource, FolderSource
from kd_jax.data.images import BadImageError, UnreadableError
from kd_jax.data.sources import (
  Constants,
  Source,
  constants,
  detect,
  digest,
  load,
)

__all__ = [
  "BadImageError",
  "Batch",
  "Constants",
  "EncodedSource",
  "EvalStream",
  "FolderSource",
  "Pipeline",
  "Source",
  "UnreadableError",
  "constants",
  "create",
  "detect",
  "digest",
  "eval_batches",
  "eval_stream",
  "load",
  "names",
]


class _Pipeline(NamedTuple):
  """Where a pipeline is, and what it takes.

  Attributes:
    module: that is imported when the pipeline is named.
    train: its class.
    evaluate: the class of its evaluation stream; None: `EvalStream`.
    settings: those of its options that say how images are read.
    needs: of a package beyond JAX and numpy its import name, its name for pip,
      and the pipeline to use without it.
  """

  module: str
  train: str
  evaluate: str | None = None
  settings: tuple[str, ...] = ()
  needs: tuple[str, str, str] | None = None


_PIPELINES = {
  "dali": _Pipeline(
    "kd_jax.data.dali_pipeline",
    "DaliPipeline",
    "DaliEvalStream",
    settings=("crop_area", "crop_aspect", "device", "sharding"),
    needs=("nvidia", "nvidia-dali-cuda120", "grain"),
  ),
  "device": _Pipeline("kd_jax.data.device_pipeline", "DevicePipeline"),
  "grain": _Pipeline(
    "kd_jax.data.grain_pipeline",
    "GrainPipeline",
    settings=("crop_area", "crop_aspect", "num_threads", "num_workers"),
    needs=("grain", "grain", "device"),
  ),
}


def names() -> list[str]:
  """The names that `create` knows."""
  return sorted(_PIPELINES)


def _find(name: str) -> tuple[_Pipeline, Any]:
  """A pipeline and its module."""
  if name not in _PIPELINES:
    raise unknown_name("pipeline", name, _PIPELINES)
  found = _PIPELINES[name]
  try:
    return found, importlib.import_module(found.module)
  except ModuleNotFoundError as error:
    if (
      found.needs is None
      or (error.name or "").split(".")[0] != (found.needs[0])
    ):
      raise
    _, package, other = found.needs
    raise ImportError(
      f"The pipeline {name!r} needs the package {package}, which is not"
      f" installed. Install it (pip install {package}), or use the pipeline"
      f" {other!r}, which does without it."
    ) from error


def create(
  name: str,
  source: Source | EncodedSource,
  *,
  settings: Mapping[str, Any] | None = None,
  **options: Any,
) -> Pipeline:
  """Builds the training pipeline of that name.

  Args:
    name: "device" (the set stays on the device), "grain" (host memory or
      image files) or "dali" (image files).
    source: the training set.
    settings: how images are read, for whichever pipeline it is: each takes
      those that it has.
    **options: batch_size (global), seed, process_index=0, process_count=1,
      shuffle=True; grain and dali also num_threads=0, prefetch, crop_area=
      (0.08, 1) and crop_aspect=(3/4, 4/3); grain num_workers=0; dali device=
      "cpu" and sharding=None.

  Returns:
    The pipeline; see `kd_jax.data.batch.Pipeline`.

  Raises:
    ValueError: unknown name, or an option out of range.
    ImportError: the pipeline's package is not installed.
  """
  found, module = _find(name)
  make = getattr(module, found.train)
  return make(source, **options, **_taken(found, settings))


def eval_stream(
  source: Source | EncodedSource,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  *,
  pipeline: str = "device",
  device: str = "cpu",
) -> EvalStream:
  """The padded batches of a set, one at a time.

  Args:
    source: the set.
    batch_size: global, in examples; a multiple of `process_count`.
    process_index: this process.
    process_count: of all processes.
    pipeline: see `create`; "dali" decodes image files itself, with the others
      Pillow does.
    device: of "dali": "cpu" or "gpu".

  Returns:
    See `EvalStream`.

  Raises:
    ValueError: unknown name, or a value out of range.
    ImportError: the pipeline's package is not installed.
  """
  found, module = _find(pipeline)
  make = getattr(module, found.evaluate) if found.evaluate else EvalStream
  return make(
    source,
    batch_size,
    process_index,
    process_count,
    **_taken(found, {"device": device}),
  )


def _taken(
  pipeline: _Pipeline, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
  known = pipeline.settings
  return {k: v for k, v in (settings or {}).items() if k in known}
