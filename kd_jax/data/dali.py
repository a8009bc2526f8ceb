"""The DALI pipeline: NVIDIA DALI reads, shuffles, decodes, crops and resizes.

DALI's file reader shuffles the whole list anew in every epoch and gives each
DALI pipeline its shard. There is one DALI pipeline a process, or one a GPU if
GPUs decode. The order therefore depends on the number of processes and GPUs;
batches are the same for any number of threads.

DALI checkpoints are exact and small. Each belongs to one shard, so a run that
resumes with another number of shards begins a new pass over the data.
"""

import base64
import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.jax import DALIGenericIterator

from kd_jax.data.batch import BatchPlan, Pipeline
from kd_jax.data.common import EncodedSource, Source, check_choice, check_range
from kd_jax.data.evaluation import EvalStream
from kd_jax.data.folder import FolderSource
from kd_jax.data.images import BadImageError, UnreadableError
from kd_jax.distributed import processes

_log = logging.getLogger(__name__)

# DALI's names of the two outputs and of the reader.
_OUTPUTS = ["image", "index"]
_READER = "files"


@pipeline_def
def _train_graph(
  paths: Sequence[str],
  image_size: int,
  *,
  decoder: str,
  shuffle: bool,
  shuffle_seed: int,
  shard: int,
  shards: int,
  area: tuple[float, float],
  aspect: tuple[float, float],
) -> Any:
  """Random crops uint8 [B, S, S, 3], and positions int32 [B, 1]."""
  encoded, index = fn.readers.file(
    name=_READER,
    files=list(paths),
    shuffle_after_epoch=shuffle,
    shuffle_after_epoch_seed=shuffle_seed,
    shard_id=shard,
    num_shards=shards,
    pad_last_batch=True,
  )
  crop = fn.decoders.image_random_crop(
    encoded,
    device=decoder,
    output_type=types.DALIImageType.RGB,
    random_area=list(area),
    random_aspect_ratio=list(aspect),
    num_attempts=10,
  )
  image = fn.resize(crop, size=[image_size, image_size], antialias=True)
  return image, index.gpu() if decoder == "mixed" else index


@pipeline_def
def _eval_graph(
  paths: Sequence[str], image_size: int, resize: int, *, decoder: str
) -> Any:
  """Centre crops uint8 [B, S, S, 3], in the order of the paths."""
  encoded, _ = fn.readers.file(name=_READER, files=list(paths))
  whole: Any = fn.decoders.image(
    encoded, device=decoder, output_type=types.DALIImageType.RGB
  )
  image: Any = fn.resize(whole, resize_shorter=resize, antialias=True)
  return fn.crop(image, crop=[image_size, image_size])


def _next(iterator: DALIGenericIterator) -> dict[str, jax.Array]:
  """The next outputs of DALI.

  Raises:
    StopIteration: at the end of a pass over the data.
    UnreadableError: the reader failed.
    BadImageError: a decoder failed.
  """
  try:
    return next(iterator)
  except RuntimeError as error:
    text = str(error)
    found = re.search(r"encountered:\s+(.*)", text)
    reason = found[1] if found else text
    if "fn.readers." in text:
      raise UnreadableError(
        f"DALI could not read an image file: {reason}. Check that the data are"
        " still there and that no file is empty"
      ) from error
    if "fn.decoders." in text:
      raise BadImageError(
        f"DALI could not decode an image file: {reason}. The pipeline 'grain'"
        " names every such file, and leaves them out with on_bad_image='skip'"
      ) from error
    raise


def _gpu_ids(sharding: NamedSharding | None = None) -> list[int]:
  """This process's GPUs as CUDA numbers them; without a sharding, the first."""
  gpus = jax.local_devices()[:1]
  if sharding is not None:
    gpus = list(sharding.mesh.local_mesh.devices.flat)
  if gpus[0].platform != "gpu":
    raise ValueError(
      "device 'gpu' decodes on the GPUs that JAX uses, and it uses"
      f" {gpus[0].platform} here. Use device 'cpu', or install JAX for CUDA"
      ' (pip install "jax[cuda12]").'
    )
  if "xla_gpu_enable_command_buffer=" not in os.environ.get("XLA_FLAGS", ""):
    # DALI's examples for JAX say so.
    _log.warning(
      "DALI on GPUs and XLA's command buffers disturb each other: set"
      " XLA_FLAGS=--xla_gpu_enable_command_buffer= if CUDA graphs fail"
    )
  return [gpu.local_hardware_id for gpu in gpus]


