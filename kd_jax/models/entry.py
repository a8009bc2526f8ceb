"""What the registry knows of a network besides its code."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kd_jax.models.base import Classifier

# The rate at which the reference toolboxes train networks of depthwise and
# grouped convolutions, which diverge at the general one.
MOBILE_LEARNING_RATE = 0.01


def module_name(path: tuple[str, ...]) -> str:
  """The PyTorch name of a linen module: ("layer1_0", "bn1") -> layer1.0.bn1."""
  return ".".join(path).replace("_", ".")


class WeightNames(NamedTuple):
  """Names that toolboxes give to a network's layers in their weight files.

  Attributes:
    toolboxes: whose names they are.
    table: `module_name`s to their names; a name not in it is the same.
  """

  toolboxes: str
  table: Mapping[str, str]

  def rename(self, path: tuple[str, ...]) -> str:
    """Translates a linen module's path into these names."""
    name = module_name(path)
    return self.table.get(name, name)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A network of the registry.

  Attributes:
    builder: `builder(num_classes=, dtype=, bn_axis_name=)` -> the network.
    learning_rate: SGD's default, at the reference toolboxes' batch size of 64.
    image_size: height and width of the images that it is made for.
    weight_names: what toolboxes call its layers. The first is written; any is
      read. Most networks have the same names everywhere.
  """

  builder: Callable[..., Classifier]
  learning_rate: float = 0.05
  image_size: int = 32
  weight_names: tuple[WeightNames, ...] = (WeightNames("the reference", {}),)
