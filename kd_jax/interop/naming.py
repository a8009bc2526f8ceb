"""Names of tensors: what toolboxes call the layers and parts of a model.

A network's own names are mechanical (`module_name`), and most toolboxes use
them: torchvision, timm, SimKD and mdistiller agree on the ResNets for ImageNet,
RepDistiller, SimKD and mdistiller on the networks for 32x32 images. The
registry of `kd_jax.models` has the exceptions.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from kd_jax import models
from kd_jax.models import WeightNames
from kd_jax.models.entry import module_name

__all__ = [
  "CARD",
  "CLASSIFIER",
  "CONTAINERS",
  "PROJECTOR",
  "Path",
  "Rename",
  "module_name",
  "of",
  "recognise",
  "strip_prefixes",
]

Path = tuple[str, ...]
Rename = Callable[[Path], str]

# Keys under which training loops save the network's state dict.
CONTAINERS = ("model", "state_dict", "net", "model_state_dict")
# Keys of a SimKD student's other parts (that training loop leaves out the
# teacher's classifier), and of the model card.
PROJECTOR, CLASSIFIER, CARD = "proj", "classifier", "card"

# Prefixes that DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")


def strip_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Remove the prefixes of DataParallel and torch.compile from names.

  Raises:
    ValueError: if two names become one.
  """
  stripped: dict[str, Any] = {}
  for name, value in state_dict.items():
    short = name
    while short.startswith(_PREFIXES):
      short = short.partition(".")[2]
    if short in stripped:
      raise ValueError(
        f"The state dict holds {short!r} twice, with and without a prefix"
        f" ({' or '.join(_PREFIXES)}); drop one of the two."
      )
    stripped[short] = value
  return stripped


def of(model_name: str) -> tuple[WeightNames, ...]:
  """Look up the weight names of a network; the first are written."""
  return models.entry(model_name).weight_names


def recognise(
  model_name: str,
  names: Collection[str],
  expected: Callable[[WeightNames], Collection[str]],
) -> WeightNames:
  """Find the weight names that most names of a state dict follow.

  Args:
    model_name: the network.
    names: of the state dict's tensors.
    expected: all tensors' names, in given weight names.

  Returns:
    The best ones; the first of equals.
  """
  given = frozenset(names)

  def matches(weight_names: WeightNames) -> int:
    return len(given.intersection(expected(weight_names)))

  return max(of(model_name), key=matches)
