"""What toolboxes call the layers of one network: its dialects.

A network's own names are mechanical (`module_name`), and for most networks
they are everybody's: torchvision, timm, SimKD and mdistiller agree on the
ResNets for ImageNet, RepDistiller, SimKD and mdistiller on the networks for
32x32 images. `DIALECTS` has the others, as tables from the mechanical names.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from kd_jax.models import mobilenetv2, shufflenetv2

Path = tuple[str, ...]


Rename = Callable[[Path], str]


def module_name(path: Path) -> str:
  """The PyTorch name of a linen module: ("layer1_0", "bn1") -> layer1.0.bn1."""
  return ".".join(path).replace("_", ".")


class Dialect(NamedTuple):
  """Names that toolboxes give to a network's layers.

  Attributes:
    toolboxes: whose names they are.
    table: mechanical names to theirs; those not in it are the same.
  """

  toolboxes: str
  table: dict[str, str]

  def rename(self, path: Path) -> str:
    """A linen module's path to its name in this dialect."""
    name = module_name(path)
    return self.table.get(name, name)


def _mobilenetv2(
  ends: dict[str, str],
  block_name: Callable[[int, int, int], str],
  plain: tuple[str, ...],
  expanded: tuple[str, ...],
) -> dict[str, str]:
  """The table of MobileNetV2 for ImageNet.

  Args:
    ends: the layers outside of the blocks.
    block_name: (group, place in the group, place among all) -> name.
    plain: a block's layers in their order, where there is no expansion.
    expanded: where there is one.
  """
  table, place = dict(ends), 0
  for group, (expansion, _, repeats) in enumerate(mobilenetv2.GROUPS):
    theirs = plain if expansion == 1 else expanded
    ours = ("conv.0", "conv.1", "conv.3", "conv.4", "conv.6", "conv.7")
    for i in range(repeats):
      name = block_name(group, i, place)
      for a, b in zip(ours[-len(theirs) :], theirs, strict=True):
        table[f"blocks.{group}.{i}.{a}"] = f"{name}.{b}"
      place += 1
  return table


def _shufflenetv2() -> dict[str, str]:
  """The table of ShuffleNetV2 for ImageNet."""
  table = {
    "conv1": "conv1.0",
    "bn1": "conv1.1",
    "conv2": "conv5.0",
    "bn2": "conv5.1",
    "linear": "fc",
  }
  # Their numbers count the ReLUs.
  left = [f"branch1.{i}" for i in (0, 1, 2, 3)]
  right = [f"branch2.{i}" for i in (0, 1, 3, 4, 5, 6)]
  for stage, count in enumerate(shufflenetv2.ShuffleNetV2.blocks, start=1):
    for i in range(count + 1):
      for k, theirs in enumerate(right if i else left + right):
        ours = f"{('conv', 'bn')[k % 2]}{k // 2 + 1}"
        table[f"layer{stage}.{i}.{ours}"] = f"stage{stage + 1}.{i}.{theirs}"
  return table


_MECHANICAL = (Dialect("the reference", {}),)


# The first of a network's dialects is the one that is written.
DIALECTS: dict[str, tuple[Dialect, ...]] = {
  "MobileNetV2_Imagenet": (
    Dialect(
      "torchvision and SimKD",
      _mobilenetv2(
        {
          "conv1.0": "features.0.0",
          "conv1.1": "features.0.1",
          "conv2.0": "features.18.0",
          "conv2.1": "features.18.1",
          "classifier.0": "classifier.1",
        },
        lambda group, i, place: f"features.{place + 1}.conv",
        ("0.0", "0.1", "1", "2"),
        ("0.0", "0.1", "1.0", "1.1", "2", "3"),
      ),
    ),
    Dialect(
      "timm",
      _mobilenetv2(
        {
          "conv1.0": "conv_stem",
          "conv1.1": "bn1",
          "conv2.0": "conv_head",
          "conv2.1": "bn2",
          "classifier.0": "classifier",
        },
        lambda group, i, place: f"blocks.{group}.{i}",
        ("conv_dw", "bn1", "conv_pw", "bn2"),
        ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"),
      ),
    ),
  ),
  "ShuffleV2_Imagenet": (Dialect("torchvision and SimKD", _shufflenetv2()),),
}


def of(model_name: str) -> tuple[Dialect, ...]:
  """The dialects of a network, the one that is written first."""
  return DIALECTS.get(model_name, _MECHANICAL)


def recognise(
  model_name: str,
  names: Collection[str],
  expected: Callable[[Dialect], Collection[str]],
) -> Dialect:
  """The dialect that most of a state dict's names are of.

  Args:
    model_name: the network.
    names: of the state dict's tensors.
    expected: all tensors' names in a dialect.

  Returns:
    The best one; the one that is written if several are.
  """
  given = frozenset(names)

  def matches(dialect: Dialect) -> int:
    return len(given.intersection(expected(dialect)))

  return max(of(model_name), key=matches)
