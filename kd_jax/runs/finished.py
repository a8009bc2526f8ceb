"""The model of a run, finished or not, and its export."""

import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_jax import data, distillers
from kd_jax.distillers import base
from kd_jax.interop import card as card_lib
from kd_jax.interop import model as model_lib
from kd_jax.interop import store
from kd_jax.interop.model import Model
from kd_jax.runs import checkpoint, logs
from kd_jax.runs.teachers import Teacher
from kd_jax.training.state import TrainState


def model_card(
  config: ConfigDict,
  *,
  source: data.Source | data.EncodedSource,
  distiller: base.Distiller,
  teachers: Sequence[Teacher],
  scores: dict[str, float],
) -> dict[str, Any]:
  """Make the model card of a run's student.

  Args:
    config: of the run.
    source: the training set.
    distiller: the method.
    teachers: their variables are not used.
    scores: on the test set, of the arrays that the card goes with.

  Returns:
    See `card.make`.
  """
  shape = source.image_shape
  head = None
  if distiller.predicts_with_teacher_head:
    maps = [
      model_lib.output_shapes(t.network, shape).features["last"].shape[1:]
      for t in teachers
    ]
    settings, part = config.distiller.to_dict(), distiller.predictor.name
    if part:
      settings = distillers.fields_of_members(**settings)[part]
    head = card_lib.reused_head(
      settings,
      names=[t.name for t in teachers],
      weights=[t.weight for t in teachers],
      maps=maps,
    )
  options = {name: config.data[name] for name in card_lib.DATA_OPTIONS}
  return card_lib.make(
    config.student.name,
    num_classes=source.num_classes,
    image_shape=shape,
    class_names=source.class_names,
    mean=source.mean,
    std=source.std,
    trained_on=source.name,
    data_options={k: v for k, v in options.items() if v is not None},
    resize=getattr(source, "resize", None),
    dtype=config.dtype,
    head=head,
    method=config.distiller.name,
    test=scores,
  )


def inference_variables(
  state: TrainState,
  distiller: base.Distiller,
  teachers: Sequence[Teacher],
) -> model_lib.Variables:
  """The arrays that a prediction needs, and no others.

  Args:
    state: of the run.
    distiller: the method.
    teachers: with their variables.

  Returns:
    The variables of the network that `model_card` describes.
  """
  student = state.variables("student")
  if not distiller.predicts_with_teacher_head:
    return student
  total = sum(teacher.weight for teacher in teachers)
  classifier = model_lib.mean_classifier(
    [t.variables["params"][t.network.head] for t in teachers],
    [t.weight / total for t in teachers],
  )
  own = _part(state.variables("distiller"), distiller.predictor.name)
  return model_lib.join(student, own, classifier)


def _part(
  variables: model_lib.Variables, member: str | None
) -> model_lib.Variables:
  """The variables of one member of several methods; None: of the only one."""
  if member is None:
    return variables
  return {k: tree[member] for k, tree in variables.items() if member in tree}


def run_model(workdir: pathlib.Path, *, weights: str = "best") -> Model:
  """The student of a run, finished or not.

  Args:
    workdir: of the run.
    weights: "best" (highest test top-1) or "last" (newest checkpoint).

  Raises:
    ValueError: if there is no such run, or no such weights.
  """
  if not (workdir / "config.json").exists():
    raise ValueError(
      f"{workdir}: expected the workdir of a run, got a folder without"
      " config.json. Name what --workdir of launch.py named"
    )
  kept = _read_newest(workdir / "best", "the first evaluation")
  card_lib.require_imported(kept.meta["card"])
  model = Model(kept.meta["card"], kept.state)
  if weights == "best":
    return model
  newest = _read_newest(workdir / "checkpoints", "the first checkpoint")
  parts = {
    part: {
      "params": newest.state["params"].get(part, {}),
      **newest.state["collections"].get(part, {}),
    }
    for part in ("student", "distiller")
  }
  card, variables = newest.meta["card"], parts["student"]
  if card["head"] is not None:
    method = card["head"]["distiller"]["name"]
    alone = method == card["method"]
    variables = model_lib.join(
      variables,
      _part(
        parts["distiller"], None if alone else distillers.member_name(method)
      ),
      model.variables["params"]["classifier"],
    )
  return Model(card, variables)


def export_run(
  workdir: pathlib.Path, to: pathlib.Path, *, weights: str = "best"
) -> None:
  """Writes the student of a run as a folder; see `run_model` and `write`."""
  store.write(run_model(workdir, weights=weights), to)


def verify_export(
  workdir: pathlib.Path,
  source: data.Source | data.EncodedSource,
  *,
  student: str,
  examples: int = 4,
) -> None:
  """Predict a few test images with the export, in a fresh process.

  Args:
    workdir: of the run, which has been exported.
    source: the test set.
    student: name of the network; may be a user's own.
    examples: number of images.

  Raises:
    subprocess.CalledProcessError: if that fails.
  """
  from PIL import Image

  folder = workdir / "samples"
  folder.mkdir(exist_ok=True)
  found = (
    (image, source.class_names[label])
    for batch in data.eval_stream(source, examples)
    for image, label, good in zip(batch["image"], batch["label"], batch["mask"])
    if good
  )
  paths: list[str] = []
  for image, name in itertools.islice(found, examples):
    path = folder / f"{len(paths)}_{name.replace('/', '_')}.png"
    Image.fromarray(image).save(path)
    paths.append(str(path))
  command = [sys.executable, "-m", "kd_jax", "predict", "--model"]
  command += [str(workdir / "export"), "--model_name", student, *paths]
  logs.say("in a fresh process: python " + " ".join(command[1:]))
  package = pathlib.Path(__file__).resolve().parents[2]
  python_path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
  subprocess.run(
    command,
    check=True,
    # This process may hold the accelerator's memory.
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path},
  )


def _read_newest(folder: pathlib.Path, what: str) -> checkpoint.Restored:
  found = None
  if folder.exists():
    found = checkpoint.read_latest(folder)
  if found is None:
    raise ValueError(
      f"{folder} holds no weights yet: the run has not come to {what}"
    )
  return found
