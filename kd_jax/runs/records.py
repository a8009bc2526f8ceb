"""What a run writes down about itself, as its readers expect it."""

import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from kd_jax import storage
from kd_jax.storage import Score

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
# A report shows it: it must not hold control characters, or a book.
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]{0,1000}\Z")]


class Scores(TypedDict):
  """Of an epoch, on the test set."""

  ce: Score
  top1: Score
  top5: Score
  epoch: int | float


class Eval(TypedDict):
  """A line of `metrics.jsonl` about an evaluation."""

  ce: Score
  top1: Score
  epoch: int | float


class Teacher(TypedDict):
  """A teacher in `result.json`."""

  name: Name
  checkpoint: str
  fingerprint: NotRequired[Count]
  ce: NotRequired[Score]
  top1: NotRequired[Score]
  top5: NotRequired[Score]


class Result(TypedDict):
  """`result.json`; its teachers are a `Teacher`, several, {} or None."""

  final: Scores
  best: Scores
  teacher: dict[str, Any] | list[Teacher] | None
  student: Name
  method: Name
  seed: int
  parameters: Count
  distiller_parameters: Count
  steps: NotRequired[Count]
  seconds: float
  images_per_second: NotRequired[float]
  hardware: Name
  skipped_images: NotRequired[dict[str, Count]]


class Environment(TypedDict):
  """`environment.json`, as far as a reader needs it."""

  command: list[str]


class _Named(TypedDict):
  name: Name


class _Data(_Named):
  dir: NotRequired[str | None]
  image_size: NotRequired[int | None]
  resize: NotRequired[int | None]
  num_examples: NotRequired[int | None]
  num_classes: NotRequired[int | None]
  on_bad_image: NotRequired[str | None]


class _Config(TypedDict):
  """The fields of `config.json` that a report cannot do without."""

  student: _Named
  teacher: _Named
  distiller: _Named
  data: _Data
  epochs: int | float
  batch_size: Count
  loss_weights: dict[str, float]
  loss_ramp_epochs: dict[str, float]


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The content of `result.json`; None for a run that is not finished.

  Raises:
    ValueError: if it is damaged.
  """
  path = workdir / "result.json"
  result: dict[str, Any] | None = storage.read_json(path, Result)
  if result is not None:
    storage.convert(teachers(result), list[Teacher], f"{path}, teacher")
  return result


def teachers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The teachers of a result, of which there may be none."""
  found = result["teacher"] or []
  return [found] if isinstance(found, dict) else found


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The content of `config.json`; None for a folder of no run.

  Raises:
    ValueError: if it is damaged.
  """
  path = workdir / "config.json"
  config: dict[str, Any] | None = storage.read_json(path, dict[str, Any])
  if config is not None:
    storage.convert(config, _Config, path)
  return config


def read_teachers(
  workdir: pathlib.Path, count: int
) -> list[dict[str, Any]] | None:
  """The content of `teacher.json`; None before a run has scored its teachers.

  Args:
    workdir: of the run.
    count: number of teachers that it should have.

  Raises:
    ValueError: if it is damaged.
  """
  path = workdir / "teacher.json"
  found = storage.read_json(path, ScoredTeacher | list[ScoredTeacher])
  if found is None:
    return None
  listed = found if isinstance(found, list) else [found]
  if len(listed) != count:
    raise ValueError(
      f"{path}: expected {count} teachers, got {len(listed)}. Remove the file;"
      " the same command writes it again"
    )
  return listed


class ScoredTeacher(TypedDict):
  """A teacher in `teacher.json`."""

  name: str
  checkpoint: str
  fingerprint: Count
  ce: Score
  top1: Score
  top5: Score
