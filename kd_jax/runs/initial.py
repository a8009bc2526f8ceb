"""What a run starts from: earlier stages of its own, or given weights."""

import copy
import pathlib
import re
from typing import Any, NamedTuple, TypedDict

from flax import traverse_util
from ml_collections import ConfigDict

from kd_jax import models, storage
from kd_jax.distributed import processes
from kd_jax.interop import files, opening
from kd_jax.runs import checkpoint, logs, records, teachers
from kd_jax.runs import config as config_lib
from kd_jax.runs.components import Components
from kd_jax.runs.teachers import Teacher

_MAIN = "main"
# What a workdir holds besides.
_TAKEN = ("best", "checkpoints", "export", "samples", "tensorboard")


class Initial(NamedTuple):
  """Weights that a run starts from, as numpy arrays.

  Attributes:
    path: where they were read.
    student: variables of the student; without the classifier if the classes
      are others.
    distiller: learned modules of the method, {} for none.
    what: in words.
  """

  path: pathlib.Path
  student: Any
  distiller: Any
  what: str


class Stage(NamedTuple):
  """A run before another.

  Attributes:
    name: of its folder in the workdir of the other.
    config: of the run.
  """

  name: str
  config: ConfigDict


def split(config: ConfigDict) -> tuple[ConfigDict, Stage | None]:
  """Part a config with stages into the run itself and the one before it.

  Args:
    config: made by a file of `configs/`.

  Returns:
    The config of the run, and the last of the earlier stages, which has the
    others before itself; None if there are none.

  Raises:
    ValueError: for a name that cannot be a folder, or see `with_delta`.
  """
  made = {
    name: config_lib.with_delta(config, delta, f"config.stages.{name}")
    for name, delta in config.stages.items()
  }
  main = made.pop(_MAIN, config)
  if not made:
    return main, None
  for name in made:
    if not re.fullmatch(r"\w+", name) or name in _TAKEN:
      raise ValueError(
        f"config.stages: expected names of letters, digits and underscores,"
        f" which are folders in the workdir, but none of {', '.join(_TAKEN)},"
        f" got {name!r}"
      )
  *others, last = made
  with made[last].unlocked():
    made[last].stages = ConfigDict({n: config.stages[n] for n in others})
  return main, Stage(last, made[last])


def stage_config(
  stage: ConfigDict, config: ConfigDict, members: tuple[Teacher, ...]
) -> ConfigDict:
  """The config of a stage that takes the teacher of the run after it.

  Args:
    stage: of `split`.
    config: of the run.
    members: its teachers, trained.
  """
  stage = copy.deepcopy(stage)
  same = stage.teacher.name == config.teacher.name
  with stage.unlocked():
    if same and len(members) == 1 and not stage.teacher.checkpoint:
      stage.teacher.checkpoint = members[0].checkpoint
    stage.parallel.compilation_cache = ""  # the run has set it
  return stage


def read(
  path: str | pathlib.Path, config: ConfigDict, parts: Components
) -> Initial:
  """Read the initial weights of a run in this process alone.

  Args:
    path: a finished run's workdir, an export or a file of weights.
    config: of the run that starts from them.
    parts: of that run.

  Raises:
    ValueError: if they cannot be read or do not fit.
    ImportError: if that takes PyTorch and there is none.
  """
  try:
    return _read(storage.local_path(path, "path"), config, parts)
  except ValueError as error:
    raise ValueError(f"config.init_from: {error}") from error


def _read(path: pathlib.Path, config: ConfigDict, parts: Components) -> Initial:
  name, learned = config.student.name, {}
  folder = path / "checkpoints"
  if checkpoint.steps(folder) and records.read_result(path):
    newest = checkpoint.read_latest(folder)
    assert newest is not None
    card, what = newest.meta["card"], f"the checkpoint of step {newest.step}"
    found, classes = card["architecture"], card["num_classes"]
    student, learned = (_variables(newest.state, part) for part in _PARTS)
    if card["method"] != config.distiller.name:
      learned = {}
  else:
    found, classes, student = _network(path, name)
    what = f"a network of {classes} classes"
  if found != name:
    raise ValueError(
      f"expected weights of {name} (config.student.name), got {found} in"
      f" {path}. Set --config.student.name={found}, or name other weights"
    )
  ours, left_out = shapes(parts), ""
  if classes != parts.train_source.num_classes:
    left_out = models.create(name, classes).head
    what += f", the classifier of {parts.train_source.num_classes} is new"
  student = _without(student, left_out)
  require_fit(student, _without(ours["student"], left_out), str(path))
  if learned:
    require_fit(learned, ours["distiller"], f"{path}, {config.distiller.name}")
    what += f", with what {config.distiller.name} learned"
  return Initial(path, student, learned, what)


