"""The DALI pipeline: files decoded, cropped and resized by NVIDIA DALI.

DALI's own reader shuffles within a buffer and shards by file: its order is no
function of (seed, epoch), nor the same for any number of processes. Here
Python says which file goes where and what is cut from it, and hands DALI the
bytes through an external source. Decoding and resizing, nearly all of the
work, are DALI's, in its own threads; a few of ours read the files ahead.

On the CPU, DALI decodes JPEGs to the pixels that Pillow gives, regions and
pictures that EXIF turns included. What is not plainly a whole JPEG of 8 bits
(PNGs, CMYK, files cut short) is decoded or refused by `kd_jax.data.images`, as
in the other pipelines, and goes through DALI as an uncompressed picture.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.jax import DALIGenericIterator
from PIL import Image

from kd_jax.data import fetch, images
from kd_jax.data.batch import BatchPlan, EvalStream, Pipeline
from kd_jax.data.common import unknown_name
from kd_jax.data.folder import EncodedSource

# Baseline, extended and progressive, with Huffman codes.
_FRAMES = (0xC0, 0xC1, 0xC2)
_SCAN = 0xDA
_APP1 = 0xE1
_ORIENTATION = 0x0112
_DEVICES = ("cpu", "gpu")


def jpeg_size(content: bytes) -> tuple[int, int] | None:
  """Height and width of a JPEG as it is to be seen, from its header.

  Args:
    content: the whole file.

  Returns:
    Height and width in pixels, upright by EXIF; None for all that DALI is not
    to decode by itself: other formats, files without their end, more than 8
    bits, CMYK, and what the header leaves in doubt.
  """
  if content[:2] != b"\xff\xd8" or content[-2:] != b"\xff\xd9":
    return None
  at, size, orientation = 2, None, None
  try:
    while content[at + 1] != _SCAN:
      start, marker, length = struct.unpack_from(">BBH", content, at)
      if start != 0xFF:
        return None
      if marker in _FRAMES:
        bits, height, width, channels = struct.unpack_from(
          ">BHHB", content, at + 4
        )
        if bits == 8 and channels in (1, 3) and height and width:
          size = (height, width)
      elif marker == _APP1:
        segment = content[at + 4 : at + 2 + length]
        if segment.startswith(b"Exif\0\0"):
          exif = Image.Exif()
          exif.load(segment)
          orientation = exif.get(_ORIENTATION)
        elif b"tiff:Orientation" in segment and orientation is None:
          return None  # Pillow heeds XMP, DALI does not
      at += 2 + length
  # Damaged EXIF data can raise nearly anything.
  except Exception:
    return None
  if orientation not in (None, *range(1, 9)):
    return None
  return size[::-1] if size and (orientation or 1) >= 5 else size


@dataclasses.dataclass(frozen=True)
class _Picture:
  """What DALI is told of one example.

  Attributes:
    encoded: uint8 [bytes], the file, or an uncompressed picture (PPM).
    height: of the picture, in pixels.
    width: of the picture, in pixels.
  """

  encoded: np.ndarray
  height: int
  width: int


@dataclasses.dataclass
class _Work:
  """One step's examples of this process, B of them.

  Attributes:
    encoded: the B pictures; see `_Picture`.
    windows: int32 [B, 4], of every picture the top, left, height and width of
      what is decoded, in pixels.
    boxes: float32 [B, 4], of every window the top, left, bottom and right of
      what is resized, in pixels.
    index: int32 [B], position in the set.
    mask: bool [B], false: padding.
    skipped: a (position, reason) for each image that could not be decoded.
  """

  encoded: list[np.ndarray]
  windows: np.ndarray
  boxes: np.ndarray
  index: np.ndarray
  mask: np.ndarray
  skipped: list[tuple[int, str]]


def _uncompressed(pixels: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3] as a PPM file, which costs little to write and read."""
  height, width, _ = pixels.shape
  content = b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()
  return np.frombuffer(content, np.uint8)


