"""PyTorch's side of `benchmarks.step`: the same networks, methods and steps.

Two programs train them:

- `Eager` has the structure of the published toolboxes. A loader with worker
  processes crops, flips and normalises on the host, in float32. Each step calls
  `.item()` on the loss and on the hits. A worker draws CRD's negatives image by
  image. It skips the toolboxes' round trip through Pillow.
- `Compiled` is PyTorch at its best. The data set is on the device as uint8 and
  augmented there; maps are channels-last; bfloat16 autocast, `torch.compile`
  with CUDA graphs on a GPU. The host waits for nothing.

This file needs PyTorch and numpy, and kd_jax's tables of networks.
"""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import torch_methods, torch_networks
from benchmarks import work as work_lib


class Trainer(nn.Module):
  """Student, teacher and method, from images to the loss."""

  def __init__(self, work: work_lib.Work, weights: pathlib.Path):
    """Builds them with kd_jax's weights.

    Args:
      work: what to train.
      weights: folder that `work.prepare` wrote.

    Raises:
      ValueError: for a network or a method that this side does not have, or
        if a network is not kd_jax's.
    """
    super().__init__()
    if work.method not in work_lib.COMMON:
      raise ValueError(
        f"PyTorch's side has the methods {', '.join(work_lib.COMMON)}, got"
        f" {work.method}. Leave the side out with --sides jax"
      )
    self.student = torch_networks.load(work, "student", weights)
    self.teacher = None
    outputs = []
    if work.has_teacher:
      self.teacher = torch_networks.load(
        work, "teacher", weights
      ).requires_grad_(False)
      outputs = [self._example(work, m) for m in (self.student, self.teacher)]
    self.method = torch_methods.create(work, *outputs)
    arrays = work_lib.read(weights / work.method_file)
    self.method.load_state_dict(
      {
        name.partition("/")[2].replace("/", "."): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith(("torch/", "memory/"))
      }
    )

  @staticmethod
  @torch.no_grad()
  def _example(
    work: work_lib.Work, network: nn.Module
  ) -> torch_networks.Output:
    before = network.training
    output = network.eval()(torch.zeros(1, 3, work.image_size, work.image_size))
    network.train(before)
    return output

  def train(self, mode: bool = True) -> "Trainer":
    """The teacher stays as it is."""
    super().train(mode)
    if self.teacher is not None:
      self.teacher.eval()
    return self

  def forward(
    self,
    images: torch.Tensor,
    labels: torch.Tensor,
    index: torch.Tensor,
    negatives: torch.Tensor | None = None,
  ) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The loss, the hits, and what `method.remember` takes."""
    teacher = head = None
    if self.teacher is not None:
      with torch.no_grad():
        teacher = self.teacher(images)
      head = getattr(self.teacher, self.teacher.head)
    loss, logits, found = self.method(
      self.student(images), teacher, head, labels, index, negatives
    )
    hits = (logits.argmax(dim=1) == labels).sum()
    return loss, hits, found


def _optimizer(trainer: Trainer, **options: Any) -> torch.optim.SGD:
  return torch.optim.SGD(
    [p for p in trainer.parameters() if p.requires_grad],
    lr=work_lib.LEARNING_RATE,
    momentum=work_lib.MOMENTUM,
    weight_decay=work_lib.WEIGHT_DECAY,
    **options,
  )


def _device() -> torch.device:
  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Examples(torch.utils.data.Dataset):
  """What the loader's workers do: crop, flip, normalise, draw negatives.

  An epoch is as long as the real set's, however few examples are kept: the
  loader's workers, and with them the device, come to rest between epochs.
  """

  def __init__(self, work: work_lib.Work, arrays: "Arrays"):
    """Keeps the set in memory, as torchvision's CIFAR does."""
    self._work, self._arrays = work, arrays
    self._others = None
    if work.method == "crd":
      every = np.arange(work.examples)
      self._others = [every[arrays.labels != c] for c in range(work.classes)]

  def __len__(self) -> int:
    return self._work.epoch_examples

  def __getitem__(self, i: int) -> tuple[Any, ...]:
    i %= self._work.examples
    pad, size = self._work.pad, self._work.image_size
    image, label = self._arrays.images[i], int(self._arrays.labels[i])
    if pad:
      image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
      y, x = (int(v) for v in torch.randint(2 * pad + 1, (2,)))
      image = image[y : y + size, x : x + size]
    if self._work.flip and torch.rand(()) < 0.5:
      image = image[:, ::-1]
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    pixels = pixels.float().div_(255)
    mean, std = (torch.tensor(v) for v in (self._arrays.mean, self._arrays.std))
    pixels = pixels.sub_(mean[:, None, None]).div_(std[:, None, None])
    if self._others is None:
      return pixels, label, i
    others = self._others[label]
    k = self._work.settings["k"]
    return (
      pixels,
      label,
      i,
      np.random.choice(others, k, replace=k > len(others)),
    )


class Arrays(NamedTuple):
  """A training set: uint8 [N, H, W, 3], int64 [N], and its constants."""

  images: np.ndarray
  labels: np.ndarray
  mean: tuple[float, ...]
  std: tuple[float, ...]


def arrays(work: work_lib.Work) -> Arrays:
  """The training set of kd_jax's side."""
  return arrays_of(work.source)


def arrays_of(source: Any) -> Arrays:
  """Of a `kd_jax.data.Source`."""
  labels = source.labels.astype(np.int64)
  return Arrays(source.images, labels, source.mean, source.std)


