"""PyTorch's side of `benchmarks.step`: the same networks, methods and steps.

Two ways to train them. `Eager` is the structure of the published toolboxes:
a loader with worker processes that crops, flips and normalises on the host,
float32, `.item()` of the loss and of the hits after each step; CRD's negatives
are drawn for each image by its worker. It does without Pillow's round trip,
which those make. `Compiled` is what PyTorch can do: the set on the device as
uint8, augmentation there, channels-last maps, bfloat16 autocast and
`torch.compile`, with CUDA graphs on a GPU; the host waits for nothing.

The names of all modules are those of kd_jax, so that weights go over as they
are. This file needs PyTorch and numpy, and kd_jax's tables of networks.
"""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import work as work_lib

# CRD's reference adds it to the denominators.
_EPSILON = 1e-7


class Output(NamedTuple):
  """Logits [B, K], the stages' maps, the last map and its pool [B, C]."""

  logits: torch.Tensor
  stages: list[torch.Tensor]
  last: torch.Tensor
  pooled: torch.Tensor


def _conv(inputs: int, outputs: int, size: int, **options: Any) -> nn.Conv2d:
  return nn.Conv2d(
    inputs, outputs, size, padding=size // 2, bias=False, **options
  )


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  def __init__(self, inputs: int, width: int, stride: int):
    super().__init__()
    self.outputs = width
    self.conv1 = _conv(inputs, width, 3, stride=stride)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = _conv(width, width, 3)
    self.bn2 = nn.BatchNorm2d(width)
    self.downsample = _shortcut(inputs, width, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W], activated."""
    y = F.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    return F.relu(self.downsample(x) + y)


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut."""

  def __init__(self, inputs: int, width: int, stride: int):
    super().__init__()
    self.outputs = 4 * width
    self.conv1 = _conv(inputs, width, 1)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = _conv(width, width, 3, stride=stride)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = _conv(width, self.outputs, 1)
    self.bn3 = nn.BatchNorm2d(self.outputs)
    self.downsample = _shortcut(inputs, self.outputs, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W], activated."""
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(y))
    return F.relu(self.downsample(x) + y)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
  if stride == 1 and inputs == outputs:
    return nn.Identity()
  return nn.Sequential(
    _conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs)
  )


class ResNet(nn.Module):
  """Residual networks, with the stem of small or of large images."""

  head = "fc"

  def __init__(
    self,
    block: type[BasicBlock] | type[Bottleneck],
    stem: int,
    blocks: tuple[int, ...],
    widths: tuple[int, ...],
    classes: int,
    *,
    large: bool,
  ):
    super().__init__()
    if large:
      self.conv1 = _conv(3, stem, 7, stride=2)
    else:
      self.conv1 = _conv(3, stem, 3)
    self.bn1 = nn.BatchNorm2d(stem)
    self._large = large
    self._stages = len(blocks)
    channels = stem
    for stage, (count, width) in enumerate(zip(blocks, widths), start=1):
      modules = []
      for i in range(count):
        stride = 2 if stage > 1 and i == 0 else 1
        modules.append(block(channels, width, stride))
        channels = modules[-1].outputs
      self.add_module(f"layer{stage}", nn.Sequential(*modules))
    self.fc = nn.Linear(channels, classes)

  def forward(self, x: torch.Tensor) -> Output:
    """Normalised images [B, 3, H, W]."""
    x = F.relu(self.bn1(self.conv1(x)))
    if self._large:
      x = F.max_pool2d(x, 3, stride=2, padding=1)
    stages = []
    for stage in range(1, self._stages + 1):
      x = getattr(self, f"layer{stage}")(x)
      stages.append(x)
    return _finish(self.fc, stages, x)


class VGG(nn.Module):
  """Five blocks of 3x3 convolutions, max-pools between the first four."""

  head = "classifier"

  def __init__(self, convs: tuple[int, ...], classes: int):
    super().__init__()
    widths = (64, 128, 256, 512, 512)
    channels = 3
    for block, (count, width) in enumerate(zip(convs, widths)):
      modules: list[nn.Module] = []
      for _ in range(count):
        modules += [
          nn.Conv2d(channels, width, 3, padding=1),
          nn.BatchNorm2d(width),
          nn.ReLU(),
        ]
        channels = width
      self.add_module(f"block{block}", nn.Sequential(*modules))
    self.classifier = nn.Linear(channels, classes)

  def forward(self, x: torch.Tensor) -> Output:
    """Normalised images [B, 3, H, W]."""
    pools = 4 if x.shape[2] >= 64 else 3
    stages = []
    for block in range(5):
      if 1 <= block <= pools:
        x = F.max_pool2d(x, 2)
      x = getattr(self, f"block{block}")(x)
      stages.append(x)
    return _finish(self.classifier, stages[1:], x)


class SplitUnit(nn.Module):
  """Half of the channels pass, the other half is convolved; a shuffle."""

  def __init__(self, channels: int):
    super().__init__()
    width = channels // 2
    self.conv1 = _conv(width, width, 1)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = _conv(width, width, 3, groups=width)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = _conv(width, width, 1)
    self.bn3 = nn.BatchNorm2d(width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W], activated."""
    passed, y = x.chunk(2, dim=1)
    y = F.relu(self.bn1(self.conv1(y)))
    y = self.bn2(self.conv2(y))
    y = F.relu(self.bn3(self.conv3(y)))
    return _shuffle(torch.cat([passed, y], dim=1))