def _open(source: EncodedSource, i: int, careful: bool) -> _Picture:
  """Example `i`, as something that DALI can decode.

  Args:
    source: the set.
    i: position in it.
    careful: whether to decode it here, whatever it is.

  Raises:
    BadImageError: it cannot be decoded; the text names the file.
    UnreadableError: it cannot be read; the text names the file.
  """
  content = source.read_bytes(i)
  size = None if careful else jpeg_size(content)
  if size is not None:
    return _Picture(np.frombuffer(content, np.uint8), *size)
  pixels = images.decode(content, source.describe(i))
  return _Picture(_uncompressed(pixels), *pixels.shape[:2])


@pipeline_def
def _graph(feed: Callable[[], tuple], image_size: int, decoder: str) -> Any:
  """DALI's part: encoded pictures in, uint8 [B, S, S, 3] out."""
  encoded, corner, shape, start, end = fn.external_source(
    feed,
    num_outputs=5,
    dtype=[
      types.DALIDataType.UINT8,
      types.DALIDataType.INT32,
      types.DALIDataType.INT32,
      types.DALIDataType.FLOAT,
      types.DALIDataType.FLOAT,
    ],
    ndim=1,
    no_copy=True,
  )
  windows = fn.decoders.image_slice(
    encoded,
    start=corner,
    shape=shape,
    axis_names="HW",
    device=decoder,
    output_type=types.DALIImageType.RGB,
    # Of the GPU's decoder; the CPU's always does.
    jpeg_fancy_upsampling=True,
  )
  return fn.resize(
    windows,
    size=[image_size, image_size],
    roi_start=start,
    roi_end=end,
    interp_type=types.DALIInterpType.INTERP_LINEAR,
    antialias=True,
  )


class _Stream:
  """DALI at work on the steps that follow a first one, in order.

  On GPUs there is one DALI pipeline for each, with its part of the rows; on
  the CPU one decodes them all.
  """

  def __init__(
    self,
    prepare: Callable[[int, bool], _Work],
    first: int,
    stop: int | None,
    *,
    batch_size: int,
    image_size: int,
    gpus: Sequence[int],
    num_threads: int,
    prefetch: int,
  ):
    """Builds the pipelines; reading begins with the first `next`.

    Args:
      prepare: makes a step's work. Its second argument says whether to leave
        DALI nothing compressed.
      first: the first step.
      stop: the step after the last, None if there is none.
      batch_size: examples of a step, of this process.
      image_size: height and width of the results.
      gpus: their CUDA numbers; none: the CPU.
      num_threads: of DALI, and as many that read files; 0: one per core.
      prefetch: steps decoded ahead.
    """
    self._prepare = prepare
    self._stop = stop
    self._image_size = image_size
    self._devices: list[int | None] = [*gpus] or [None]
    self._rows = batch_size // len(self._devices)
    self._num_threads = num_threads or len(os.sched_getaffinity(0))
    self._prefetch = prefetch
    self._readers = concurrent.futures.ThreadPoolExecutor(self._num_threads)
    self._iterators: list[DALIGenericIterator] = []
    self._ahead: dict[int, concurrent.futures.Future[_Work]] = {}
    self._careful: set[int] = set()
    self._error: Exception | None = None
    self._start(first)

  def _build(self, part: int) -> DALIGenericIterator:
    """The DALI pipeline of a part of the rows."""
    device = self._devices[part]
    pipeline = _graph(
      lambda: self._feed(part),
      self._image_size,
      "cpu" if device is None else "mixed",
      batch_size=self._rows,
      num_threads=self._num_threads,
      device_id=device,
      prefetch_queue_depth=self._prefetch,
    )
    return DALIGenericIterator([pipeline], ["image"], prepare_first_batch=False)

  def _start(self, step: int) -> None:
    """Goes to a step, with new pipelines."""
    self.close()
    self._readers = concurrent.futures.ThreadPoolExecutor(self._num_threads)
    self._step = step
    self._fed = [step] * len(self._devices)
    self._iterators = [self._build(part) for part in range(len(self._devices))]

  def close(self) -> None:
    """Ends the threads, and forgets what they did ahead."""
    self._readers.shutdown(cancel_futures=True)
    self._ahead.clear()
    self._iterators.clear()
    self._error = None

  def _work(self, step: int) -> concurrent.futures.Future[_Work]:
    """A step's work; that of the following ones is begun."""
    last = step + self._prefetch
    if self._stop is not None:
      last = min(last, self._stop - 1)
    for other in range(step, last + 1):
      if other not in self._ahead:
        self._ahead[other] = self._readers.submit(
          self._prepare, other, other in self._careful
        )
    return self._ahead[step]

  def _feed(self, part: int) -> tuple:
    """The next inputs of one of DALI's pipelines."""
    step = self._fed[part]
    if step == self._stop:
      raise StopIteration
    try:
      work = self._work(step).result()
    except Exception as error:  # of a file; DALI would hide its text
      # The steps before it are whole: it is raised when its own is due.
      self._error = error
      raise StopIteration from None
    self._fed[part] += 1
    rows = slice(part * self._rows, (part + 1) * self._rows)
    corner, shape = np.split(work.windows[rows], 2, axis=1)
    start, end = np.split(work.boxes[rows], 2, axis=1)
    return (
      work.encoded[rows],
      *map(np.ascontiguousarray, (corner, shape, start, end)),
    )

  def __iter__(self) -> Iterator[tuple[_Work, list[jax.Array]]]:
    return self

  def __next__(self) -> tuple[_Work, list[jax.Array]]:
    """The next step's work, and its pictures by part: uint8 [b, S, S, 3].

    Raises:
      StopIteration: there are no more steps.
      BadImageError: an image of this step cannot be decoded.
      UnreadableError: a file of this step cannot be read.
    """
    while True:
      try:
        parts = [next(iterator)["image"] for iterator in self._iterators]
        break
      except StopIteration:
        if self._error is not None:
          raise self._error from None
        raise
      except MemoryError:
        raise
      except Exception:
        # A file that DALI cannot decode ends its pipeline, without its name:
        # whatever DALI had is decoded here, and judged as everywhere else.
        doubtful = {*range(self._step, max(self._fed))} - self._careful
        if not doubtful:
          raise
        self._careful |= doubtful
        self._start(self._step)
    work = self._ahead.pop(self._step).result()
    self._careful.discard(self._step)
    self._step += 1
    return work, parts


