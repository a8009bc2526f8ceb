"""The training loop of a run."""

import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax.distributed import collectives, processes, signals
from kd_jax.models import fold
from kd_jax.runs import errors, logs, writers
from kd_jax.runs.components import Components
from kd_jax.runs.journal import Journal
from kd_jax.runs.teacher_cache import TeacherCache
from kd_jax.runs.teachers import Teachers
from kd_jax.training import metrics
from kd_jax.training import step as step_lib


class Loop:
  """Dispatches steps, and decides when to evaluate, save and stop."""

  def __init__(
    self,
    config: ConfigDict,
    parts: Components,
    teachers: Teachers,
    journal: Journal,
    cache: TeacherCache | None = None,
  ):
    """Start from the journal's state.

    Args:
      config: with all defaults resolved.
      parts: of the run.
      teachers: with their variables, placed.
      journal: of the run's files.
      cache: of the teacher's logits, if there is one.
    """
    self._config, self._parts, self._journal = config, parts, journal
    self._about_teachers, self._cache = teachers.about, cache
    self.state, self.step = journal.state, journal.step
    if self.step:
      logs.say(f"resuming from step {self.step} of {parts.total_steps}")
    self._started = time.monotonic() - journal.seconds
    self._tried_step, self._tried_time = self.step, time.monotonic()
    devices, shape = parts.devices, parts.train_source.image_shape
    frozen = tuple(
      fold.freeze(teacher.network, teacher.variables, shape)
      for teacher in teachers.members
    )
    self._constants = devices.replicate(step_lib.Constants(frozen, parts.seeds))
    self._resident = devices.replicate(parts.pipeline.resident)
    self._progress = writers.Progress(
      total=parts.total_steps,
      initial=self.step,
      title=f"{config.distiller.name}:{config.student.name}",
      enabled=processes.is_first(),
    )
    self._pending: list[tuple[int, Any, Any]] = []
    # Step and time of the last line; the first dispatch compiles.
    self._noted: tuple[int, float] | None = None
    self._stop = signals.StopSignals()
    # Number of processes with a signal, and of those whose clock says save.
    self._wishes = np.zeros(2, int)

  def run(self) -> dict[str, Any]:
    """Train to the last step; return the result."""
    try:
      with self._stop:
        self._train()
      result = self._journal.conclude(
        self.state, self._elapsed(), self._about_teachers
      )
    except errors.AGREED:
      self._close(agreed=True)
      raise
    except errors.UnsavedError as error:
      self._close(agreed=False)  # closing would save
      if name := self._stop.received:
        raise errors.StoppedUnsavedError(f"{name}, but {error}") from error
      raise
    except BaseException:
      self._close(agreed=jax.process_count() == 1)
      raise
    self._close(agreed=True)
    return result

  def _train(self) -> None:
    total, steps = self._parts.total_steps, self._parts.pipeline.steps_per_epoch
    if self._any_received():  # while the run was being prepared
      raise self._stopped(saved=False)
    while self.step < total:
      self.dispatch()
      stopping, due = self._agree()
      epoch, within = divmod(self.step, steps)
      last = self.step == total
      if last or (within == 0 and epoch % self._config.eval.every_epochs == 0):
        self._journal.begin_evaluation(self.step, epoch, self.state)
      if last or stopping or due:
        self._save()
      if stopping and not last:
        raise self._stopped()
    if self._any_received():  # since the last step
      raise self._stopped()

  def dispatch(self) -> None:
    """Start the next chunk of steps, and look at what the last one did."""
    parts = self._parts
    # A checkpoint may be of other hardware, and of between two dispatches.
    size = parts.steps_per_dispatch - self.step % parts.steps_per_dispatch
    xs: Any = parts.pipeline.next_chunk(size)
    if self._cache:
      kept = self._cache.chunk(self.step, size, self._constants, self._resident)
      xs = {"batch": xs, "cached_logits": kept}
    xs = parts.devices.shard(xs)
    self.state, sums = parts.programs.train_chunk(
      self.state, self._constants, self._resident, xs
    )
    wishes: Any = np.zeros(2, int)
    if jax.process_count() > 1:
      wishes = parts.devices.count(
        self._stop.received is not None, self._clock_is_due()
      )
    self._pending.append((self.step, sums, wishes))
    self.step += size
    self._progress.advance(size)
    # One dispatch late: the device already has its next work.
    self._collect(leave=1)
    self._score()

  def _collect(self, *, leave: int) -> None:
    """Fetch metrics, and write those that are due."""
    while len(self._pending) > leave:
      first, sums, wishes = self._pending.pop(0)
      sums, wishes = jax.device_get((sums, wishes))
      self._wishes += wishes
      done = first + len(sums[metrics.COUNT])
      self._journal.add(first, sums)
      every = self._config.log.every_steps
      epoch_ends = done % self._parts.pipeline.steps_per_epoch == 0
      if done // every > first // every or epoch_ends:
        self._progress.line(self._journal.log(done, self._pace(done)))
      elif self._noted is None:
        self._pace(done)

  def _pace(self, step: int) -> float | None:
    """Seconds of a step since the last line; None for the first one."""
    before, self._noted = self._noted, (step, time.monotonic())
    if before is None:
      return None
    return (self._noted[1] - before[1]) / (step - before[0])

  def _score(self) -> None:
    if text := self._journal.score():
      self._progress.line(text)

  def _any_received(self) -> bool:
    received = np.int32(self._stop.received is not None)
    return bool(collectives.gather_processes(received).any())

  def _agree(self) -> tuple[bool, bool]:
    """Whether to stop, and whether to save: the same in all processes."""
    every = self._config.checkpoint.every_steps
    due = bool(every) and self.step - self._tried_step >= every
    if jax.process_count() == 1:
      return self._stop.received is not None, due or self._clock_is_due()
    signalled, clocks = self._wishes > 0
    return bool(signalled), bool(due or clocks)

  def _clock_is_due(self) -> bool:
    minutes = self._config.checkpoint.every_minutes
    return time.monotonic() - self._tried_time >= 60 * minutes

  def _save(self) -> None:
    # What has not been looked at may not be finite, and must not be kept.
    self._collect(leave=0)
    self._score()
    self._wishes[:] = 0
    self._journal.save(self.step, self.state, self._elapsed())
    self._tried_step, self._tried_time = self.step, time.monotonic()

  def _stopped(self, *, saved: bool = True) -> errors.PreemptedError:
    self._journal.wait()
    where = f"saved in {self._journal.workdir}" if saved else "nothing to save"
    return errors.PreemptedError(
      f"stopped by {self._stop.received or 'a signal to another process'} at"
      f" step {self.step}, {where}: run the same command again to resume"
    )

  def _elapsed(self) -> float:
    return time.monotonic() - self._started

  def _close(self, *, agreed: bool) -> None:
    self._progress.close()
    if agreed:
      self._journal.close()
    else:
      self._journal.abandon()
