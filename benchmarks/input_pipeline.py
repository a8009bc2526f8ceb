"""Images per second of the input pipelines, side by side in one run.

    python -m benchmarks.input_pipeline [--data-dir ../data]

Three rows on CIFAR-100 (on synthetic images of the same number and size
without --data-dir), at the batch size of the CIFAR recipes:

  grain                 batches handed to the host's memory
  grain to device       ... and copied, cropped, flipped, normalised there
  device                order, gather, crop, flip, normalise: one program

Each row is a whole epoch, the best of --repeats; compilation and the first
pass over the data are left out. Prints a table and writes a JSON file.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import data
from kd_jax.data import augment

SEED = 0


def processor() -> str:
  """The CPU's model name where Linux gives one."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  for line in lines:
    if line.startswith("model name"):
      return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()


def make_consume(pipeline: data.Pipeline, source: data.Source) -> Callable:
  """A compiled function of a chunk that uses every augmented pixel."""

  @jax.jit
  def consume(resident, chunk, start):
    key = jax.random.key(SEED)

    def body(total, item):
      x, step = item
      batch = pipeline.load(resident, x)
      images = augment.augment(
        jax.random.fold_in(key, step), batch["image"], batch["index"]
      )
      images = augment.normalize(images, source.mean, source.std)
      return total + images.mean(axis=0), None

    steps = start + jnp.arange(len(jax.tree.leaves(chunk)[0]))
    zero = jnp.zeros(source.images.shape[1:])
    return jax.lax.scan(body, zero, (chunk, steps))[0]

  return consume


def epoch(pipeline: data.Pipeline, chunk: int, use: Callable[..., Any]) -> int:
  """Runs one epoch; the number of its steps."""
  left = pipeline.steps_per_epoch
  result = None
  while left:
    k = min(chunk, left)
    start = pipeline.step
    result = use(pipeline.next_chunk(k), start)
    left -= k
  jax.block_until_ready(result)
  return pipeline.steps_per_epoch


def rate(
  pipeline: data.Pipeline,
  batch_size: int,
  chunk: int,
  repeats: int,
  use: Callable[..., Any],
) -> float:
  """Images per second of the fastest of `repeats` epochs."""
  epoch(pipeline, chunk, use)
  best = 0.0
  for _ in range(repeats):
    begin = time.perf_counter()
    steps = epoch(pipeline, chunk, use)
    seconds = time.perf_counter() - begin
    best = max(best, steps * batch_size / seconds)
  return best


def main() -> None:
  """Measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data-dir", help="folder with CIFAR-100; else random")
  parser.add_argument("--batch-size", type=int, default=64)
  parser.add_argument("--chunk", type=int, default=8, help="steps per chunk")
  parser.add_argument("--threads", type=int, default=1, help="grain's")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", default="runs/benchmarks/input_pipeline.json")
  args = parser.parse_args()

  if args.data_dir:
    source = data.load("cifar100", split="train", dir=args.data_dir)
  else:
    source = data.load(
      "synthetic", split="train", num_examples=50_000, num_classes=100
    )

  def on_host(chunk: Any, start: int) -> None:
    del chunk, start

  def measure(name: str, device: bool, chunk: int, **options: Any) -> float:
    pipeline = data.create(
      name, source, batch_size=args.batch_size, seed=SEED, **options
    )
    use: Callable[..., Any] = on_host
    if device:
      consume = make_consume(pipeline, source)
      resident = pipeline.resident

      def use(chunk: Any, start: int) -> Any:
        return consume(resident, chunk, start)

    return rate(pipeline, args.batch_size, chunk, args.repeats, use)

  whole = len(source) // args.batch_size
  threads = {"num_threads": args.threads}
  label = f"{args.threads} thread{'s' if args.threads != 1 else ''}"
  rows = {
    "grain": measure("grain", False, args.chunk),
    f"grain, {label}": measure("grain", False, args.chunk, **threads),
    "grain to device": measure("grain", True, args.chunk),
    f"grain to device, {label}": measure("grain", True, args.chunk, **threads),
    f"device, chunks of {args.chunk}": measure("device", True, args.chunk),
    "device, an epoch in one program": measure("device", True, whole),
  }

  packages = ("jax", "jaxlib", "numpy", "grain")
  result = {
    "images_per_second": {name: round(value) for name, value in rows.items()},
    "data": source.name,
    "examples": len(source),
    "image_shape": list(source.images.shape[1:]),
    "batch_size": args.batch_size,
    "chunk": args.chunk,
    "repeats": args.repeats,
    "hardware": {
      "devices": [device.device_kind for device in jax.devices()],
      "cpu": processor(),
      "cores": os.cpu_count(),
      "load_average_after": os.getloadavg(),
    },
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
    },
  }
  print(
    f"{source.name}, {len(source)} images of {source.images.shape[1:]},"
    f" batch {args.batch_size}, chunks of {args.chunk};"
    f" {processor()}, {os.cpu_count()} cores,"
    f" {jax.devices()[0].device_kind}"
  )
  width = max(map(len, rows))
  print(f"{'pipeline':<{width}}  {'images/s':>12}")
  for name, value in rows.items():
    print(f"{name:<{width}}  {value:>12,.0f}")
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(result, indent=2) + "\n")
  print(f"written: {out}")


if __name__ == "__main__":
  main()