def _gpus(
  sharding: jax.sharding.Sharding | None, batch_size: int, local_size: int
) -> list[jax.Device]:
  """This process's GPUs, in the order of the rows that they hold."""
  if sharding is None:
    gpus = jax.local_devices()[:1]
  else:
    where = sharding.addressable_devices_indices_map((1, batch_size))
    gpus = sorted(where, key=lambda gpu: (where[gpu] or ())[1].start or 0)
  if gpus[0].platform != "gpu":
    raise ValueError(
      "device 'gpu' decodes on the GPUs that JAX uses, and it uses"
      f" {gpus[0].platform} here. Use device 'cpu', or install JAX for CUDA"
      ' (pip install "jax[cuda12]").'
    )
  if local_size % len(gpus):
    raise ValueError(
      f"Every one of this process's {len(gpus)} GPUs needs the same number of"
      f" examples: expected a multiple of {len(gpus)}, got {local_size}."
      " Change batch_size."
    )
  return gpus


def _check_range(name: str, values: tuple[float, float], limit: float) -> None:
  low, high = values
  if not 0 < low <= high <= limit:
    raise ValueError(
      f"{name} must be two numbers with 0 < least <= largest <= {limit}, got"
      f" {values}."
    )


def _check_options(
  source: EncodedSource, device: str, num_threads: int, prefetch: int
) -> None:
  if not isinstance(source, EncodedSource):
    raise ValueError(
      "The pipeline 'dali' decodes image files: expected a source of encoded"
      f" images, got {source.name!r}, whose images are in memory already. Use"
      " the pipeline 'device' or 'grain'."
    )
  if device not in _DEVICES:
    raise unknown_name("device", device, _DEVICES)
  if num_threads < 0 or prefetch < 1:
    raise ValueError(
      "num_threads must be 0 or more and prefetch 1 or more, got"
      f" {num_threads} and {prefetch}."
    )