def _check_options(source: Source | EncodedSource, device: str) -> None:
  if not isinstance(source, FolderSource):
    raise ValueError(
      f"The pipeline 'dali' reads image files, and {source.name} has none. Use"
      " the pipeline 'grain'."
    )
  if source.on_bad_image != "error":
    raise ValueError(
      "The pipeline 'dali' cannot leave out bad images: expected on_bad_image"
      f" 'error', got {source.on_bad_image!r}. Use the pipeline 'grain', or"
      " remove the bad files."
    )
  check_choice("device", device, ("cpu", "gpu"))


class DaliPipeline(Pipeline):
  """Batches made by DALI; see `kd_jax.data.batch.Pipeline`.

  `resident` is {}, a chunk is the stacked batches, and `load` hands its row
  through. The flip is not DALI's: it is part of the augmentation on the device,
  as with the other pipelines.
  """

  def __init__(
    self,
    source: FolderSource,
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
    sharding: NamedSharding | None = None,
  ):
    """Checks the options; nothing is read before the first chunk.

    Args:
      source: the training set, of image files.
      batch_size: global, in examples; a multiple of all shards.
      seed: of order and crops, 0 or more.
      process_index: this process.
      process_count: of all processes.
      shuffle: false keeps the order of the files, a part for each shard.
      crop_area: least and largest share of a picture that a crop takes.
      crop_aspect: least and largest width / height of a crop.
      device: "cpu", or "gpu" to decode and resize on this process's GPUs
        (written after DALI's documentation, not yet run on one).
      num_threads: of DALI; 0: one per core.
      sharding: with device "gpu", of a chunk's leaves [k, B, ...] over the
        devices of all processes: P(None, axis). The leaves are then global
        arrays. None: JAX's first GPU. On the CPU, leaves are numpy arrays.

    Raises:
      ValueError: a value out of range, or no GPU.
    """
    _check_options(source, device)
    check_range("crop_area", crop_area, 1)
    check_range("crop_aspect", crop_aspect, 100)
    plan = BatchPlan(
      "dali",
      len(source),
      batch_size,
      seed,
      process_index,
      process_count,
      shuffle,
    )
    super().__init__(plan)
    self._source = source
    self._crop = {"area": crop_area, "aspect": crop_aspect}
    self._num_threads = num_threads or len(os.sched_getaffinity(0))
    self._on_gpus = device == "gpu"
    self._devices = _gpu_ids(sharding) if self._on_gpus else [None]
    self._sharding = sharding if self._on_gpus else None
    pipelines = len(self._devices)
    if plan.local_size % pipelines:
      raise ValueError(
        f"batch_size must be a multiple of the {pipelines * process_count}"
        f" GPUs, got {batch_size}."
      )
    self._shards = range(
      process_index * pipelines, (process_index + 1) * pipelines
    )
    self._num_shards = process_count * pipelines
    self._join = jax.jit(join, out_shardings=self._sharding)
    # Where DALI's passes over the data began, and DALI's own checkpoints of
    # `step`; none: the beginning of the first pass.
    self._first_step = 0
    self._checkpoints: list[bytes] = []
    self._iterator: DALIGenericIterator | None = None

  def _make_iterator(self) -> DALIGenericIterator:
    """DALI at the current step."""
    seeds = np.random.SeedSequence((self._plan.seed, self._first_step))
    # All shards have the same order. DALI takes 31 bits of a seed in any case.
    order, *crops = (seeds.generate_state(1 + self._num_shards) >> 1).tolist()
    graphs = [
      _train_graph(
        self._source.paths,
        self._source.image_size,
        decoder="mixed" if self._on_gpus else "cpu",
        shuffle=self._plan.shuffle,
        shuffle_seed=order,
        shard=shard,
        shards=self._num_shards,
        **self._crop,
        seed=crops[shard],
        batch_size=self._plan.local_size // len(self._devices),
        num_threads=self._num_threads,
        device_id=self._devices[i],
        enable_checkpointing=True,
        checkpoint=self._checkpoints[i] if self._checkpoints else None,
      )
      for i, shard in enumerate(self._shards)
    ]
    sharding = self._sharding and NamedSharding(
      self._sharding.mesh, PartitionSpec(*self._sharding.spec[1:])
    )
    return DALIGenericIterator(
      graphs,
      _OUTPUTS,
      reader_name=_READER,
      auto_reset=True,
      prepare_first_batch=False,
      sharding=sharding,
    )

  def next_chunk(self, k: int) -> dict[str, Any]:
    """Decodes the next `k` batches, stacked: leaves [k, B, ...].

    Raises:
      ValueError: `k` steps would cross the end of the epoch.
      BadImageError, UnreadableError: see `_next`. The position stays.
    """
    self._plan.check_chunk(self._step, k)
    outputs = []
    try:
      if self._iterator is None:
        self._iterator = self._make_iterator()
      for done in range(self._step + 1, self._step + k + 1):
        outputs.append(_next(self._iterator))
        if (done - self._first_step) % self.steps_per_epoch == 0:
          # DALI pads an incomplete batch at the end of its pass; drop it.
          with contextlib.suppress(StopIteration):
            while True:
              _next(self._iterator)
      self._checkpoints = self._iterator.checkpoints()
    except BaseException:
      self.close()
      raise
    self._step += k
    images, index = ([output[key] for output in outputs] for key in _OUTPUTS)
    if self._on_gpus:
      return self._join(images, index, self._source.labels)
    positions = np.stack([np.asarray(i)[:, 0] for i in index])
    return {
      "image": np.asarray(images[0])[None] if k == 1 else np.stack(images),
      "label": self._source.labels[positions],
      "index": positions,
      "mask": np.ones(positions.shape, bool),
    }

  def _describe_shards(self) -> str:
    """What DALI's checkpoints are only valid with."""
    return f"{self._num_shards} x {'gpu' if self._on_gpus else 'cpu'}"

  def get_state(self) -> dict[str, Any]:
    """Returns the position; all processes call this together."""
    mine = {
      str(shard): base64.b64encode(checkpoint).decode()
      for shard, checkpoint in zip(self._shards, self._checkpoints)
    }
    merged: dict[str, str] = {}
    for checkpoints in processes.all_gather_object(mine):
      merged.update(checkpoints)
    return {
      **super().get_state(),
      "first_step": self._first_step,
      "shards": self._describe_shards(),
      "checkpoints": merged,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position of `get_state`.

    If the state has another number of shards or another decoder, the step is
    the same and a new pass over the data begins: images may be repeated.

    Raises:
      ValueError: the state has another order (seed, batch size, ...).
    """
    super().set_state(state)
    if state.get("shards") == self._describe_shards():
      self._first_step = state["first_step"]
      checkpoints = state["checkpoints"]
      self._checkpoints = [
        base64.b64decode(checkpoints[str(shard)])
        for shard in self._shards
        if checkpoints
      ]
      return
    _log.warning(
      "DALI's position was saved for shards %s, and this run has %s (one a"
      " process, or one a GPU that decodes): a new pass over the training set"
      " begins at step %d",
      state.get("shards"),
      self._describe_shards(),
      self._step,
    )
    self._first_step, self._checkpoints = self._step, []

  def close(self) -> None:
    """Ends DALI's threads; the next chunk starts them again."""
    self._iterator = None


def join(
  images: list[jax.Array], index: list[jax.Array], labels: jax.Array
) -> dict[str, jax.Array]:
  """Stacks the batches that GPUs decoded, without leaving them."""
  positions = jnp.stack(index)[..., 0]
  return {
    "image": jnp.stack(images),
    "label": jnp.take(labels, positions),
    "index": positions,
    "mask": jnp.ones(positions.shape, bool),
  }


class DaliEvalStream(EvalStream):
  """`EvalStream`, decoded, resized and cropped by DALI."""

  def __init__(
    self,
    source: FolderSource,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    device: str = "cpu",
    num_threads: int = 0,
  ):
    """Takes the arguments of `EvalStream` and `DaliPipeline`."""
    _check_options(source, device)
    super().__init__(
      source, batch_size, process_index, process_count, num_threads=num_threads
    )
    self._gpu = _gpu_ids()[0] if device == "gpu" else None

  def _decoded(self, source: EncodedSource) -> Iterator[dict[str, np.ndarray]]:
    assert isinstance(source, FolderSource)
    # File 0 stands for the padding.
    graph = _eval_graph(
      [source.paths[i] for i in self._index.flat],
      source.image_size,
      source.resize,
      decoder="cpu" if self._gpu is None else "mixed",
      batch_size=self._index.shape[1],
      num_threads=self._num_threads,
      device_id=self._gpu,
    )
    iterator = DALIGenericIterator(
      [graph], ["image"], prepare_first_batch=False
    )
    for index, mask in zip(self._index, self._mask):
      image = np.asarray(_next(iterator)["image"])
      if not mask.all():
        image = np.where(mask[:, None, None, None], image, 0)
      label = np.where(mask, source.labels[index], 0).astype(np.int32)
      yield {"image": image, "label": label, "index": index, "mask": mask}
