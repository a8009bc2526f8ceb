"""What a run writes down: checkpoints, best weights, metrics, the result."""

import contextlib
import datetime
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.distributed import processes
from kd_jax.models import base
from kd_jax.runs import checkpoint, errors, finished, logs, writers
from kd_jax.runs import workdir as workdir_lib
from kd_jax.runs.components import Components
from kd_jax.runs.teachers import Teacher
from kd_jax.training import metrics
from kd_jax.training.state import TrainState

# The loop donates its state to the next dispatch.
_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Unscored(NamedTuple):
  """A state that the devices are evaluating.

  Attributes:
    step: of the state.
    epoch: that it ends.
    scores: waits for them.
    variables: what to keep if it is the best.
  """

  step: int
  epoch: int
  scores: Callable[[], dict[str, float]]
  variables: Any


class Journal:
  """The files of a run, and the scores so far.

  Attributes:
    workdir: folder of the run.
    state: as restored, or the fresh one.
    step: of `state`.
    seconds: spent before.
    best: scores of the best checkpoint on disk; {} if there is none.
    last_eval: scores of the last evaluation.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: ConfigDict,
    parts: Components,
    teachers: Sequence[Teacher],
    fresh: TrainState,
  ):
    """Restore the newest checkpoint, if there is one, and open the files.

    Args:
      workdir: absolute path.
      config: with all defaults resolved.
      parts: of the run.
      teachers: with their variables, placed.
      fresh: the state to start from without a checkpoint, placed.
    """
    self.workdir, self._config = workdir, config
    self._parts, self._teachers = parts, teachers
    self._unscored: Unscored | None = None
    self._skipped = {
      "train": parts.pipeline.skipped,
      "test": parts.evaluator.skipped,
    }
    self.state, self.step, self.seconds = fresh, 0, 0.0
    self.last_eval: dict[str, Any] = {}
    self._totals: dict[str, float] = {}
    folder, best = workdir / "checkpoints", workdir / "best"
    restored = checkpoint.restore_latest(folder, fresh)
    if restored is not None:
      self.state, self.step = restored.state, restored.step
      parts.pipeline.set_state(restored.position)
      self.seconds = restored.meta["seconds"]
      self.last_eval = restored.meta["last_eval"]
      self._totals = restored.meta["totals"]
      # Older checkpoints have none.
      for name, found in restored.meta.get("skipped", {}).items():
        self._skipped[name].merge(found)
    # It may be of a later step than the checkpoint.
    kept = checkpoint.restore_latest(best, None, required=False)
    self.best: dict[str, Any] = (
      {} if kept is None else kept.meta["card"]["test"]
    )
    if restored is not None:
      self._require_best(restored.meta.get("best", {}))
    self._checkpoints = checkpoint.Checkpointer(
      folder, keep=config.checkpoint.keep
    )
    self._best_checkpoint = checkpoint.Checkpointer(best)
    self._writer = writers.Writer(
      workdir, resume_step=self.step, enabled=processes.is_first()
    )

  def _require_best(self, known: dict[str, Any]) -> None:
    """Check that the best weights are those that the checkpoint knows of."""
    # Older checkpoints know of none.
    if known and known["top1"] > self.best.get("top1", -1):
      raise ValueError(
        f"{self.workdir / 'best'}: expected the best weights so far, of epoch"
        f" {known['epoch']} (top-1 {known['top1']:.2f} %), got"
        f" {(self.best and 'others') or 'none that can be read'}. Bring them"
        " back from a copy, or start again in another --workdir"
      )

  def close(self) -> None:
    """Release the files, when what is being saved is on disk."""
    self._writer.close()
    self._checkpoints.close()
    self._best_checkpoint.close()

  def abandon(self) -> None:
    """Release what needs no other process, which may not come along."""
    with contextlib.suppress(OSError):  # a full disk
      self._writer.close()

  def add(self, first: int, sums: dict[str, np.ndarray]) -> None:
    """Add the sums [k] of the steps after `first` to the next line's.

    Raises:
      NonFiniteLossError: if some are not finite.
    """
    self._require_finite(first, sums)
    for name, value in sums.items():
      total = self._totals.get(name, 0.0)
      self._totals[name] = total + float(np.sum(value, dtype=np.float64))

  def _require_finite(self, first: int, sums: dict[str, np.ndarray]) -> None:
    found = metrics.first_non_finite(sums)
    if found is None:
      return
    offset, names = found
    terms = [n for n in names if n in self._config.loss_weights] or names
    weights = ", ".join(
      f"{name} {weight:g}" for name, weight in self._config.loss_weights.items()
    )
    kept = "No checkpoint had been written"
    self.wait()
    if saved := self.saved_step():
      kept = f"The last checkpoint, of step {saved}, is from before it"
    raise errors.NonFiniteLossError(
      f"step {first + offset + 1}: the loss is not finite (terms:"
      f" {', '.join(terms)}). {kept}. Lower config.optim.learning_rate (now"
      f" {self._config.optim.learning_rate}) or a weight (config.loss_weights:"
      f" {weights}), or set config.optim.warmup_epochs or"
      " config.optim.gradient_clip, in another --workdir: a run keeps its"
      " config"
    )

  def log(self, step: int, pace: float | None) -> str:
    """Write a line of training metrics; return it in words.

    Args:
      step: number of updates so far.
      pace: seconds of a step, None if it is not known yet.
    """
    parts, values = self._parts, metrics.means(self._totals)
    self._totals = {}
    values["learning_rate"] = float(parts.programs.schedule(step - 1))
    values["epoch"] = step / parts.pipeline.steps_per_epoch
    speed = ""
    if pace:
      rate = self._config.batch_size / pace
      values["images_per_second"] = round(rate, 1)
      left = datetime.timedelta(
        seconds=round(pace * (parts.total_steps - step))
      )
      speed = f" {rate:.0f} images/s, {left} left"
    self._write(step, "train", values)
    return (
      f"step {step}/{parts.total_steps} loss {values['loss']:.4f}"
      f" top-1 {values['top1']:.2f} %{speed}"
    )

  def begin_evaluation(self, step: int, epoch: int, state: TrainState) -> None:
    """Start evaluation; the caller may donate the state afterwards."""
    parts = self._parts
    # Memories are of training alone, and may be split over the devices.
    variables = {
      name: {
        collection: value
        for collection, value in state.variables(name).items()
        if collection != "memory"
      }
      for name in ("student", "distiller")
    }
    scores = parts.evaluator.begin(
      parts.programs.eval_chunk,
      variables,
      tuple(teacher.variables for teacher in self._teachers),
    )
    tree = finished.inference_variables(
      state, parts.programs.distiller, self._teachers
    )
    self._unscored = Unscored(step, epoch, scores, _copy(tree))

  def score(self) -> str:
    """Wait for the evaluation that was started, and keep the best weights.

    Returns:
      The scores in words; "" if no evaluation was started.
    """
    if self._unscored is None:
      return ""
    (step, epoch, wait, tree), self._unscored = self._unscored, None
    scores = wait()
    self.last_eval = {**scores, "epoch": epoch}
    self._write(step, "eval", self.last_eval)
    finite = all(map(math.isfinite, scores.values()))
    if finite and scores["top1"] > self.best.get("top1", -1):
      self.best = self.last_eval
      with self._saving("the best weights"):
        self._best_checkpoint.save(
          step, tree, position={}, meta={"card": self._card()}
        )
    words = logs.scores_in_words(scores)
    return f"epoch {epoch}/{self._config.epochs}: {words}"

  def _card(self) -> dict[str, Any]:
    return finished.model_card(
      self._config,
      source=self._parts.train_source,
      distiller=self._parts.programs.distiller,
      teachers=self._teachers,
      scores=self.last_eval,
    )

  def save(self, step: int, state: TrainState, seconds: float) -> None:
    """Start saving a checkpoint."""
    skipped = self._merge_skipped()
    with self._saving(f"the checkpoint of step {step}"):
      self._best_checkpoint.wait()
      self._checkpoints.save(
        step,
        state,
        position=self._parts.pipeline.get_state(),
        meta={
          "last_eval": self.last_eval,
          "best": self.best,
          "seconds": seconds,
          "skipped": skipped,
          "totals": self._totals,
          "card": self._card(),
        },
      )

  def wait(self) -> None:
    """Return when what is being saved is on disk."""
    with self._saving("a checkpoint"):
      self._best_checkpoint.wait()
      self._checkpoints.wait()

  def saved_step(self) -> int:
    """The step of the newest whole checkpoint, 0 if there is none."""
    return max(checkpoint.steps(self.workdir / "checkpoints"), default=0)

  def conclude(
    self, state: TrainState, seconds: float, about_teachers: Any
  ) -> dict[str, Any]:
    """Export the best weights and write the result; the first process does.

    Args:
      state: of the last step.
      seconds: that the run took.
      about_teachers: see `teachers.obtain`.

    Returns:
      The content of `result.json`, in every process.
    """
    self.wait()
    if not self.best:
      raise errors.NonFiniteLossError(
        "no evaluation of this run was finite: it has no best weights. Lower"
        f" config.optim.learning_rate (now {self._config.optim.learning_rate}),"
        " in another --workdir: a run keeps its config"
      )
    self._merge_skipped()
    result: dict[str, Any] = {}
    if processes.is_first():
      with self._saving("the result"):
        result = self._conclude(state, seconds, about_teachers)
    logs.say(
      f"{self.workdir}: last epoch {logs.scores_in_words(self.last_eval)}"
    )
    result = processes.broadcast(result)
    return result

  def _conclude(
    self, state: TrainState, seconds: float, about_teachers: Any
  ) -> dict[str, Any]:
    config, steps = self._config, self._parts.total_steps
    listed = {name: s.reasons() for name, s in self._skipped.items()}
    if any(listed.values()):
      storage.write_json(self.workdir / "skipped_images.json", listed)
    finished.export_run(self.workdir, self.workdir / "export")
    result = {
      "final": self.last_eval,
      "best": self.best,
      "teacher": about_teachers,
      "student": config.student.name,
      "method": config.distiller.name,
      "seed": config.seed,
      "parameters": base.count_parameters(state.params["student"]),
      "distiller_parameters": base.count_parameters(state.params["distiller"]),
      "steps": steps,
      "seconds": round(seconds, 3),
      "images_per_second": round(steps * config.batch_size / seconds, 1),
      "hardware": workdir_lib.hardware(),
      "skipped_images": {name: len(found) for name, found in listed.items()},
    }
    if config.verify_export:
      finished.verify_export(
        self.workdir, self._parts.test_source, student=config.student.name
      )
    storage.write_json(self.workdir / "result.json", result)
    return result

  def _write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    with self._saving("metrics.jsonl"):
      self._writer.write(step, kind, values)

  @contextlib.contextmanager
  def _saving(self, what: str) -> Iterator[None]:
    """Turn a failure into an error that names the step to resume from."""
    try:
      yield
    except Exception as error:  # Orbax raises whatever its threads raised
      if processes.is_lost(error):
        raise
      for saver in (self._best_checkpoint, self._checkpoints):
        with contextlib.suppress(Exception):
          saver.wait()
      raise errors.UnsavedError(
        f"{what} could not be saved in {self.workdir} ({type(error).__name__}:"
        f" {error}). Make room; the same command resumes from step"
        f" {self.saved_step()}"
      ) from error

  def _merge_skipped(self) -> dict[str, dict[str, str]]:
    """What all processes have left out, by split and position."""
    found = {name: s.get_state() for name, s in self._skipped.items()}
    for theirs in processes.all_gather_object(found):
      for name, state in theirs.items():
        self._skipped[name].merge(state)
    return {name: s.get_state() for name, s in self._skipped.items()}