class Eager:
  """The published structure; see the module.

  Attributes:
    steps: in one dispatch: 1.
    host_seconds: None: the host waits for every step.
    dispatches: made.
  """

  def __init__(
    self, work: work_lib.Work, weights: pathlib.Path, *, workers: int = 8
  ):
    """Builds it.

    Args:
      work: what to train.
      weights: folder that `work.prepare` wrote.
      workers: processes of the loader.
    """
    self.steps, self.host_seconds, self.dispatches = 1, None, 0
    self._device = _device()
    self._trainer = Trainer(work, weights).to(self._device)
    self._optimizer = _optimizer(self._trainer)
    self._batches = self._endless(
      torch.utils.data.DataLoader(
        Examples(work, arrays(work)),
        batch_size=work.batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
      )
    )

  @staticmethod
  def _endless(loader: Any) -> Iterator[Any]:
    while True:
      yield from loader

  def step(self, *batch: torch.Tensor) -> tuple[float, float]:
    """One optimiser update; the loss, and the number of hits."""
    batch = tuple(x.to(self._device) for x in batch)
    loss, hits, found = self._trainer(*batch)
    self._optimizer.zero_grad()
    loss.backward()
    self._optimizer.step()
    if found is not None:
      self._trainer.method.remember(found)
    return loss.item(), hits.item()

  def run(self, steps: int) -> list[float]:
    """Takes steps; the loss of each."""
    self.dispatches += steps
    return [self.step(*next(self._batches))[0] for _ in range(steps)]


class Compiled:
  """PyTorch at its best; see the module.

  Attributes:
    steps: in one dispatch: 1.
    host_seconds: spent by the host on dispatches.
    dispatches: made.
  """

  def __init__(self, work: work_lib.Work, weights: pathlib.Path):
    """Builds it; `torch.compile` works at the first step.

    Args:
      work: what to train.
      weights: folder that `work.prepare` wrote.
    """
    self.steps, self.host_seconds, self.dispatches = 1, 0.0, 0
    self._work, self._device = work, _device()
    self._on_gpu = self._device.type == "cuda"
    trainer = Trainer(work, weights).to(
      self._device, memory_format=torch.channels_last
    )
    self._trainer = trainer
    self._optimizer = _optimizer(
      trainer, **({"fused": True} if self._on_gpu else {"foreach": True})
    )
    source = arrays(work)
    self._images = torch.from_numpy(source.images).to(self._device)
    self._labels = torch.from_numpy(source.labels).to(self._device)
    mean, std = (
      torch.tensor(v, device=self._device) for v in (source.mean, source.std)
    )
    for constant in (self._images, self._labels, mean, std):
      # Else each replay of a CUDA graph would copy them, the whole set.
      torch._dynamo.mark_static_address(constant)

    def loss_of(images, labels, index):
      with torch.autocast(self._device.type, dtype=torch.bfloat16):
        pixels = self._augment(images[index])
        pixels = (pixels.float() / 255 - mean) / std
        return trainer(pixels.permute(0, 3, 1, 2), labels[index], index)

    mode = "reduce-overhead" if self._on_gpu else "default"
    self._loss: Callable[..., Any] = torch.compile(loss_of, mode=mode)
    self._order = self._endless()

  def _augment(self, images: torch.Tensor) -> torch.Tensor:
    """Crops and flips [B, H, W, 3] uint8 by indices."""
    work, size, count = self._work, self._work.image_size, len(images)
    place = torch.arange(size, device=images.device).expand(count, size)
    rows = columns = place
    if work.flip:
      flip = torch.rand((count, 1), device=images.device) < 0.5
      columns = torch.where(flip, size - 1 - columns, columns)
    if work.pad:
      images = F.pad(images, (0, 0, work.pad, work.pad, work.pad, work.pad))
      corner = torch.randint(
        2 * work.pad + 1, (2, count, 1), device=images.device
      )
      rows, columns = rows + corner[0], columns + corner[1]
    example = torch.arange(count, device=images.device)[:, None, None]
    return images[example, rows[:, :, None], columns[:, None, :]]

  def _endless(self) -> Iterator[torch.Tensor]:
    batch = self._work.batch
    while True:
      order = torch.randperm(self._work.examples, device=self._device)
      for i in range(work_lib.steps_per_epoch(self._work)):
        yield order[i * batch : (i + 1) * batch]

  def run(self, steps: int) -> list[float]:
    """Takes steps, and waits for the last; the mean loss of them."""
    total = torch.zeros((), device=self._device)
    begin = time.perf_counter()
    for _ in range(steps):
      if self._on_gpu:
        torch.compiler.cudagraph_mark_step_begin()
      loss, _, found = self._loss(self._images, self._labels, next(self._order))
      loss.backward()
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
      if found is not None:
        self._trainer.method.remember(found)
      total += loss.detach()
    self.host_seconds += time.perf_counter() - begin
    self.dispatches += steps
    return [total.item() / steps]


def device() -> dict[str, Any]:
  """The device's kind, and its peak memory in bytes where it counts it."""
  if not torch.cuda.is_available():
    return {"device": "cpu", "platform": "cpu", "peak_bytes": None}
  return {
    "device": torch.cuda.get_device_name(),
    "platform": "gpu",
    "peak_bytes": torch.cuda.max_memory_allocated(),
  }
