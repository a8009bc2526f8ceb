"""Keys and names in files of weights, and what wrappers add to them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Keys under which training loops save the network's state dict.
CONTAINERS = ("model", "state_dict", "net", "model_state_dict")
# Keys of a SimKD student's other parts (that training loop leaves out the
# teacher's classifier), and of the model card.
PROJECTOR, CLASSIFIER, CARD = "proj", "classifier", "card"

# Prefixes that DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
# Of torch's AveragedModel, beside the network's names.
_COUNTERS = ("n_averaged",)


class Names(NamedTuple):
  """What to make of the names in a file.

  Attributes:
    prefix: of the names that are meant, or the key that they stand under;
      None: there is one network.
    rename: (old, new) texts to replace in each name, in this order.
  """

  prefix: str | None = None
  rename: tuple[tuple[str, str], ...] = ()


AS_THEY_ARE = Names()


def parse_rename(text: str) -> tuple[tuple[str, str], ...]:
  """Parse "old=new,old=new".

  Raises:
    ValueError: if it has another form.
  """
  pairs = [rule.partition("=") for rule in text.split(",")]
  if not all(old and equals for old, equals, _ in pairs):
    raise ValueError(
      "--rename: expected old=new, or several with commas between them, such as"
      f" stage=layer,shortcut=downsample; got {text!r}"
    )
  return tuple((old.strip(), new.strip()) for old, _, new in pairs)


def is_averaged(key: str) -> bool:
  """Tell whether a key is that of weights averaged over the training."""
  return re.search(r"(^|_)(ema|swa|averaged?)(_|$)", key.lower()) is not None


def first_parts(names: Iterable[str]) -> dict[str, int]:
  """Count the names by their first part, "layer1." of "layer1.0.bn1.bias"."""
  counts: dict[str, int] = {}
  for name in names:
    first, dot, _ = name.partition(".")
    counts[first + dot] = counts.get(first + dot, 0) + 1
  return counts


def strip_prefixes(
  state_dict: Mapping[str, Any],
  names: Names = AS_THEY_ARE,
  *,
  shared: bool = True,
) -> dict[str, Any]:
  """Remove what wrappers put before names.

  Those are the prefixes of DataParallel and torch.compile, and any other that
  all names share.

  Args:
    state_dict: values by names.
    names: which names are meant, and how to rename them.
    shared: whether to remove what all names share, whatever it is.

  Raises:
    ValueError: if two names become one, or none has the prefix.
  """
  kept = {
    name: value for name, value in state_dict.items() if name not in _COUNTERS
  }
  kept = _rename(kept, _short(kept, shared=shared))
  if names.prefix is not None:
    prefix = names.prefix.rstrip(".") + "."
    chosen = {
      name.removeprefix(prefix): value
      for name, value in kept.items()
      if name.startswith(prefix)
    }
    if not chosen:
      found = ", ".join(list(first_parts(kept))[:8])
      raise ValueError(
        f"--prefix {names.prefix}: expected names that begin with {prefix!r},"
        f" got names that begin with {found}"
      )
    kept = _rename(chosen, _short(chosen, shared=shared))
  for old, new in names.rename:
    kept = _rename(kept, {name: name.replace(old, new) for name in kept})
  return kept


def _rename(
  state_dict: Mapping[str, Any], new: Mapping[str, str]
) -> dict[str, Any]:
  renamed = {new[name]: value for name, value in state_dict.items()}
  if len(renamed) < len(state_dict):
    got = list(new.values())
    twice = next(name for name in got if got.count(name) > 1)
    raise ValueError(
      f"The state dict holds {twice!r} twice, with and without a prefix"
      f" ({' or '.join(_PREFIXES)}) or under two names that become one; drop"
      " one of the two."
    )
  return renamed


def _short(names: Iterable[str], *, shared: bool) -> dict[str, str]:
  """Each name without the wrappers' prefixes, or without all shared ones."""
  short = {}
  for name in names:
    rest = name
    while rest.startswith(_PREFIXES):
      rest = rest.partition(".")[2]
    short[name] = rest
  length = len(shared_prefix(short.values())) if shared else 0
  return {name: rest[length:] for name, rest in short.items()}


def shared_prefix(names: Iterable[str]) -> str:
  """The first parts that all names share, with the dot; at least two remain."""
  names = list(names)
  prefix = ""
  while names and all(n.count(".", len(prefix)) > 1 for n in names):
    longer = names[0][: names[0].index(".", len(prefix)) + 1]
    if not all(name.startswith(longer) for name in names):
      break
    prefix = longer
  return prefix
