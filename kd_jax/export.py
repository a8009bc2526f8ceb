"""Students that stand alone, in the forms that other tools read.

    python -m kd_jax.export --workdir RUN --to DIR
    python -m kd_jax.export --model DIR --to student.stablehlo --fold_batch_norm

A folder holds `checkpoint/` (a nested dict of arrays, `params` and
`batch_stats`, which plain Orbax restores) and `model.json`, its card
(architecture, classes, normalisation, accuracy). A SimKD student's arrays are
those of its network, of its projector and of its teacher's classifier: it
needs no other file.

A --to that ends in .pth, .safetensors or .npz gets state dicts under the
reference toolboxes' names; one that ends in .stablehlo a program that any JAX
runs, with the weights inside or beside.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax import checkpoint, data, inference, record, setup
from kd_jax.distillers import base
from kd_jax.inference import Model
from kd_jax.interop import files, fold, reused, stablehlo
from kd_jax.state import TrainState

FORMAT = "kd_jax export 2"
CARD = "model.json"
WEIGHTS = "checkpoint"
STABLEHLO = ".stablehlo"
# Fields of `config.data` that `data.load` is given beside the name, and that
# what a model sees depends on.
DATA_OPTIONS = ("image_size", "resize", "num_examples", "num_classes")


@dataclasses.dataclass(frozen=True)
class Teacher:
  """What a student's export needs to know of a teacher.

  Attributes:
    name: of its network.
    network: the network.
    variables: its variables.
    weight: its share in the loss.
  """

  name: str
  network: Any
  variables: Any
  weight: float = 1.0


def inference_variables(
  state: TrainState, distiller: base.Distiller, teachers: Sequence[Teacher]
) -> inference.Variables:
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
  classifier = inference.mean_classifier(
    [t.variables["params"][t.network.head] for t in teachers],
    [t.weight / total for t in teachers],
  )
  return inference.join(student, state.variables("distiller"), classifier)


def model_card(
  config: ConfigDict,
  *,
  source: data.Source | data.EncodedSource,
  distiller: base.Distiller,
  teachers: Sequence[Teacher],
  scores: dict[str, float],
) -> dict[str, Any]:
  """Says all that is needed to build the model again and to use it.

  Args:
    config: of the run.
    source: the training set.
    distiller: the method.
    teachers: whose variables are not looked at.
    scores: of the test set, for the arrays that the card goes with.

  Returns:
    JSON-able content of `model.json`.
  """
  shape = source.image_shape
  head = None
  if distiller.predicts_with_teacher_head:
    maps = [
      inference.output_shapes(t.network, shape).features["last"].shape[1:]
      for t in teachers
    ]
    head = reused_head(
      config.distiller.to_dict(),
      names=[t.name for t in teachers],
      weights=[t.weight for t in teachers],
      maps=maps,
    )
  return {
    "format": FORMAT,
    "architecture": config.student.name,
    "num_classes": source.num_classes,
    "image_shape": list(shape),
    "dtype": config.dtype,
    "batch_norm_folded": False,
    "head": head,
    "class_names": list(source.class_names),
    "normalization": normalization(source.mean, source.std),
    "trained_on": source.name,
    # What `data.load` was given beside the name.
    "data_options": {
      name: config.data[name]
      for name in DATA_OPTIONS
      if config.data[name] is not None
    },
    "method": config.distiller.name,
    "test": scores,
  }


def normalization(mean: Sequence[float], std: Sequence[float]) -> Any:
  """A card's `normalization`."""
  return {
    "mean": [float(v) for v in mean],
    "std": [float(v) for v in std],
    "of": "pixel / 255, per channel: (x - mean) / std",
  }


def reused_head(
  distiller: dict[str, Any],
  *,
  names: Sequence[str],
  weights: Sequence[float],
  maps: Sequence[Sequence[int]],
) -> dict[str, Any]:
  """A card's `head`: whose classifier a student reuses.

  Args:
    distiller: `config.distiller`.
    names: of the teachers' networks.
    weights: of the teachers.
    maps: (height, width, channels) of their last maps.
  """
  return {
    "distiller": distiller,
    "teachers": list(names),
    "weights": [float(w) for w in weights],
    "teacher_maps": [list(shape) for shape in maps],
  }


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
    variables = inference.join(
      **parts, classifier=model.variables["params"]["classifier"]
    )
  return Model(card, variables)


def export_run(
  workdir: pathlib.Path, to: pathlib.Path, *, weights: str = "best"
) -> None:
  """Writes the student of a run as a folder; see `run_model` and `write`."""
  write(run_model(workdir, weights=weights), to)


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


