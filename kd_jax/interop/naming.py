"""Keys and prefixes of names in files of weights."""

from collections.abc import Mapping
from typing import Any

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
