"""Images per second of loading photographs, side by side in one run.

    python -m benchmarks.image_loading --data_dir DIR [--workers 2]

Decodes the photographs below DIR over and over, cuts a random crop of each
(area 0.08-1, aspect 3/4-4/3) and hands over batches of 224 x 224 pixels:

  grain                 kd_jax's pipeline, uint8; the flip is the device's
  PyTorch, uint8        DataLoader, Pillow: open, convert, crop, resize, flip
  PyTorch, float        ... and to float32, normalised, as its examples do
  DALI                  kd_jax's pipeline on the CPU, if it is installed
  DALI's own example    file reader, random crop decoder, resize, DALI's
                        iterator for JAX, and nothing else

PyTorch's rows do what torchvision's pil_loader and RandomResizedCrop do, with
the same draws. Grain's decodes a JPEG at half its size or less where the crop
has more than twice the pixels that are asked for, which changes no picture
noticeably (`kd_jax.data.images`) and no photograph of ImageNet's usual size at
all.

The rows run in turns, --repeats times, and the median counts. Each turn starts
its workers, discards the first batches and ends while the workers are still
ahead. Images per CPU second divide by what all processes spent, which other
programs on the machine disturb less. Prints a table and writes a JSON file.
"""

import argparse
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import measure
from kd_jax import data
from kd_jax.data import images

SEED = 0
SIZE = 224
WARM = 4
SUFFIXES = {".jpeg", ".jpg", ".png"}


def photographs(folder: str, count: int) -> data.FolderSource:
  """The folder's photographs, repeated until there are `count`."""
  found = sorted(
    str(path.resolve())
    for path in pathlib.Path(folder).rglob("*")
    if path.suffix.lower() in SUFFIXES
  )
  if not found:
    raise SystemExit(
      f"No photographs below {folder}: expected files that end in"
      f" {', '.join(sorted(SUFFIXES))}."
    )
  paths = (found * -(-count // len(found)))[:count]
  return data.FolderSource(
    paths=tuple(paths),
    labels=np.zeros(count, np.int32),
    num_classes=2,
    class_names=("photograph", "other"),
    name=folder,
    image_size=SIZE,
  )


def kd_jax_batches(
  name: str, source: data.FolderSource, batch_size: int, **options: Any
) -> Iterator[Any]:
  """Batches of one of kd_jax's pipelines."""
  pipeline = data.create(
    name, source, batch_size=batch_size, seed=SEED, **options
  )
  try:
    while True:
      yield pipeline.next_chunk(1)
  finally:
    close = getattr(pipeline, "close", None)
    if close is not None:
      close()


class TorchImages:
  """PyTorch's map-style data set of the same photographs and crops."""

  def __init__(self, paths: tuple[str, ...], to_float: bool):
    self._paths = paths
    self._to_float = to_float

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> tuple[Any, int]:
    import torch
    from PIL import Image

    rng = np.random.default_rng((SEED, 0, i))
    with open(self._paths[i], "rb") as file:
      image = Image.open(file).convert("RGB")
    box = images.crop_box(image.width, image.height, rng)
    image = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    if self._to_float:
      pixels = pixels.float().div(255)
      mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
      std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
      pixels = (pixels - mean) / std
    return pixels, 0


def torch_batches(
  source: data.FolderSource, batch_size: int, workers: int, *, to_float: bool
) -> Iterator[Any]:
  """Batches of PyTorch's DataLoader, shuffled."""
  import torch

  yield from torch.utils.data.DataLoader(
    TorchImages(source.paths, to_float),
    batch_size=batch_size,
    shuffle=True,
    num_workers=workers,
    drop_last=True,
  )


def dali_example_batches(
  source: data.FolderSource, batch_size: int, threads: int
) -> Iterator[Any]:
  """Batches as DALI's examples make them, in the order of its reader."""
  from nvidia.dali import fn, pipeline_def, types
  from nvidia.dali.plugin.jax import DALIGenericIterator

  @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None)
  def graph():
    encoded, label = fn.readers.file(
      files=list(source.paths),
      labels=source.labels.tolist(),
      random_shuffle=True,
    )
    crop = fn.decoders.image_random_crop(
      encoded,
      random_area=[0.08, 1.0],
      random_aspect_ratio=[3 / 4, 4 / 3],
      num_attempts=10,
      output_type=types.DALIImageType.RGB,
    )
    return fn.resize(crop, size=[SIZE, SIZE]), label

  yield from DALIGenericIterator([graph()], ["image", "label"])


def dali_is_installed() -> bool:
  """Without importing it."""
  try:
    return importlib.util.find_spec("nvidia.dali") is not None
  except ModuleNotFoundError:
    return False


def rates(batches: Iterator[Any], count: int, size: int) -> tuple[float, float]:
  """Images per second, and per CPU second, of `count` batches of `size`."""
  for _ in range(WARM):
    next(batches)
  begin, begin_cpu = time.perf_counter(), measure.cpu_seconds()
  for _ in range(count):
    next(batches)
  seconds = time.perf_counter() - begin
  used = measure.cpu_seconds() - begin_cpu
  batches.close()
  return count * size / seconds, count * size / used


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data_dir", required=True, help="of photographs")
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--batches", type=int, default=40, help="timed, a turn")
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", default="runs/benchmarks/image_loading.json")
  args = parser.parse_args(arguments)

  # More than is timed: all end while their workers are ahead.
  total = (args.batches + 2 * WARM + 4 * args.workers) * args.batch_size
  source = photographs(args.data_dir, total)
  rows: dict[str, Callable[[], Iterator[Any]]] = {
    "grain": lambda: kd_jax_batches(
      "grain", source, args.batch_size, num_workers=args.workers
    ),
    "PyTorch, uint8": lambda: torch_batches(
      source, args.batch_size, args.workers, to_float=False
    ),
    "PyTorch, float": lambda: torch_batches(
      source, args.batch_size, args.workers, to_float=True
    ),
  }
  if dali_is_installed():
    rows["DALI"] = lambda: kd_jax_batches(
      "dali", source, args.batch_size, num_threads=args.workers
    )
    rows["DALI's own example"] = lambda: dali_example_batches(
      source, args.batch_size, args.workers
    )
  packages = ["jax", "numpy", "grain", "pillow", "torch"]
  if "DALI" in rows:
    packages.append("nvidia-dali-cuda120")
  result = measure.head(packages)
  found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
  loads: dict[str, list[float]] = {name: [] for name in rows}
  for _ in range(args.repeats):
    for name, start in rows.items():
      loads[name].append(os.getloadavg()[0])
      found[name].append(rates(start(), args.batches, args.batch_size))
  measured = []
  for name, turns in found.items():
    wall, cpu = zip(*turns)
    measured.append(
      {
        "loader": name,
        **measure.summary("images_per_second", wall),
        **measure.summary("images_per_cpu_second", cpu),
        "load_average_turns": loads[name],
      }
    )
  print(
    f"{args.data_dir}, batch {args.batch_size}, {args.workers} workers;"
    f" {result['hardware']['cpu']}, {result['hardware']['cores']} cores"
  )
  columns = {
    "images_per_second": "images/s",
    "images_per_cpu_second": "images/CPU s",
  }
  print(measure.medians_table("loader", measured, **columns))
  out = pathlib.Path(args.out)
  settings = {
    "data": args.data_dir,
    "batch_size": args.batch_size,
    "batches": args.batches,
    "workers": args.workers,
    "repeats": args.repeats,
  }
  measure.write(out, {**result, **settings, "rows": measured})
  print(f"written: {out}")


if __name__ == "__main__":
  main()
