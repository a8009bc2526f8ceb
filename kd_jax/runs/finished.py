"""The model of a run, finished or not, and its export."""

import pathlib
from collections.abc import Sequence

from kd_jax.distillers import base
from kd_jax.interop import card as card_lib
from kd_jax.interop import model as model_lib
from kd_jax.interop import store
from kd_jax.interop.model import Model
from kd_jax.runs import checkpoint
from kd_jax.training.state import TrainState


def inference_variables(
  state: TrainState,
  distiller: base.Distiller,
  teachers: Sequence[card_lib.Teacher],
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
  return model_lib.join(student, state.variables("distiller"), classifier)


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
    variables = model_lib.join(
      **parts, classifier=model.variables["params"]["classifier"]
    )
  return Model(card, variables)


def export_run(
  workdir: pathlib.Path, to: pathlib.Path, *, weights: str = "best"
) -> None:
  """Writes the student of a run as a folder; see `run_model` and `write`."""
  store.write(run_model(workdir, weights=weights), to)


def _read_newest(folder: pathlib.Path, what: str) -> checkpoint.Restored:
  found = None
  if folder.exists():
    reader = checkpoint.Checkpointer(folder, keep=1, read_only=True)
    found = reader.restore_latest(None)
    reader.close()
  if found is None:
    raise ValueError(
      f"{folder} holds no weights yet: the run has not come to {what}"
    )
  return found
