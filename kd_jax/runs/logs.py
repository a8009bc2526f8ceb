"""Logging set-up and the overviews that a run logs at its start."""

import logging
from typing import Any

import jax

from kd_jax.distributed import processes
from kd_jax.models import base
from kd_jax.training.state import TrainState

_log = logging.getLogger(__name__)


def configure_logging() -> None:
  """Show this package's log, and only errors of its libraries."""
  logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
  level = logging.INFO if processes.is_first() else logging.ERROR
  logging.getLogger("kd_jax").setLevel(level)
  if not processes.is_first():
    # What is wrong with the data that a process reads, no other can tell.
    logging.getLogger("kd_jax.data").setLevel(logging.WARNING)
  # Orbax logs every file that it touches.
  logging.getLogger("absl").setLevel(logging.ERROR)


def overview(state: TrainState, network: str) -> None:
  """Log the parameters of a run, and what its method remembers.

  Args:
    state: placed on the devices.
    network: see `parameter_overview`.
  """
  _log.info("%s", parameter_overview(state.params, network))
  if memory := state.collections["distiller"].get("memory"):
    _log.info("%s", memory_overview(memory))


def parameter_overview(params: dict[str, Any], network: str) -> str:
  """Make a table of the parameters of each part's blocks.

  Args:
    params: `{"student": ..., "distiller": ...}`.
    network: name of the network that is trained; it may be a teacher.

  Returns:
    Text of several lines.
  """
  rows = []
  parts = {network: params["student"], "distiller": params["distiller"]}
  for part, blocks in parts.items():
    for name, block in blocks.items():
      rows.append((f"{part}/{name}", base.count_parameters(block)))
    rows.append((f"{part}, all", base.count_parameters(blocks)))
  width = max(len(name) for name, _ in rows)
  lines = [f"{name:<{width}} {number:>12,}" for name, number in rows]
  return "parameters\n" + "\n".join(lines)


def untrained(reached: Any) -> str:
  """Name the modules of the student that the loss does not train.

  Args:
    reached: whether some term of the loss reaches each of its parameters.

  Returns:
    One line; "" if all are trained.
  """
  idle = [n for n, tree in reached.items() if not any(jax.tree.leaves(tree))]
  if not idle:
    return ""
  names = "modules" if len(idle) == len(reached) else ", ".join(idle)
  return (
    f"no term of the loss trains the student's {names}: its accuracy in this"
    " run, best epoch included, says nothing"
  )


def memory_overview(memory: dict[str, Any]) -> str:
  """Describe the memory that a method takes.

  Args:
    memory: the collection, placed.

  Returns:
    One line.
  """
  sizes = []
  for x in jax.tree.leaves(memory):
    shard = x.addressable_shards[0].data
    sizes.append((shard.nbytes, x.nbytes))
  each, whole = (sum(column) / 1e6 for column in zip(*sizes))
  return (
    f"memory of the method: {each:.3g} MB per device, {whole:.3g} MB in all"
  )


def say(text: str) -> None:
  """Print a line, on the first process only."""
  if processes.is_first():
    print(text, flush=True)


def scores_in_words(values) -> str:
  """Write top-1, top-5 and cross-entropy as text."""
  return (
    f"top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} %,"
    f" cross-entropy {values['ce']:.4f}"
  )