def write(model: Model, to: pathlib.Path) -> None:
  """Writes a model as a folder, which appears whole or not at all.

  Args:
    model: to write.
    to: folder, which must not exist or be empty.

  Raises:
    ValueError: if the folder holds something.
  """
  to = to.absolute()
  if to.exists() and (not to.is_dir() or any(to.iterdir())):
    if read_card_or_none(to) is not None and _same(to, model):
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
    arrays = jax.tree.map(np.asarray, model.variables)
    checkpoint.save_tree(temporary / WEIGHTS, arrays)
    full = {
      **model.card,
      "parameters": setup.count(arrays["params"]),
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


def transform(
  model: Model, *, fold_batch_norm: bool = False, dtype: str | None = None
) -> Model:
  """A model that predicts the same, in another form.

  Args:
    model: to change.
    fold_batch_norm: whether to fold BatchNorm into the convolutions; the
      result predicts and teaches, but cannot be trained.
    dtype: "float32" or "bfloat16", of the arithmetic as `config.dtype` is;
      with "bfloat16" the convolutions' kernels are stored so too, and what
      is small or decides the logits (BatchNorm, classifiers) stays float32.

  Returns:
    The model.

  Raises:
    ValueError: if it is folded already, or for another dtype.
  """
  card, variables = dict(model.card), model.variables
  if fold_batch_norm:
    variables = fold.fold(model.network, variables, card["image_shape"])
    card["batch_norm_folded"] = True
  if dtype is not None:
    if dtype not in ("float32", "bfloat16"):
      raise ValueError(
        f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}"
      )
    card["dtype"] = dtype
    variables = jax.tree.map(
      lambda x: np.asarray(x, jnp.dtype(dtype if x.ndim == 4 else x.dtype)),
      variables,
    )
  return Model(card, variables)


def save(model: Model, to: pathlib.Path, *, weights_inside: bool = True) -> str:
  """Writes a model in the form that the target's ending names.

  Args:
    model: to write.
    to: a folder; or a new file that ends in .pth, .pt, .safetensors, .npz
      (state dicts) or .stablehlo (a program).
    weights_inside: of a program: whether the weights are in it, or beside it
      in a .safetensors file.

  Returns:
    What was written, in words.

  Raises:
    ValueError: if the target is taken. Nothing is written then.
    ImportError: if it takes PyTorch and there is none.
  """
  if to.suffix.lower() == STABLEHLO:
    return _save_program(model, to, weights_inside)
  if not weights_inside:
    raise ValueError(
      f"--weights_beside: expected a --to that ends in {STABLEHLO}, got {to}"
    )
  if to.suffix.lower() in files.SUFFIXES:
    files.check_new(to)
    files.write(to, reused.to_parts(model), card=model.card)
    return f"{describe(model)}, a state dict"
  write(model, to)
  return (
    f"{describe(model)}, {setup.count(model.variables['params']):,} parameters"
  )


def describe(model: Model) -> str:
  """A model in a few words."""
  card = model.card
  words = card["architecture"]
  if card["head"] is not None:
    words += f" with the classifier of {' and '.join(card['head']['teachers'])}"
  return f"{words}, {card['num_classes']} classes"


def _save_program(model: Model, to: pathlib.Path, weights_inside: bool) -> str:
  beside = to.with_suffix(".safetensors")
  targets = [to] if weights_inside else [to, beside]
  for target in targets:
    if target.exists() or target.is_symlink():
      raise ValueError(
        f"{target}: expected a file that does not exist yet. It was not"
        " changed; give another --to"
      )
  program = stablehlo.serialize(model, weights_inside=weights_inside)
  to.parent.mkdir(parents=True, exist_ok=True)
  if not weights_inside:
    files.write(beside, {"model": stablehlo.flatten(model.variables)})
  temporary = to.with_name(f".{to.name}.tmp")
  temporary.write_bytes(program)
  temporary.rename(to)
  where = "inside" if weights_inside else f"in {beside.name}"
  return f"{describe(model)}, a StableHLO program with its weights {where}"


def _same(to: pathlib.Path, model: Model) -> bool:
  """Whether an export holds just this: a repeated command changes nothing."""
  kept = load(to)
  if {**kept.card, **json.loads(json.dumps(model.card))} != kept.card:
    return False
  ours = record.flatten(model.variables)
  theirs = record.flatten(kept.variables)
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


def load(directory: str | pathlib.Path) -> Model:
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
  # What is said of the files, not of the model.
  card = {k: v for k, v in card.items() if k not in ("parameters", "sha256")}
  return Model(card, checkpoint.restore_tree(path / WEIGHTS))


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


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m kd_jax.export",
    description="Writes a student as a model that stands alone.",
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", type=pathlib.Path, help="folder of a run")
  source.add_argument("--model", help="an export, or a finished run's workdir")
  parser.add_argument(
    "--to",
    required=True,
    type=pathlib.Path,
    help="folder to write, or new file: .pth, .safetensors, .npz (state dicts)"
    " or .stablehlo (a program)",
  )
  parser.add_argument(
    "--weights",
    choices=("best", "last"),
    default="best",
    help="of --workdir: highest test top-1, or newest checkpoint (default:"
    " best)",
  )
  parser.add_argument(
    "--fold_batch_norm",
    action="store_true",
    help="fold BatchNorm into the convolutions",
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    help="of the arithmetic and of the kernels (default: as it was trained)",
  )
  parser.add_argument(
    "--weights_beside",
    action="store_true",
    help="of a .stablehlo program: weights in a .safetensors file beside it",
  )
  args = parser.parse_args()
  setup.configure_logging()
  try:
    model = (
      load(args.model)
      if args.workdir is None
      else run_model(args.workdir.absolute(), weights=args.weights)
    )
    model = transform(
      model, fold_batch_norm=args.fold_batch_norm, dtype=args.dtype
    )
    words = save(model, args.to, weights_inside=not args.weights_beside)
  except (ValueError, ImportError) as error:
    parser.exit(2, f"{error}\n")
  print(f"{args.to}: {words}")


if __name__ == "__main__":
  main()