class DaliPipeline(Pipeline):
  """Batches decoded by DALI; see `kd_jax.data.batch.Pipeline`.

  `resident` is {}, a chunk is the stacked batches, and `load` hands its row
  through. The order of epoch e is numpy's permutation under a generator seeded
  with (seed, e), and an example's crop is a function of (seed, e, position):
  both are grain's, for any number of processes, devices and threads. Beyond a
  crop's border the resizing repeats its last pixel; grain's sees the picture.

  An image that cannot be decoded is an error, or, where the source says "skip",
  is listed in `skipped`, and the next of the set that can be stands in.
  """

  def __init__(
    self,
    source: EncodedSource,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    *,
    crop_area: tuple[float, float] = (0.08, 1.0),
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
    device: str = "cpu",
    num_threads: int = 0,
    prefetch: int = 2,
    sharding: jax.sharding.Sharding | None = None,
  ):
    """Sets the stream up; nothing is read before the first chunk.

    Args:
      source: the training set, of encoded images.
      batch_size: global, in examples; a multiple of `process_count`.
      seed: of order and crops, 0 or more.
      process_index: this process.
      process_count: of all processes.
      shuffle: false keeps the set's order in every epoch.
      crop_area: least and largest share of a picture that a crop takes.
      crop_aspect: least and largest width / height of a crop.
      device: "cpu", or "gpu" to decode and resize on this process's GPUs
        (written after DALI's documentation, not yet run on one).
      num_threads: of DALI, and as many that read files; 0: one per core.
      prefetch: batches decoded ahead.
      sharding: of a chunk's leaves [k, B, ...] over the devices of all
        processes, whose shares of B it has to respect; the leaves are then
        global arrays. None: they are this process's share, in the host's
        memory or, with `device="gpu"`, in that of JAX's first GPU.

    Raises:
      ValueError: a value out of range, or a device that is not there.
    """
    _check_options(source, device, num_threads, prefetch)
    _check_range("crop_area", crop_area, 1)
    _check_range("crop_aspect", crop_aspect, math.inf)
    super().__init__(
      BatchPlan(
        "dali",
        len(source),
        batch_size,
        seed,
        process_index,
        process_count,
        shuffle,
      )
    )
    self._source = source
    self._crop_area = crop_area
    self._crop_aspect = crop_aspect
    self._sharding = sharding
    self._gpus = (
      _gpus(sharding, batch_size, self._plan.local_size)
      if device == "gpu"
      else []
    )
    self._make_stream = functools.partial(
      _Stream,
      self._prepare,
      batch_size=self._plan.local_size,
      image_size=source.image_size,
      gpus=[gpu.local_hardware_id for gpu in self._gpus],
      num_threads=num_threads,
      prefetch=prefetch,
    )
    self._stream: _Stream | None = None

  def _prepare(self, step: int, careful: bool) -> _Work:
    """Reads this process's files of a step, and draws their crops."""
    plan = self._plan
    epoch = step // plan.steps_per_epoch
    encoded, windows, index = [], [], []
    skipped: list[tuple[int, str]] = []

    def read(i: int) -> _Picture:
      return _open(self._source, i, careful)

    for i in fetch.positions(plan, step).tolist():
      i, picture = fetch.first_readable(self._source, i, read, skipped)
      left, top, right, bottom = images.crop_box(
        picture.width,
        picture.height,
        fetch.crop_generator(plan.seed, epoch, i),
        area=self._crop_area,
        aspect=self._crop_aspect,
      )
      encoded.append(picture.encoded)
      windows.append((top, left, bottom - top, right - left))
      index.append(i)
    corners = np.array(windows, np.int32)
    boxes = corners.astype(np.float32)
    boxes[:, :2] = 0
    return _Work(
      encoded=encoded,
      windows=corners,
      boxes=boxes,
      index=np.array(index, np.int32),
      mask=np.ones(len(index), bool),
      skipped=skipped,
    )

  def next_chunk(self, k: int) -> dict[str, Any]:
    """The next `k` batches, stacked: leaves [k, B, ...].

    Raises:
      ValueError: `k` steps would cross the end of the epoch.
      BadImageError: an image cannot be decoded, and the source says "error",
        or too many in a row cannot. The position stays.
      UnreadableError: a file is gone or cannot be read. The position stays.
    """
    self._plan.check_chunk(self._step, k)
    if self._stream is None:
      self._stream = self._make_stream(self._step, None)
    try:
      work, pictures = zip(*itertools.islice(self._stream, k))
    except BaseException:
      self.close()
      raise
    index = np.stack([one.index for one in work])
    chunk: dict[str, Any] = {
      "label": self._source.labels[index],
      "index": index,
      "mask": np.stack([one.mask for one in work]),
    }
    if not self._gpus:
      host = [np.asarray(image) for (image,) in pictures]
      chunk["image"] = host[0][None] if k == 1 else np.stack(host)
    if self._sharding is not None:
      chunk = {
        name: jax.make_array_from_process_local_data(self._sharding, leaf)
        for name, leaf in chunk.items()
      }
    if self._gpus:
      chunk["image"] = self._join(pictures)
    for one in work:
      for index, reason in one.skipped:
        self.skipped.add(index, reason)
    self._step += k
    return chunk

  def _join(self, pictures: Sequence[list[jax.Array]]) -> jax.Array:
    """[k, B, S, S, 3] of what the GPUs decoded, left where it is."""
    parts = [jnp.stack(steps) for steps in zip(*pictures)]
    if self._sharding is None:
      return parts[0]
    shape = (len(pictures), self._plan.batch_size, *self._source.image_shape)
    return jax.make_array_from_single_device_arrays(
      shape, self._sharding, parts
    )

  def close(self) -> None:
    """Ends the threads; the next chunk would start them again."""
    stream, self._stream = self._stream, None
    if stream is not None:
      stream.close()


