"""Students that stand alone: an Orbax checkpoint and its model card.

    python -m kd_jax.export --workdir RUN --to DIR

DIR holds `checkpoint/` (a nested dict of arrays, which plain Orbax restores)
and `model.json` (architecture, classes, normalisation, accuracy). The arrays
are `student` and, where a method predicts with them, `distiller` (its
projector) and `teacher_classifier`: a SimKD student needs no other file.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax import checkpoint, data, distillers, models, record, setup
from kd_jax.data import augment
from kd_jax.distillers import base
from kd_jax.interop import files
from kd_jax.models.layers import ModelOutput
from kd_jax.state import TrainState

FORMAT = "kd_jax export 1"
CARD = "model.json"
WEIGHTS = "checkpoint"


def inference_tree(
  state: TrainState,
  distiller: base.Distiller,
  teacher: nn.Module | None,
  teacher_variables: Any,
) -> dict[str, Any]:
  """The arrays that a prediction needs, and no others.

  Args:
    state: of the run.
    distiller: the method.
    teacher: the teacher's model, if there is one.
    teacher_variables: its variables.

  Returns:
    A nested dict of arrays.
  """
  tree = {"student": state.variables("student")}
  if distiller.predicts_with_teacher_head and teacher is not None:
    tree["distiller"] = state.variables("distiller")
    head = teacher.head
    tree["teacher_classifier"] = {head: teacher_variables["params"][head]}
  return tree


def model_card(
  config: ConfigDict,
  *,
  source: data.Source,
  distiller: base.Distiller,
  teacher_model: nn.Module | None,
  scores: dict[str, float],
) -> dict[str, Any]:
  """Says all that is needed to build the model again and to use it.

  Args:
    config: of the run.
    source: the training set.
    distiller: the method.
    teacher_model: the teacher's model, if there is one.
    scores: of the test set, for the arrays that the card goes with.

  Returns:
    JSON-able content of `model.json`.
  """
  shape = source.images.shape[1:]
  head = None
  if distiller.predicts_with_teacher_head and teacher_model is not None:
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    output = jax.eval_shape(
      lambda key, x: teacher_model.init_with_output(key, x, train=False)[0],
      jax.random.key(0),
      image,
    )
    head = {
      "distiller": config.distiller.to_dict(),
      "teacher": config.teacher.name,
      "teacher_map": list(output.features["last"].shape[1:]),
    }
  return {
    "format": FORMAT,
    "architecture": config.student.name,
    "num_classes": source.num_classes,
    "image_shape": list(shape),
    "dtype": config.dtype,
    "head": head,
    "class_names": list(source.class_names),
    "normalization": {
      "mean": [float(v) for v in source.mean],
      "std": [float(v) for v in source.std],
      "of": "pixel / 255, per channel: (x - mean) / std",
    },
    "trained_on": source.name,
    # What `data.load` was given beside the name.
    "data_options": {
      name: config.data[name]
      for name in ("image_size", "num_examples", "num_classes")
      if config.data[name] is not None
    },
    "method": config.distiller.name,
    "test": scores,
  }


def export_run(
  workdir: pathlib.Path, to: pathlib.Path, *, weights: str = "best"
) -> None:
  """Writes the student of a run, finished or not, where it stands alone.

  Args:
    workdir: of the run.
    to: folder to write, which must not exist or be empty.
    weights: "best" (highest test top-1) or "last" (newest checkpoint).

  Raises:
    ValueError: if there is no such run, no such weights, or `to` is taken.
  """
  if not (workdir / "config.json").exists():
    raise ValueError(
      f"{workdir}: expected the workdir of a run, got a folder without"
      " config.json. Name what --workdir of launch.py named"
    )
  kept = _read_newest(workdir / "best", "the first evaluation")
  tree, card = kept.state, kept.meta["card"]
  if weights == "last":
    newest = _read_newest(workdir / "checkpoints", "the first checkpoint")
    card = newest.meta["card"]
    for part in ("student", "distiller"):
      if part in tree:
        tree[part] = {
          "params": newest.state["params"][part],
          **newest.state["collections"].get(part, {}),
        }
  write(to, tree, card)


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


def write(to: pathlib.Path, tree: dict[str, Any], card: dict[str, Any]) -> None:
  """Writes an export; it appears whole or not at all.

  Args:
    to: folder, which must not exist or be empty.
    tree: made by `inference_tree`.
    card: made by `model_card`.

  Raises:
    ValueError: if the folder holds something.
  """
  to = to.absolute()
  if to.exists() and (not to.is_dir() or any(to.iterdir())):
    if read_card_or_none(to) is not None and _same(to, tree, card):
      return
    raise ValueError(
      f"{to}: expected a folder that is empty or not there, got one that"
      " holds something. Nothing was changed; give another --to"
    )
  to.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(
    tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent)
  )
  try:
    tree = jax.tree.map(np.asarray, tree)
    checkpoint.save_tree(temporary / WEIGHTS, tree)
    full = {
      **card,
      "parameters": _count_parameters(tree),
      "sha256": _digest(temporary / WEIGHTS),
    }
    checkpoint.write_json(temporary / CARD, full)
    temporary.chmod(0o755)
    if to.exists():
      to.rmdir()
    temporary.rename(to)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def _same(to, tree, card):
  """Whether an export holds just this: a repeated command changes nothing."""
  kept = load(to)
  if {**kept.card, **json.loads(json.dumps(card))} != kept.card:
    return False
  ours, theirs = record.flatten(tree), record.flatten(kept.variables)
  return ours.keys() == theirs.keys() and all(
    np.array_equal(np.asarray(ours[name]), theirs[name]) for name in ours
  )


def _digest(folder):
  """Of the names and bytes of all files, in the order of their names."""
  digest = hashlib.sha256()
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    digest.update(f"{name} {path.stat().st_size}\n".encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()


def _count_parameters(tree):
  parts = [tree[part].get("params", {}) for part in tree if part != _HEAD]
  parts.append(tree.get(_HEAD, {}))
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(parts))


_HEAD = "teacher_classifier"


def read_card_or_none(directory: pathlib.Path) -> dict[str, Any] | None:
  """The model card of an export, None if the folder is none."""
  card = record.read_json(directory / CARD)
  if isinstance(card, dict) and card.get("format") == FORMAT:
    return card
  return None


def read_card(directory: pathlib.Path) -> dict[str, Any]:
  """The model card of an export.

  Raises:
    ValueError: if the folder is no export.
  """
  card = read_card_or_none(directory)
  if card is None:
    raise ValueError(
      f"{directory}: expected an export, a folder with {CARD} of format"
      f" {FORMAT!r}. Make one with python -m kd_jax.export --workdir RUN --to"
      " DIR"
    )
  return card


@dataclasses.dataclass(frozen=True)
class ExportedModel:
  """A model read from an export.

  Attributes:
    card: the content of `model.json`.
    variables: the arrays.
  """

  card: dict[str, Any]
  variables: dict[str, Any]

  def logits(self, images: jax.Array | np.ndarray) -> jax.Array:
    """Predicts.

    Args:
      images: [B, H, W, C] uint8, of the card's `image_shape`.

    Returns:
      [B, num_classes] float32.
    """
    return self._predict(self.variables, images)

  @functools.cached_property
  def _predict(self):
    card = self.card
    dtype = jnp.dtype(card["dtype"])
    student = models.create(
      card["architecture"], card["num_classes"], dtype=dtype
    )
    normalization = card["normalization"]

    def predict(variables: Any, images: jax.Array) -> jax.Array:
      x = augment.normalize(
        images,
        mean=normalization["mean"],
        std=normalization["std"],
        dtype=dtype,
      )
      output: Any = student.apply(variables["student"], x, train=False)
      if card["head"] is None:
        return output.logits
      return _through_teacher_head(card, variables, output)

    return jax.jit(predict)


def _through_teacher_head(card, variables, student_output):
  head = card["head"]
  fields = dict(head["distiller"])
  distiller = distillers.create(
    fields.pop("name"), dtype=jnp.dtype(card["dtype"]), **fields
  )
  teacher = models.create(head["teacher"], card["num_classes"])
  # Of the teacher's map a prediction needs only the shape.
  shape = (len(student_output.logits), *head["teacher_map"])
  teacher_map: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
  return distiller.apply(
    variables["distiller"],
    student_output,
    ModelOutput(student_output.logits, {"last": teacher_map}),
    teacher_classifier=functools.partial(teacher.classify, variables[_HEAD]),
    method="predict",
  )


def load(directory: str | pathlib.Path) -> ExportedModel:
  """Reads an export, or the export of a finished run.

  Args:
    directory: what `--to` named, or a workdir.

  Returns:
    The model.

  Raises:
    ValueError: if there is none, or it cannot be read.
  """
  path = find(directory)
  card = read_card(path)
  # Orbax does not notice every damage.
  if _digest(path / WEIGHTS) != card["sha256"]:
    raise ValueError(
      f"{path / WEIGHTS}: expected the files that {CARD} was written for, got"
      " others (their sha256 differs): something is missing, damaged or"
      " exchanged. Export or copy the model again"
    )
  return ExportedModel(card, checkpoint.restore_tree(path / WEIGHTS))


def find(directory: str | pathlib.Path) -> pathlib.Path:
  """The export that a path names: itself, or that of a finished run.

  Raises:
    ValueError: if the path is neither.
  """
  path = pathlib.Path(directory).absolute()
  if not path.exists():
    raise ValueError(
      f"{path} does not exist: expected the workdir of a finished run or an"
      " export"
    )
  if (path / CARD).exists():
    return path
  if (path / "export" / CARD).exists():
    return path / "export"
  if (path / "config.json").exists():
    raise ValueError(
      f"{path} holds a run that is not finished. Finish it with the command"
      " that began it, or export what it has with python -m kd_jax.export"
      f" --workdir {path} --to DIR"
    )
  raise ValueError(
    f"{path}: expected the workdir of a finished run (config.json) or an"
    f" export ({CARD}), got a folder with neither"
  )


def check_teacher(checkpoint_path: str, *, name: str, num_classes: int) -> None:
  """Refuses a teacher that does not fit.

  Of a folder it reads the card alone, a file of weights whole.

  Args:
    checkpoint_path: `config.teacher.checkpoint`.
    name: `config.teacher.name`.
    num_classes: of the data.

  Raises:
    ValueError: with what to do about it.
    ImportError: if the file takes PyTorch and there is none.
  """
  if files.is_weights_file(checkpoint_path):
    _load_teacher_file(checkpoint_path, name=name, num_classes=num_classes)
    return
  try:
    card = read_card(find(checkpoint_path))
  except ValueError as error:
    raise ValueError(
      f"config.teacher.checkpoint: {error}. Leave it empty to train the"
      " teacher first"
    ) from error
  if card["architecture"] != name:
    raise ValueError(
      f"config.teacher.checkpoint: expected weights of {name}"
      f" (config.teacher.name), got {card['architecture']} in"
      f" {checkpoint_path}. Set --config.teacher.name={card['architecture']}"
    )
  if card["num_classes"] != num_classes:
    raise ValueError(
      f"config.teacher.checkpoint: expected a teacher of {num_classes}"
      f" classes, as the data has, got {card['num_classes']} in"
      f" {checkpoint_path}, trained on {card['trained_on']}. Name a teacher"
      " of this data set, or set config.data.name"
    )
  if card["head"] is not None:
    raise ValueError(
      "config.teacher.checkpoint: expected a network with a classifier of"
      f" its own, got a {card['method']} student, which predicts through"
      f" another's, in {checkpoint_path}. Name a teacher of another method"
    )


def load_teacher(
  checkpoint_path: str, *, name: str, num_classes: int
) -> dict[str, Any]:
  """The variables of a teacher.

  Args:
    checkpoint_path: an export, a finished run, or a file of weights (see
      `kd_jax.interop.files`).
    name: of the network.
    num_classes: of the data.

  Returns:
    `{"params": ..., "batch_stats": ...}` as numpy arrays.

  Raises:
    ValueError: if it does not fit or cannot be read.
    ImportError: if the file takes PyTorch and there is none.
  """
  if files.is_weights_file(checkpoint_path):
    return _load_teacher_file(
      checkpoint_path, name=name, num_classes=num_classes
    )
  check_teacher(checkpoint_path, name=name, num_classes=num_classes)
  return load(checkpoint_path).variables["student"]


def _load_teacher_file(path, *, name, num_classes):
  try:
    return files.load_variables(path, model_name=name, num_classes=num_classes)
  except ValueError as error:
    raise ValueError(
      f"config.teacher.checkpoint: {error} (config.teacher.name is {name},"
      f" and the data has {num_classes} classes)"
    ) from error


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m kd_jax.export",
    description="Writes a run's student as a model that stands alone.",
  )
  parser.add_argument(
    "--workdir", required=True, type=pathlib.Path, help="folder of the run"
  )
  parser.add_argument(
    "--to", required=True, type=pathlib.Path, help="folder to write"
  )
  parser.add_argument(
    "--weights",
    choices=("best", "last"),
    default="best",
    help="highest test top-1, or newest checkpoint (default: best)",
  )
  args = parser.parse_args()
  setup.configure_logging()
  try:
    export_run(args.workdir.absolute(), args.to, weights=args.weights)
  except ValueError as error:
    parser.exit(2, f"{error}\n")
  card = read_card(args.to)
  print(f"{args.to}: {card['architecture']}, {card['parameters']:,} parameters")


if __name__ == "__main__":
  main()
