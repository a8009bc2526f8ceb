"""Exports: a model as a folder, whole or not at all.

A folder holds `checkpoint/` (a nested dict of arrays, `params` and
`batch_stats`, which plain Orbax restores) and `model.json`, its card
(architecture, classes, normalisation, accuracy). A SimKD student's arrays are
those of its network, its projector and its teacher's classifier: it needs no
other file.
"""

import hashlib
import json
import pathlib

import jax
import numpy as np
from flax import traverse_util

from kd_jax import storage
from kd_jax.interop import card as card_lib
from kd_jax.interop.model import Model, check_fit
from kd_jax.models import base

WEIGHTS = "checkpoint"


def write(model: Model, to: pathlib.Path) -> None:
  """Write a model as a folder, which appears whole or not at all.

  Args:
    model: to write.
    to: folder, new or empty. One that holds the same model stays as it is.

  Raises:
    ValueError: if the folder holds something else.
    OSError: if it cannot be written; nothing is left then.
  """
  to = storage.local_path(to, "export")
  if to.exists() and (not to.is_dir() or any(to.iterdir())):
    if card_lib.read_card_or_none(to) is not None and _same(to, model):
      return
    raise ValueError(
      f"{to}: expected a folder that is new or empty, got one that holds"
      " something. Nothing was changed; give another folder"
    )
  with storage.drafted(to) as folder:
    arrays = jax.tree.map(np.asarray, model.variables)
    storage.save_tree(folder / WEIGHTS, arrays)
    full = {
      **model.card,
      "parameters": base.count_parameters(arrays["params"]),
      "sha256": _digest(folder / WEIGHTS),
    }
    storage.write_json(folder / card_lib.CARD, card_lib.seal(full))


def _same(to: pathlib.Path, model: Model) -> bool:
  """Tell whether an export holds this model already."""
  kept = load(to)
  if {**kept.card, **json.loads(json.dumps(model.card))} != kept.card:
    return False
  ours, theirs = (
    traverse_util.flatten_dict(variables)
    for variables in (model.variables, kept.variables)
  )
  return ours.keys() == theirs.keys() and all(
    np.array_equal(np.asarray(ours[name]), theirs[name]) for name in ours
  )


def _digest(folder: pathlib.Path) -> str:
  """Hash the names and bytes of all files, in the order of their names."""
  digest = hashlib.sha256()
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    digest.update(f"{name} {path.stat().st_size}\n".encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()


def load(directory: str | pathlib.Path) -> Model:
  """Read an export, or the export of a finished run.

  Args:
    directory: the export, or the run's workdir.

  Raises:
    ValueError: if there is none, or it cannot be read.
  """
  path = find(directory)
  card = card_lib.read_card(path)
  card_lib.require_imported(card)
  # Orbax does not notice every damage.
  if _digest(path / WEIGHTS) != card["sha256"]:
    raise ValueError(
      f"{path / WEIGHTS}: expected the files that {card_lib.CARD} was written"
      " for, got others (their sha256 differs): something is missing, damaged"
      " or exchanged. Export or copy the model again"
    )
  variables = storage.restore_tree(path / WEIGHTS)
  # Of an older version, or changed by hand; folding leaves no template.
  if card_lib.SEAL not in card and not card["batch_norm_folded"]:
    check_fit(card, variables, path / card_lib.CARD)
  # These describe the files, not the model.
  about = ("parameters", "sha256", card_lib.SEAL)
  return Model({k: v for k, v in card.items() if k not in about}, variables)


def find(directory: str | pathlib.Path) -> pathlib.Path:
  """Find the export at a path: itself, or that of a finished run.

  Raises:
    ValueError: if the path is neither.
  """
  path = storage.local_path(directory, "model")
  if not path.exists():
    raise ValueError(
      f"{path} does not exist: expected the workdir of a finished run or an"
      " export"
    )
  if (path / card_lib.CARD).exists():
    return path
  if (path / "export" / card_lib.CARD).exists():
    return path / "export"
  if any(path.glob("*.index.json")) or any(path.glob("*.distcp")):
    raise ValueError(
      f"{path} holds weights in parts, by a model hub or"
      " torch.distributed.checkpoint, which are not supported yet. Load them"
      " with their toolbox and save the state dict as one file"
    )
  for name in ("model.safetensors", "pytorch_model.bin"):
    if (path / name).is_file():
      raise ValueError(
        f"{path} is a folder of a model hub, which is not supported yet. Give"
        f" its file of weights: {path / name}"
      )
  if (path / "config.json").exists():
    raise ValueError(
      f"{path} holds a run that is not finished. Run its command again to"
      " finish it, or export its newest weights with python -m kd_jax export"
      f" --workdir {path} --to DIR"
    )
  raise ValueError(
    f"{path}: expected the workdir of a finished run (config.json) or an"
    f" export ({card_lib.CARD}), got a folder with neither"
  )
