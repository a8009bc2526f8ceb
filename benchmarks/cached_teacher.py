"""What a cache of the teacher's logits saves: KD's step with it and without.

    python -m benchmarks.cached_teacher [--turns 5] [--steps 4] [--student NAME]

The compiled train chunks of configs/kd_cifar.py on made-up images, one after
the other, turn by turn; and the student alone. Prints a line of JSON.
"""

import argparse
import importlib
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from kd_jax.distributed import devices as devices_lib
from kd_jax.models import fold
from kd_jax.runs import train
from kd_jax.training import cached_logits
from kd_jax.training import step as step_lib


class Side:
  """The train chunk of a config, and how long its steps take."""

  def __init__(self, changes: dict[str, Any], name: str, batch: int):
    """Compiles it and takes a step."""
    config = importlib.import_module(f"configs.{name}_cifar").get_config()
    config.update_from_flattened_dict(
      {
        "data.name": "synthetic",
        "data.image_size": 32,
        "data.num_examples": 8 * batch,
        "data.num_classes": 100,
        "batch_size": batch,
        **changes,
      }
    )
    with tempfile.TemporaryDirectory() as folder:
      prepared = train.prepare(config.lock(), pathlib.Path(folder) / "run")
    parts = self._parts = prepared.parts
    assert parts is not None
    devices, shape = parts.devices, parts.train_source.image_shape
    variables = tuple(
      jax.jit(teacher.network.init)(
        jax.random.key(1), np.zeros((1, *shape), np.float32)
      )
      for teacher in parts.teachers
    )
    frozen = tuple(
      fold.freeze(teacher.network, v, shape)
      for teacher, v in zip(parts.teachers, variables, strict=True)
    )
    self._constants = devices.replicate(step_lib.Constants(frozen, parts.seeds))
    self._resident = devices.replicate(parts.pipeline.resident)
    self._state = devices.place(
      parts.programs.initialize(parts.seeds[0], variables),
      parts.programs.specs,
    )
    self._cached = bool(config.teacher.cache)
    logits = np.random.default_rng(0).normal(size=(1, batch, 100))
    self._kept = cached_logits.compress(
      logits.astype(np.float32), top_k=0, dtype=np.float16
    )
    self.run(1)

  def run(self, steps: int) -> float:
    """Seconds of a step."""
    parts = self._parts
    started = time.perf_counter()
    for _ in range(steps):
      xs: Any = parts.pipeline.next_chunk(1)
      if self._cached:
        xs = {
          "batch": xs,
          "cached_logits": jax.tree.map(np.asarray, self._kept),
        }
      self._state, sums = parts.programs.train_chunk(
        self._state,
        self._constants,
        self._resident,
        parts.devices.shard(xs),
      )
    jax.block_until_ready((self._state, sums))
    return (time.perf_counter() - started) / steps


def main() -> None:
  """Measures, and prints the medians."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--student", default="resnet8x4")
  parser.add_argument("--teacher", default="resnet32x4")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--steps", type=int, default=4)
  args = parser.parse_args()
  devices_lib.split_cpu(args.batch)
  networks = {"student.name": args.student, "teacher.name": args.teacher}
  sides = {
    "online": Side(networks, "kd", args.batch),
    "cached": Side({**networks, "teacher.cache": "x"}, "kd", args.batch),
    "alone": Side({"student.name": args.student}, "teacher", args.batch),
  }
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(args.turns):
    for name, side in sides.items():
      seconds[name].append(side.run(args.steps))
  ratios = {
    f"online / {name}": statistics.median(
      a / b for a, b in zip(seconds["online"], seconds[name], strict=True)
    )
    for name in ("cached", "alone")
  }
  medians = {
    f"{name} ms": 1000 * statistics.median(each)
    for name, each in seconds.items()
  }
  print(json.dumps({k: round(v, 2) for k, v in (medians | ratios).items()}))


if __name__ == "__main__":
  main()