class DownUnit(nn.Module):
  """Two convolved branches at half the resolution, joined; a shuffle."""

  def __init__(self, channels: int, width: int):
    super().__init__()
    half = width // 2
    self.conv1 = _conv(channels, channels, 3, stride=2, groups=channels)
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv2 = _conv(channels, half, 1)
    self.bn2 = nn.BatchNorm2d(half)
    self.conv3 = _conv(channels, half, 1)
    self.bn3 = nn.BatchNorm2d(half)
    self.conv4 = _conv(half, half, 3, stride=2, groups=half)
    self.bn4 = nn.BatchNorm2d(half)
    self.conv5 = _conv(half, half, 1)
    self.bn5 = nn.BatchNorm2d(half)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W], activated."""
    left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
    right = F.relu(self.bn3(self.conv3(x)))
    right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
    return _shuffle(F.relu(torch.cat([left, right], dim=1)))


def _shuffle(x: torch.Tensor) -> torch.Tensor:
  batch, channels, height, width = x.shape
  x = x.view(batch, 2, channels // 2, height, width)
  return x.transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleNetV2(nn.Module):
  """The network for small images, with a 1x1 stem."""

  head = "linear"

  def __init__(
    self,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    last_width: int,
    classes: int,
  ):
    super().__init__()
    self.conv1 = _conv(3, 24, 1)
    self.bn1 = nn.BatchNorm2d(24)
    channels = 24
    for stage, (width, count) in enumerate(zip(widths, blocks), start=1):
      units = [SplitUnit(width) for _ in range(count)]
      self.add_module(
        f"layer{stage}", nn.Sequential(DownUnit(channels, width), *units)
      )
      channels = width
    self.conv2 = _conv(channels, last_width, 1)
    self.bn2 = nn.BatchNorm2d(last_width)
    self.linear = nn.Linear(last_width, classes)

  def forward(self, x: torch.Tensor) -> Output:
    """Normalised images [B, 3, H, W]."""
    x = F.relu(self.bn1(self.conv1(x)))
    stages = []
    for layer in (self.layer1, self.layer2, self.layer3):
      x = layer(x)
      stages.append(x)
    x = F.relu(self.bn2(self.conv2(x)))
    return _finish(self.linear, stages, x)


def _finish(
  head: nn.Linear, stages: list[torch.Tensor], last: torch.Tensor
) -> Output:
  pooled = last.mean(dim=(2, 3))
  return Output(head(pooled), stages, last, pooled)


def create(name: str, classes: int) -> nn.Module:
  """Builds a network by kd_jax's name, with PyTorch's own initial weights.

  Raises:
    ValueError: for one that this side does not have.
  """
  small = {
    "resnet8x4": (8, (32, 64, 128, 256)),
    "resnet20x4": (20, (32, 64, 128, 256)),
    "resnet32x4": (32, (32, 64, 128, 256)),
    "_tiny": (8, (4, 4, 8, 8)),
    "_tiny_wide": (8, (8, 8, 16, 32)),
  }
  large = {
    "ResNet18": (BasicBlock, (2, 2, 2, 2)),
    "ResNet34": (BasicBlock, (3, 4, 6, 3)),
    "ResNet50": (Bottleneck, (3, 4, 6, 3)),
  }
  if name in small:
    depth, (stem, *widths) = small[name]
    blocks = 3 * ((depth - 2) // 6,)
    return ResNet(BasicBlock, stem, blocks, widths, classes, large=False)
  if name in large:
    block, blocks = large[name]
    widths = (64, 128, 256, 512)
    return ResNet(block, 64, blocks, widths, classes, large=True)
  if name == "vgg8":
    return VGG((1, 1, 1, 1, 1), classes)
  if name == "ShuffleV2_1_5":
    return ShuffleNetV2((176, 352, 704), (3, 7, 3), 1024, classes)
  known = [*small, *large, "vgg8", "ShuffleV2_1_5"]
  raise ValueError(
    f"unknown network {name!r} on PyTorch's side: expected one of"
    f" {', '.join(known)}. Leave the side out with --sides jax"
  )


def load(work: work_lib.Work, role: str, weights: pathlib.Path) -> nn.Module:
  """A network with kd_jax's weights, after a look at what it computes.

  Raises:
    ValueError: if it does not say of the images what kd_jax's says.
  """
  name = work.networks[role]
  arrays = work_lib.read(weights / work.network_file(role))
  logits = arrays.pop("logits")
  network = create(name, work.classes)
  network.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})
  network.eval()
  images = torch.from_numpy(work.checked_images()).permute(0, 3, 1, 2)
  with torch.no_grad():
    ours = network(images).logits.numpy()
  distance = np.linalg.norm(ours - logits) / np.linalg.norm(logits)
  if not distance < 1e-4:
    raise ValueError(
      f"{name}: expected the logits of kd_jax's network, of the same weights"
      f" and images, to 1e-4, got a relative distance of {distance:.2g}. One of"
      " the two networks is another one"
    )
  return network.train(role == "student")


class Projector(nn.Module):
  """1x1, 3x3, 1x1 convolutions with BatchNorm and ReLU between them."""

  def __init__(self, inputs: int, middle: int, outputs: int, *, end: bool):
    super().__init__()
    self.conv1 = _conv(inputs, middle, 1)
    self.bn1 = nn.BatchNorm2d(middle)
    self.conv2 = _conv(middle, middle, 3)
    self.bn2 = nn.BatchNorm2d(middle)
    self.conv3 = _conv(middle, outputs, 1)
    if end:
      self.bn3 = nn.BatchNorm2d(outputs)
    self._end = end

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, outputs, H, W]."""
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.relu(self.bn2(self.conv2(x)))
    x = self.conv3(x)
    return F.relu(self.bn3(x)) if self._end else x