def shapes(parts: Components) -> dict[str, Any]:
  """Shapes of what a run can take over from another, by part."""
  state = parts.programs.shapes
  tree = {"params": state.params, "collections": state.collections}
  return {part: _variables(tree, part) for part in _PARTS}


_PARTS = ("student", "distiller")


def _variables(state: Any, part: str) -> Any:
  """Parameters and statistics of a state's part; {} without parameters.

  A memory stays behind: it belongs to the training set of its run.
  """
  params = state["params"].get(part)
  rest = state["collections"].get(part, {})
  kept = {n: x for n, x in rest.items() if n == "batch_stats"}
  return {"params": params, **kept} if params else {}


def _without(variables: Any, module: str) -> Any:
  """A network's variables without one of its modules."""
  params = {n: x for n, x in variables["params"].items() if n != module}
  return {**variables, "params": params}


def _network(path: pathlib.Path, name: str) -> tuple[str, int, Any]:
  """Name, number of classes and variables of an export or a file."""
  if files.is_weights_file(path):
    weights = files.read(path)
    if weights.card is None:
      return opening.read_network(path, weights, name, None)
  model = opening.open_model(path)
  if model.card["head"] is not None:
    raise ValueError(
      f"{path}: expected a network with a classifier of its own, got a"
      f" {model.card['method']} student, which has its teacher's. Name the"
      " workdir of its run"
    )
  return model.card["architecture"], model.card["num_classes"], model.variables


def require_fit(theirs: Any, ours: Any, where: str) -> None:
  """Check that variables can replace others.

  Args:
    theirs: arrays or shapes.
    ours: likewise.
    where: the first are from.

  Raises:
    ValueError: that names some of the arrays that differ.
  """
  found, expected = (
    {"/".join(k): x.shape for k, x in traverse_util.flatten_dict(tree).items()}
    for tree in (theirs, ours)
  )
  different = [
    f"{name}: {expected.get(name, 'nothing')}, got {found.get(name, 'nothing')}"
    for name in sorted(found.keys() | expected.keys())
    if found.get(name) != expected.get(name)
  ]
  if different:
    raise ValueError(
      f"{where}: expected arrays of the shapes that this run has, but"
      f" {len(different)} differ ({'; '.join(different[:3])}). Start from a run"
      " of the same networks, or from an export, which has no modules of a"
      " method"
    )


def require_stage_fits(
  earlier: ConfigDict,
  earlier_parts: Components,
  config: ConfigDict,
  parts: Components,
) -> None:
  """Check that a run can start from another that is still to be made.

  Raises:
    ValueError: see `require_fit`.
  """
  theirs, ours = shapes(earlier_parts), shapes(parts)
  same = earlier.distiller.name == config.distiller.name
  for part in _PARTS if same else _PARTS[:1]:
    require_fit(theirs[part], ours[part], part)


class _Kept(TypedDict):
  path: str
  fingerprint: records.Count


def keep(initial: Initial, workdir: pathlib.Path) -> None:
  """Write `initial.json`, or compare the weights with it; tell of them.

  Raises:
    ValueError: if the run began with other weights.
  """
  weights = teachers.fingerprint((initial.student, initial.distiller))
  path = workdir / "initial.json"
  known = processes.broadcast(storage.read_json(path, _Kept))
  if known is None:
    known = {"path": str(initial.path), "fingerprint": weights}
    if processes.is_first():
      storage.write_json(path, known)
  elif known["fingerprint"] != weights:
    raise ValueError(
      f"config.init_from: expected the weights that {workdir} began with, those"
      f" of {known['path']}, got others in {initial.path}. Bring them back, or"
      " give another --workdir"
    )
  logs.say(f"initial weights: {initial.path} ({initial.what})")