class DaliEvalStream(EvalStream):
  """`EvalStream`, decoded, resized and cut by DALI."""

  def __init__(
    self,
    source: EncodedSource,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    device: str = "cpu",
    num_threads: int = 0,
    prefetch: int = 2,
  ):
    """Reads nothing yet.

    Args:
      source: the set, of N encoded images.
      batch_size: global, in examples; a multiple of `process_count`.
      process_index: this process.
      process_count: of all processes.
      device: "cpu", or "gpu" to decode on JAX's first GPU.
      num_threads: of DALI, and as many that read files; 0: one per core.
      prefetch: batches decoded ahead.

    Raises:
      ValueError: a value out of range, or a device that is not there.
    """
    super().__init__(source, batch_size, process_index, process_count)
    _check_options(source, device, num_threads, prefetch)
    size = self._index.shape[1]
    gpus = _gpus(None, batch_size, size) if device == "gpu" else []
    self._make_stream = functools.partial(
      _Stream,
      batch_size=size,
      image_size=source.image_size,
      gpus=[gpu.local_hardware_id for gpu in gpus],
      num_threads=num_threads,
      prefetch=prefetch,
    )

  def _decoded(self, source: EncodedSource) -> Iterator[dict[str, np.ndarray]]:
    prepare = functools.partial(self._prepare, source)
    stream = self._make_stream(prepare, 0, len(self))
    try:
      yield from self._batches(source, stream)
    finally:
      stream.close()

  def _batches(
    self, source: EncodedSource, stream: _Stream
  ) -> Iterator[dict[str, np.ndarray]]:
    for number, (work, (image,)) in enumerate(stream):
      self._leave_out(source, number, work.mask, work.skipped)
      label = np.where(work.mask, source.labels[work.index], 0)
      yield {
        "image": np.asarray(image),
        "label": label.astype(np.int32),
        "index": work.index,
        "mask": work.mask,
      }

  def _prepare(self, source: EncodedSource, step: int, careful: bool) -> _Work:
    """Reads this process's files of a step; where there is none, black."""
    index, mask = self._index[step].copy(), self._mask[step].copy()
    encoded = [_uncompressed(np.zeros((1, 1, 3), np.uint8))] * len(index)
    windows = np.full((len(index), 4), (0, 0, 1, 1), np.int32)
    boxes = windows.astype(np.float32)
    skipped: list[tuple[int, str]] = []
    for row in np.flatnonzero(mask):
      i = int(index[row])
      try:
        picture = _open(source, i, careful)
      except images.BadImageError as error:
        if source.on_bad_image != "skip":
          raise
        skipped.append((i, str(error)))
        index[row], mask[row] = 0, False
        continue
      left, top, right, bottom = images.evaluate_box(
        picture.width,
        picture.height,
        size=source.image_size,
        resize=source.resize,
      )
      encoded[row] = picture.encoded
      windows[row, 2:] = picture.height, picture.width
      boxes[row] = top, left, bottom, right
    return _Work(encoded, windows, boxes, index, mask, skipped)
