"""kd_jax's networks in PyTorch, for `benchmarks.step`.

All modules have kd_jax's names, so that weights load as they are.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import work as work_lib


class Output(NamedTuple):
  """Logits [B, K], the stages' maps, the last map and its pool [B, C]."""

  logits: torch.Tensor
  stages: list[torch.Tensor]
  last: torch.Tensor
  pooled: torch.Tensor


def conv(inputs: int, outputs: int, size: int, **options: Any) -> nn.Conv2d:
  """A convolution without a bias that keeps the maps' size."""
  return nn.Conv2d(
    inputs, outputs, size, padding=size // 2, bias=False, **options
  )


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  def __init__(self, inputs: int, width: int, stride: int):
    super().__init__()
    self.outputs = width
    self.conv1 = conv(inputs, width, 3, stride=stride)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3)
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
    self.conv1 = conv(inputs, width, 1)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3, stride=stride)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = conv(width, self.outputs, 1)
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
    conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs)
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
      self.conv1 = conv(3, stem, 7, stride=2)
    else:
      self.conv1 = conv(3, stem, 3)
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
    self.conv1 = conv(width, width, 1)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3, groups=width)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = conv(width, width, 1)
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
    self.conv1 = conv(channels, channels, 3, stride=2, groups=channels)
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv2 = conv(channels, half, 1)
    self.bn2 = nn.BatchNorm2d(half)
    self.conv3 = conv(channels, half, 1)
    self.bn3 = nn.BatchNorm2d(half)
    self.conv4 = conv(half, half, 3, stride=2, groups=half)
    self.bn4 = nn.BatchNorm2d(half)
    self.conv5 = conv(half, half, 1)
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
    self.conv1 = conv(3, 24, 1)
    self.bn1 = nn.BatchNorm2d(24)
    channels = 24
    for stage, (width, count) in enumerate(zip(widths, blocks), start=1):
      units = [SplitUnit(width) for _ in range(count)]
      self.add_module(
        f"layer{stage}", nn.Sequential(DownUnit(channels, width), *units)
      )
      channels = width
    self.conv2 = conv(channels, last_width, 1)
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