class Embedding(nn.Module):
  """CRD's: a linear layer onto the unit sphere."""

  def __init__(self, inputs: int, outputs: int):
    super().__init__()
    self.linear = nn.Linear(inputs, outputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B, outputs]."""
    return F.normalize(self.linear(x).float())


class SimilarityEmbedding(nn.Module):
  """SemCKD's query or key of rows of the batch's similarities."""

  def __init__(self, width: int):
    super().__init__()
    self.linear1 = nn.Linear(width, 2 * (width // 4))
    self.linear2 = nn.Linear(2 * (width // 4), width // 4)

  def forward(self, rows: torch.Tensor) -> torch.Tensor:
    """[B, width] -> [B, width // 4]."""
    return F.normalize(self.linear2(F.relu(self.linear1(rows))).float())


def _pool(x: torch.Tensor, size: int) -> torch.Tensor:
  return x if x.shape[2] == size else F.adaptive_avg_pool2d(x, size)


class Method(nn.Module):
  """The terms that all methods share; the methods add theirs."""

  def __init__(self, work: work_lib.Work):
    super().__init__()
    self._weights = work.weights
    self._temperature = work.settings.get("temperature", 4.0)

  def forward(
    self,
    student: Output,
    teacher: Output | None,
    teacher_head: nn.Module | None,
    labels: torch.Tensor,
    index: torch.Tensor,
    negatives: torch.Tensor | None,
  ) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The loss, the logits of the prediction, and what `remember` takes."""
    del teacher_head, index, negatives
    return self.logit_loss(student, teacher, labels), student.logits, None

  def logit_loss(
    self, student: Output, teacher: Output | None, labels: torch.Tensor
  ) -> torch.Tensor:
    """The weighted cross-entropy and the teacher's softened logits."""
    logits = student.logits.float()
    loss = self._weights["ce"] * F.cross_entropy(logits, labels)
    if teacher is not None and self._weights["kd"]:
      t = self._temperature
      divergence = F.kl_div(
        F.log_softmax(logits / t, dim=1),
        F.softmax(teacher.logits.float() / t, dim=1),
        reduction="batchmean",
      )
      loss = loss + self._weights["kd"] * t**2 * divergence
    return loss

  def remember(self, found: Any) -> None:
    """Moves what the method remembers, after the gradient."""


class SimKD(Method):
  """The teacher's last map, projected onto; and its classifier, reused."""

  def __init__(self, work: work_lib.Work, student: Output, teacher: Output):
    super().__init__(work)
    channels = teacher.last.shape[1]
    self.projector = Projector(
      student.stages[-1].shape[1],
      channels // work.settings["factor"],
      channels,
      end=True,
    )

  def forward(self, student, teacher, teacher_head, labels, index, negatives):
    """See `Method`."""
    del labels, index, negatives
    size = min(student.stages[-1].shape[2], teacher.last.shape[2])
    projected = self.projector(_pool(student.stages[-1], size))
    target = _pool(teacher.last, size)
    loss = F.mse_loss(projected.float(), target.float())
    with torch.no_grad():  # it serves the count of hits alone
      logits = teacher_head(projected.mean(dim=(2, 3)))
    return self._weights["simkd"] * loss, logits, None


class SemCKD(Method):
  """Every student stage learns from every teacher stage, by attention."""

  def __init__(self, work: work_lib.Work, student: Output, teacher: Output):
    super().__init__(work)
    for word, stages in (("query", student.stages), ("key", teacher.stages)):
      for i in range(1, len(stages) + 1):
        self.add_module(f"{word}{i}", SimilarityEmbedding(work.batch))
    for i, map_s in enumerate(student.stages, start=1):
      for j, map_t in enumerate(teacher.stages, start=1):
        inputs, channels = map_s.shape[1], map_t.shape[1]
        self.add_module(
          f"project{i}_{j}",
          Projector(inputs, 2 * channels, channels, end=False),
        )
    self._soft = work.settings["soft"]

  def _embed(self, maps: list[torch.Tensor], word: str) -> torch.Tensor:
    rows = []
    for i, x in enumerate(maps, start=1):
      flat = x.flatten(1).float()
      rows.append(getattr(self, f"{word}{i}")(flat @ flat.T))
    return torch.stack(rows, dim=1)

  def forward(self, student, teacher, teacher_head, labels, index, negatives):
    """See `Method`."""
    del teacher_head, index, negatives
    queries = self._embed(student.stages, "query")
    keys = self._embed(teacher.stages, "key")
    attention = F.softmax(queries @ keys.mT / self._soft, dim=-1)
    rows = []
    for i, map_s in enumerate(student.stages, start=1):
      errors = []
      for j, map_t in enumerate(teacher.stages, start=1):
        size = min(map_s.shape[2], map_t.shape[2])
        made = getattr(self, f"project{i}_{j}")(_pool(map_s, size))
        error = made.float() - _pool(map_t, size).float()
        errors.append(error.square().mean(dim=(1, 2, 3)))
      rows.append(torch.stack(errors, dim=-1))
    term = (attention * torch.stack(rows, dim=1)).sum(dim=(1, 2))
    term = term.mean() / len(rows)
    loss = self.logit_loss(student, teacher, labels)
    return loss + self._weights["semckd"] * term, student.logits, None


class CRD(Method):
  """Embeddings of one image together, those of other classes apart."""

  def __init__(self, work: work_lib.Work, student: Output, teacher: Output):
    super().__init__(work)
    fields = work.settings
    dim = fields["feat_dim"]
    self._examples, self._classes = work.examples, work.classes
    self._k, self._momentum = fields["k"], fields["momentum"]
    self._tau = fields["nce_temperature"]
    self.embed_s = Embedding(student.pooled.shape[1], dim)
    self.embed_t = Embedding(teacher.pooled.shape[1], dim)
    for name in ("bank_s", "bank_t"):
      self.register_buffer(name, torch.zeros(work.examples, dim))
    for name in ("z_s", "z_t"):
      self.register_buffer(name, torch.zeros(()))
    for name in ("order", "class_start", "class_count"):
      size = work.examples if name == "order" else work.classes
      self.register_buffer(name, torch.zeros(size, dtype=torch.int64))

  def _drawn(self, labels: torch.Tensor) -> torch.Tensor:
    """Negatives [B, k], drawn on the device."""
    start = self.class_start[labels][:, None]
    count = self.class_count[labels][:, None]
    shape = (len(labels), self._k)
    uniform = torch.rand(shape, device=labels.device)
    r = (uniform * (self._examples - count)).long()
    return self.order[torch.where(r >= start, r + count, r)]

  def _scores(
    self,
    v: torch.Tensor,
    bank: torch.Tensor,
    indices: torch.Tensor,
    whole: bool,
  ) -> torch.Tensor:
    if whole:
      return (v @ bank.T).gather(1, indices) / self._tau
    drawn = bank[indices.flatten()].view(*indices.shape, -1)
    return torch.bmm(drawn, v[:, :, None])[:, :, 0] / self._tau

  def _contrast(self, scores: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    noise = (scores.shape[1] - 1) / self._examples
    x = scores.exp() / z
    positive = torch.log(x[:, :1] / (x[:, :1] + noise + _EPSILON))
    negative = torch.log(noise / (x[:, 1:] + noise + _EPSILON))
    return -(positive.sum() + negative.sum()) / len(scores)

  def forward(self, student, teacher, teacher_head, labels, index, negatives):
    """See `Method`; the reference gathers vectors that a loader drew."""
    del teacher_head
    on_device = negatives is None
    if on_device:
      negatives = self._drawn(labels)
    indices = torch.cat([index[:, None], negatives], dim=1)
    v_s, v_t = self.embed_s(student.pooled), self.embed_t(teacher.pooled)
    with torch.autocast(v_s.device.type, enabled=False):
      scores_s = self._scores(v_s, self.bank_t, indices, on_device)
      scores_t = self._scores(v_t, self.bank_s, indices, on_device)
      first = [s.detach().exp().mean() for s in (scores_s, scores_t)]
      z_s, z_t = (
        torch.where(z > 0, z, self._examples * mean)
        for z, mean in zip((self.z_s, self.z_t), first)
      )
      term = self._contrast(scores_s, z_s) + self._contrast(scores_t, z_t)
    loss = self.logit_loss(student, teacher, labels)
    found = (v_s.detach(), v_t.detach(), z_s, z_t, index)
    return loss + self._weights["crd"] * term, student.logits, found

  @torch.no_grad()
  def remember(self, found: Any) -> None:
    """See `Method`."""
    v_s, v_t, z_s, z_t, index = found
    self.z_s.copy_(z_s)
    self.z_t.copy_(z_t)
    for bank, v in ((self.bank_s, v_s), (self.bank_t, v_t)):
      rows = self._momentum * bank[index] + (1 - self._momentum) * v
      bank[index] = F.normalize(rows)


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
    makers = {"crd": CRD, "semckd": SemCKD, "simkd": SimKD}
    if work.method not in work_lib.COMMON:
      raise ValueError(
        f"PyTorch's side has the methods {', '.join(work_lib.COMMON)}, got"
        f" {work.method}. Leave the side out with --sides jax"
      )
    self.student = load(work, "student", weights)
    self.teacher = None
    outputs = []
    if work.has_teacher:
      self.teacher = load(work, "teacher", weights).requires_grad_(False)
      outputs = [self._example(work, m) for m in (self.student, self.teacher)]
    make = makers.get(work.method)
    self.method = make(work, *outputs) if make else Method(work)
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
  def _example(work: work_lib.Work, network: nn.Module) -> Output:
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
