"""Images per second of the input pipelines, side by side in one run.

    python -m benchmarks.input_pipeline [--data-dir ../data]

Three rows on CIFAR-100 (on synthetic images of the same number and size
without --data-dir), at the batch size of the CIFAR recipes:

  grain                 batches handed to the host's memory
  grain to device       ... and copied, cropped, flipped, normalised there
  device                order, gather, crop, flip, normalise: one program

Each row is a whole epoch, --repeats times, of which the median counts;
compilation and the first pass over the data are left out. Prints a table and
writes a JSON file.
"""

import argparse
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from kd_jax import data
from kd_jax.data import augment

SEED = 0


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


def rates(
  pipeline: data.Pipeline,
  batch_size: int,
  chunk: int,
  repeats: int,
  use: Callable[..., Any],
) -> list[float]:
  """Images per second of each of `repeats` epochs."""
  epoch(pipeline, chunk, use)
  found = []
  for _ in range(repeats):
    begin = time.perf_counter()
    steps = epoch(pipeline, chunk, use)
    seconds = time.perf_counter() - begin
    found.append(steps * batch_size / seconds)
  return found


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data-dir", help="folder with CIFAR-100; else random")
  parser.add_argument(
    *("--examples",), type=int, default=50_000, help="of random images"
  )
  parser.add_argument("--batch-size", type=int, default=64)
  parser.add_argument("--chunk", type=int, default=8, help="steps per chunk")
  parser.add_argument("--threads", type=int, default=1, help="grain's")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", default="runs/benchmarks/input_pipeline.json")
  args = parser.parse_args(arguments)

  if args.data_dir:
    source = data.load("cifar100", split="train", dir=args.data_dir)
  else:
    source = data.load(
      "synthetic", split="train", num_examples=args.examples, num_classes=100
    )

  def on_host(chunk: Any, start: int) -> None:
    del chunk, start

  result = measure.head(("jax", "jaxlib", "numpy", "grain"))
  rows = []

  def add_row(
    title: str, name: str, device: bool, chunk: int, **options: Any
  ) -> None:
    load = list(os.getloadavg())
    pipeline = data.create(
      name, source, batch_size=args.batch_size, seed=SEED, **options
    )
    use: Callable[..., Any] = on_host
    if device:
      consume = make_consume(pipeline, source)
      resident = pipeline.resident

      def use(chunk: Any, start: int) -> Any:
        return consume(resident, chunk, start)

    found = rates(pipeline, args.batch_size, chunk, args.repeats, use)
    rows.append(
      {
        "pipeline": title,
        **measure.summary("images_per_second", found),
        "load_average": load,
      }
    )

  whole = len(source) // args.batch_size
  threads = {"num_threads": args.threads}
  label = f"{args.threads} thread{'s' if args.threads != 1 else ''}"
  add_row("grain", "grain", False, args.chunk)
  add_row(f"grain, {label}", "grain", False, args.chunk, **threads)
  add_row("grain to device", "grain", True, args.chunk)
  add_row(f"grain to device, {label}", "grain", True, args.chunk, **threads)
  add_row(f"device, chunks of {args.chunk}", "device", True, args.chunk)
  add_row("device, an epoch in one program", "device", True, whole)

  result["hardware"]["devices"] = [d.device_kind for d in jax.devices()]
  print(
    f"{source.name}, {len(source)} images of {source.images.shape[1:]},"
    f" batch {args.batch_size}, chunks of {args.chunk};"
    f" {result['hardware']['cpu']}, {result['hardware']['cores']} cores,"
    f" {jax.devices()[0].device_kind}"
  )
  print(measure.medians_table("pipeline", rows, images_per_second="images/s"))
  out = pathlib.Path(args.out)
  settings = {
    "data": source.name,
    "examples": len(source),
    "image_shape": list(source.images.shape[1:]),
    "batch_size": args.batch_size,
    "chunk": args.chunk,
    "repeats": args.repeats,
  }
  measure.write(out, {**result, **settings, "rows": rows})
  print(f"written: {out}")


if __name__ == "__main__":
  main()
