"""Images per second of DALI's plain example and of the DALI pipeline.

    python -m benchmarks.dali_loading FOLDER

Both decode random crops of the JPEGs below FOLDER, in turn, and resize them to
224 pixels as arrays of JAX, on the CPU:

  plain  DALI's file reader (its shuffling, its order), random crop decoder,
         resize, DALI's iterator for JAX: the start of DALI's own examples
  dali   the pipeline: exact order, crops and position, bad files seen to

Rounds alternate; the best and the median are shown, and the processor time
per image, which other load on the machine disturbs less. Prints a table and
writes a JSON file.
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
import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.jax import DALIGenericIterator

from benchmarks.input_pipeline import processor
from kd_jax import data

SIZE = 224


@pipeline_def
def plain_graph(paths: list[str]) -> Any:
  """Reader, random crop decoder, resize; nothing else."""
  encoded, label = fn.readers.file(
    files=paths, labels=list(range(len(paths))), random_shuffle=True
  )
  crop = fn.decoders.image_random_crop(
    encoded,
    random_area=[0.08, 1.0],
    random_aspect_ratio=[3 / 4, 4 / 3],
    num_attempts=10,
    output_type=types.DALIImageType.RGB,
  )
  return fn.resize(crop, size=[SIZE, SIZE]), label


def plain(paths: list[str], batch_size: int, threads: int) -> Callable:
  """A function that gives the plain example's next batch."""
  pipeline = plain_graph(
    paths, batch_size=batch_size, num_threads=threads, device_id=None
  )
  iterator = DALIGenericIterator([pipeline], ["image", "label"])
  return lambda: next(iterator)


def ours(paths: list[str], batch_size: int, threads: int) -> Callable:
  """A function that gives the pipeline's next batch, as arrays of JAX."""
  source = data.FolderSource(
    paths=tuple(paths),
    labels=np.zeros(len(paths), np.int32),
    num_classes=1,
    class_names=("any",),
    name="benchmark",
    image_size=SIZE,
  )
  pipeline = data.create(
    "dali",
    source,
    batch_size=batch_size,
    seed=0,
    num_threads=threads,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0]),
  )
  return lambda: pipeline.next_chunk(1)


def measure(
  rows: dict[str, Callable], batch_size: int, steps: int, repeats: int
) -> dict[str, dict[str, float]]:
  """Images per second and processor time per image of every row."""
  rates: dict[str, list[float]] = {name: [] for name in rows}
  spent: dict[str, list[float]] = {name: [] for name in rows}
  for _ in range(repeats):
    for name, step in rows.items():
      # What was decoded ahead since the last round is not counted.
      for _ in range(4):
        step()
      begin, used = time.perf_counter(), time.process_time()
      for _ in range(steps):
        jax.block_until_ready(step())
      images = steps * batch_size
      rates[name].append(images / (time.perf_counter() - begin))
      spent[name].append((time.process_time() - used) / images)
  return {
    name: {
      "images_per_second": max(rates[name]),
      "images_per_second_median": float(np.median(rates[name])),
      "processor_seconds_per_image": float(np.median(spent[name])),
    }
    for name in rows
  }


def main() -> None:
  """Measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", help="with JPEGs, at any depth")
  parser.add_argument("--batch-size", type=int, default=64)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--steps", type=int, default=16, help="per round")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--out", default="runs/benchmarks/dali_loading.json")
  args = parser.parse_args()

  found = pathlib.Path(args.folder).rglob("*.[jJ][pP]*[gG]")
  paths = sorted(map(str, found))
  if not paths:
    raise SystemExit(f"No JPEGs in {args.folder}.")
  # Enough for an epoch of many batches.
  several = paths * -(-16 * args.batch_size // len(paths))
  rows = {
    "plain": plain(several, args.batch_size, args.threads),
    "dali": ours(several, args.batch_size, args.threads),
  }
  result = measure(rows, args.batch_size, args.steps, args.repeats)

  print(
    f"{len(paths)} JPEGs to {SIZE} x {SIZE}, batch {args.batch_size},"
    f" {args.threads} threads; {processor()}, {os.cpu_count()} cores"
  )
  print(f"{'':<8}{'images/s':>10}{'median':>10}{'CPU ms/image':>14}")
  for name, row in result.items():
    print(
      f"{name:<8}{row['images_per_second']:>10.0f}"
      f"{row['images_per_second_median']:>10.0f}"
      f"{1000 * row['processor_seconds_per_image']:>14.3f}"
    )
  packages = ("jax", "jaxlib", "numpy", "nvidia-dali-cuda120", "pillow")
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  written = {
    "rows": result,
    "images": len(paths),
    "batch_size": args.batch_size,
    "threads": args.threads,
    "steps": args.steps,
    "repeats": args.repeats,
    "cpu": processor(),
    "cores": os.cpu_count(),
    "load_average_after": os.getloadavg(),
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
    },
  }
  out.write_text(json.dumps(written, indent=2) + "\n")
  print(f"written: {out}")


if __name__ == "__main__":
  main()
