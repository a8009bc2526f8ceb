"""Images per second of the input pipelines, side by side in one run.

    python -m benchmarks.input_pipeline [--data-dir ../data]

On CIFAR-100 (on synthetic images of the same number and size without
--data-dir), at the batch size of the CIFAR recipes:

  PyTorch DataLoader    crop, flip, normalise in worker processes, as
                        benchmarks.step's eager side has it; if it is installed
  grain                 batches handed to the host's memory
  grain to device       ... and copied, cropped, flipped, normalised there
  device                order, gather, crop, flip, normalise: one program

DALI decodes image files: `benchmarks.image_loading` has it. Each row is a whole
epoch, --repeats times, of which the median counts; compilation and the first
pass over the data are left out. Images per CPU second divide by what all
processes spent: what one core gives. Prints a table and writes a JSON file.
"""

import argparse
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks import work as work_lib
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


def make_loader(source: data.Source, batch_size: int, workers: int) -> Any:
  """PyTorch's loader of the shuffled and augmented images."""
  import torch

  from benchmarks import torch_side

  work = work_lib.Work(
    teacher="",
    student="",
    method="none",
    batch=batch_size,
    image_size=source.images.shape[1],
    classes=source.num_classes,
    examples=len(source),
  )
  return torch.utils.data.DataLoader(
    torch_side.Examples(work, torch_side.arrays_of(source)),
    batch_size=batch_size,
    # Of these images only: an epoch of Examples is never shorter than CIFAR's.
    sampler=torch.utils.data.RandomSampler(range(len(source))),
    drop_last=True,
    num_workers=workers,
    persistent_workers=workers > 0,
  )


def rates(
  run: Callable[[], int], batch_size: int, repeats: int
) -> dict[str, Any]:
  """Images per second, and per CPU second, of each of `repeats` epochs.

  Args:
    run: takes an epoch; the number of its steps.
    batch_size: images of a step.
    repeats: how many are timed, after one that is not.

  Returns:
    For JSON: `measure.summary` of both.
  """
  run()
  wall, cpu = [], []
  for _ in range(repeats):
    begin, begin_cpu = time.perf_counter(), measure.cpu_seconds()
    images = run() * batch_size
    wall.append(images / (time.perf_counter() - begin))
    cpu.append(images / (measure.cpu_seconds() - begin_cpu))
  return {
    **measure.summary("images_per_second", wall),
    **measure.summary("images_per_cpu_second", cpu),
  }


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
  parser.add_argument(
    *("--workers",),
    type=int,
    default=len(os.sched_getaffinity(0)),
    help="processes of PyTorch's loader",
  )
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

  result = measure.head(("jax", "jaxlib", "numpy", "grain", "torch"))
  rows = []

  def add(title: str, load: list[float], run: Callable[[], int]) -> None:
    found = rates(run, args.batch_size, args.repeats)
    rows.append({"pipeline": title, **found, "load_average": load})

  # First: its workers are forked, and of a process without JAX's threads.
  if importlib.util.find_spec("torch") is not None:
    load = list(os.getloadavg())
    loader = make_loader(source, args.batch_size, args.workers)
    title = f"PyTorch DataLoader, {args.workers} workers"
    add(title, load, lambda: sum(1 for _ in loader))

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

    add(title, load, lambda: epoch(pipeline, chunk, use))

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
  columns = {
    "images_per_second": "images/s",
    "images_per_cpu_second": "images/CPU s",
  }
  print(measure.medians_table("pipeline", rows, **columns))
  out = pathlib.Path(args.out)
  settings = {
    "data": source.name,
    "examples": len(source),
    "image_shape": list(source.images.shape[1:]),
    "batch_size": args.batch_size,
    "chunk": args.chunk,
    "workers": args.workers,
    "repeats": args.repeats,
  }
  measure.write(out, {**result, **settings, "rows": rows})
  print(f"written: {out}")


if __name__ == "__main__":
  main()
