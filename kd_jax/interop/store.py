"""Students that stand alone, in the forms that other tools read.

    python -m kd_jax export --workdir RUN --to DIR
    python -m kd_jax export --model DIR --to student.stablehlo --fold_batch_norm

A folder holds `checkpoint/` (a nested dict of arrays, `params` and
`batch_stats`, which plain Orbax restores) and `model.json`, its card
(architecture, classes, normalisation, accuracy). A SimKD student's arrays are
those of its network, of its projector and of its teacher's classifier: it
needs no other file.

A --to that ends in .pth, .safetensors or .npz gets state dicts under the
reference toolboxes' names; one that ends in .stablehlo a program that any JAX
runs, with the weights inside or beside.
"""

import hashlib
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np

from kd_jax import storage
from kd_jax.interop import card as card_lib
from kd_jax.interop.model import Model
from kd_jax.models import base

WEIGHTS = "checkpoint"


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
    if card_lib.read_card_or_none(to) is not None and _same(to, model):
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
    storage.save_tree(temporary / WEIGHTS, arrays)
    full = {
      **model.card,
      "parameters": base.count_parameters(arrays["params"]),
      "sha256": _digest(temporary / WEIGHTS),
    }
    storage.write_json(temporary / card_lib.CARD, full)
    temporary.chmod(0o755)
    if to.exists():
      to.rmdir()
    temporary.rename(to)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def _same(to: pathlib.Path, model: Model) -> bool:
  """Whether an export holds just this: a repeated command changes nothing."""
  kept = load(to)
  if {**kept.card, **json.loads(json.dumps(model.card))} != kept.card:
    return False
  ours = storage.flatten(model.variables)
  theirs = storage.flatten(kept.variables)
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
  card = card_lib.read_card(path)
  # Orbax does not notice every damage.
  if _digest(path / WEIGHTS) != card["sha256"]:
    raise ValueError(
      f"{path / WEIGHTS}: expected the files that {card_lib.CARD} was written"
      " for, got others (their sha256 differs): something is missing, damaged"
      " or exchanged. Export or copy the model again"
    )
  # What is said of the files, not of the model.
  card = {k: v for k, v in card.items() if k not in ("parameters", "sha256")}
  return Model(card, storage.restore_tree(path / WEIGHTS))


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
  if (path / card_lib.CARD).exists():
    return path
  if (path / "export" / card_lib.CARD).exists():
    return path / "export"
  if (path / "config.json").exists():
    raise ValueError(
      f"{path} holds a run that is not finished. Finish it with the command"
      " that began it, or export what it has with python -m kd_jax export"
      f" --workdir {path} --to DIR"
    )
  raise ValueError(
    f"{path}: expected the workdir of a finished run (config.json) or an"
    f" export ({card_lib.CARD}), got a folder with neither"
  )
