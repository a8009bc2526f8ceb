"""Compares a student with its teacher: predictions, classes, features.

On a test set:

- agreement: the share of the images for which both predict the same class;
- correlation of the logits: how similar a model takes two classes to be, as the
  correlation of their logits over the images, and by how much the student
  differs from its teacher (as Tian et al., ICLR 2020, and Zhao et al., CVPR
  2022, show it);
- features before the classifier, in two dimensions by t-SNE (van der Maaten and
  Hinton, JMLR 2008), of a few classes.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kd_jax import data
from kd_jax.interop import card, opening, scoring
from kd_jax.interop.model import Model
from kd_jax.runs import records, teachers

# t-SNE shows the first images of the first classes, as many as there are
# colours that everybody can tell apart.
SHOWN_CLASSES = 7


SHOWN_EACH = 100


@dataclasses.dataclass(frozen=True)
class Seen:
  """Outputs of a model for a test set.

  Attributes:
    choices: [N] int, the predicted class of each image.
    correlation: [K, K], see `correlation`.
    features: [M, C], before the classifier, of the images that `shown` chose.
    labels: [M] int, theirs.
  """

  choices: np.ndarray
  correlation: np.ndarray
  features: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Student:
  """Trials of one method beside their teacher.

  Attributes:
    agreement: [n], in percent.
    distances: [n], the means of |difference| over pairs of classes.
    difference: [K, K], of the first trial, its |difference| of correlations.
    points: [M, 2], of the first trial.
  """

  agreement: np.ndarray
  distances: np.ndarray
  difference: np.ndarray
  points: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
  """A teacher and the students compared with it on one test set.

  Attributes:
    teacher: name of its network.
    points: [M, 2], of the teacher.
    labels: [M] int, of the images whose points are given.
    class_names: of the classes in `labels`, by class.
    students: label -> its trials.
  """

  teacher: str
  points: np.ndarray
  labels: np.ndarray
  class_names: Mapping[int, str]
  students: Mapping[str, Student]


def correlation(logits: np.ndarray) -> np.ndarray:
  """Pearson's correlation of each two classes' logits over the images.

  Args:
    logits: [N, K].

  Returns:
    [K, K]; 0 for a class whose logit never varies.
  """
  with np.errstate(invalid="ignore", divide="ignore"):
    found = np.corrcoef(logits, rowvar=False)
  constant = np.ptp(logits, axis=0) == 0
  found[constant] = found[:, constant] = 0.0
  return found


def shown(labels: np.ndarray) -> np.ndarray:
  """The images that t-SNE shows: positions [M] in the test set, in order."""
  chosen = [
    np.flatnonzero(labels == label)[:SHOWN_EACH]
    for label in np.unique(labels)[:SHOWN_CLASSES]
  ]
  return np.sort(np.concatenate(chosen))


def embed(features: np.ndarray) -> np.ndarray:
  """t-SNE in two dimensions; the same features give the same points.

  Args:
    features: [M, C].

  Returns:
    [M, 2]; all zeros if the features are the same for all images, NaN if one
    is not finite.
  """
  import threadpoolctl
  from sklearn import manifold  # takes a second

  wide = np.asarray(features, np.float64)
  if not np.isfinite(wide).all():
    return np.full((len(wide), 2), np.nan)
  if not np.ptp(wide, axis=0).any():
    return np.zeros((len(wide), 2))
  tsne = manifold.TSNE(
    init="pca", perplexity=min(30.0, (len(wide) - 1) / 3), random_state=0
  )
  # Threads wait for each other at every step: 25 times slower on busy cores.
  with threadpoolctl.threadpool_limits(1):
    return tsne.fit_transform(wide)


def look(model: Model, source: Any, *, batch_size: int = 500) -> Seen:
  """Runs a model on a test set.

  Args:
    model: to ask.
    source: the test set.
    batch_size: images at a time.
  """

  @jax.jit
  def ask(variables, images):
    output = model.output(variables, images)
    return output.logits, output.features["pooled"]

  order = scoring.match_source(model.card, source)
  found: list[tuple[np.ndarray, ...]] = []
  for batch in data.eval_stream(source, batch_size):
    arrays = (*ask(model.variables, batch["image"]), batch["label"])
    found.append(tuple(np.asarray(x)[batch["mask"]] for x in arrays))
  logits, features, labels = map(np.concatenate, zip(*found))
  logits = logits[:, order]
  few = shown(labels)
  return Seen(
    logits.argmax(axis=1), correlation(logits), features[few], labels[few]
  )


def open_teacher(
  run: pathlib.Path, about: Mapping[str, Any], source: Any
) -> Model:
  """A run's teacher: a finished run, an export or a file of weights.

  It is at the path that the run used or, if the runs have been moved since,
  beside the run. A model of other weights is refused.

  Args:
    run: its folder.
    about: the teacher in its `result.json`.
    source: the test set.

  Returns:
    The model.

  Raises:
    ValueError: if it is at neither path, or cannot be read.
    ImportError: if it needs PyTorch and it is not installed.
  """
  then = pathlib.Path(about["checkpoint"])
  beside = run.parent / "teachers" / then.name
  name, expected = about["name"], about.get("fingerprint")
  origin, others = opening.Origin(source=source), []
  for path in filter(pathlib.Path.exists, dict.fromkeys((then, beside))):
    try:
      model = opening.open_model(path, model_name=name, origin=origin)
    except ValueError as error:
      others.append(str(error))
      continue
    found = teachers.fingerprint(model.variables)
    if expected in (None, found):
      return model
    others.append(
      f"{path}: expected the weights that the run had, of fingerprint"
      f" {expected:08x}, got others, of {found:08x}"
    )
  raise ValueError(
    f"{run}: expected its teacher {name} at {then} or {beside}, found it at"
    f" neither{''.join(f' ({text})' for text in others)}. Copy it from where"
    " the run was made to the second"
  )


def open_run(run: pathlib.Path) -> Model:
  """Opens the export of a finished run.

  Raises:
    ValueError: if there is none, as in a folder of results.
  """
  if not (run / "export").exists():
    raise ValueError(
      f"{run}: expected the export of a finished run (export/{card.CARD}),"
      " found none. An analysis takes the runs themselves: name the --workdir"
      " of launch.py"
    )
  result = records.read_result(run)
  name = None if result is None else result["student"]
  return opening.open_model(run, model_name=name)


def compare(
  teacher: Model,
  students: Mapping[str, Sequence[pathlib.Path]],
  source: Any,
) -> Pair:
  """Compares students with a teacher.

  Args:
    teacher: of `open_teacher`.
    students: label -> the folders of the runs that are its trials.
    source: the test set.

  Returns:
    The pair.

  Raises:
    ValueError: if a student cannot be read.
  """
  theirs = look(teacher, source)
  found = {}
  for label, runs in students.items():
    seen = [look(open_run(run), source) for run in runs]
    differences = [np.abs(s.correlation - theirs.correlation) for s in seen]
    agreement = [100.0 * (s.choices == theirs.choices).mean() for s in seen]
    found[label] = Student(
      np.array(agreement),
      np.array([difference.mean() for difference in differences]),
      differences[0],
      embed(seen[0].features),
    )
  names = {int(k): source.class_names[k] for k in np.unique(theirs.labels)}
  return Pair(
    teacher.card["architecture"],
    embed(theirs.features),
    theirs.labels,
    names,
    found,
  )
