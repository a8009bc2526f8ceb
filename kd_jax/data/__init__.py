"""Data: sources (what), pipelines (in which order), augmentation (how)."""

import importlib
from typing import Any

from kd_jax.data.batch import Batch, Pipeline, eval_batches, eval_stream
from kd_jax.data.common import unknown_name
from kd_jax.data.folder import EncodedSource, FolderSource
from kd_jax.data.images import BadImageError
from kd_jax.data.sources import Constants, Source, constants, detect, load

__all__ = [
  "BadImageError",
  "Batch",
  "Constants",
  "EncodedSource",
  "FolderSource",
  "Pipeline",
  "Source",
  "constants",
  "create",
  "detect",
  "eval_batches",
  "eval_stream",
  "load",
  "names",
]

# Name: module, class, and the package that it needs beyond JAX and numpy, if
# any: its import name, its name for pip, and the pipeline to use without it.
_PIPELINES: dict[str, tuple[str, str, tuple[str, str, str] | None]] = {
  "dali": (
    "kd_jax.data.dali_pipeline",
    "DaliPipeline",
    ("nvidia", "nvidia-dali-cuda120", "grain"),
  ),
  "device": ("kd_jax.data.device_pipeline", "DevicePipeline", None),
  "grain": (
    "kd_jax.data.grain_pipeline",
    "GrainPipeline",
    ("grain", "grain", "device"),
  ),
}


def names() -> list[str]:
  """The names that `create` knows."""
  return sorted(_PIPELINES)


def create(
  name: str, source: Source | EncodedSource, **options: Any
) -> Pipeline:
  """Builds the training pipeline of that name.

  Args:
    name: "device" (the set stays on the device), "grain" (host memory or
      image files) or "dali" (image files).
    source: the training set.
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
  if name not in _PIPELINES:
    raise unknown_name("pipeline", name, _PIPELINES)
  module, attribute, needs = _PIPELINES[name]
  try:
    pipeline = getattr(importlib.import_module(module), attribute)
  except ModuleNotFoundError as error:
    if needs is None or (error.name or "").split(".")[0] != needs[0]:
      raise
    _, package, other = needs
    raise ImportError(
      f"The pipeline {name!r} needs the package {package}, which is not"
      f" installed. Install it (pip install {package}), or use the pipeline"
      f" {other!r}, which does without it."
    ) from error
  return pipeline(source, **options)
