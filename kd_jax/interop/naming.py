"""What toolboxes call the layers of one network.

A network's own names are mechanical (`module_name`), and for most networks
they are everybody's: torchvision, timm, SimKD and mdistiller agree on the
ResNets for ImageNet, RepDistiller, SimKD and mdistiller on the networks for
32x32 images. An entry of `kd_jax.models` has the others as tables.
"""

from collections.abc import Callable, Collection

from kd_jax import models
from kd_jax.models import WeightNames
from kd_jax.models.entry import module_name

__all__ = ["Path", "Rename", "module_name", "of", "recognise"]

Path = tuple[str, ...]
Rename = Callable[[Path], str]


def of(model_name: str) -> tuple[WeightNames, ...]:
  """The weight names of a network, those that are written first."""
  return models.entry(model_name).weight_names


def recognise(
  model_name: str,
  names: Collection[str],
  expected: Callable[[WeightNames], Collection[str]],
) -> WeightNames:
  """The dialect that most of a state dict's names are of.

  Args:
    model_name: the network.
    names: of the state dict's tensors.
    expected: all tensors' names in a dialect.

  Returns:
    The best one; the one that is written if several are.
  """
  given = frozenset(names)

  def matches(dialect: WeightNames) -> int:
    return len(given.intersection(expected(dialect)))

  return max(of(model_name), key=matches)
