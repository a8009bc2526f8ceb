"""Names in configs: look-up, suggestions, and a user's own objects."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
  """A hint that lists the nearest known words, ignoring case.

  Args:
    word: as the user spelled it.
    known: the words that exist.

  Returns:
    " Did you mean a or b?", or "" if nothing is near.
  """
  known = list(known)
  by_lower: dict[str, list[str]] = {}
  for name in known:
    by_lower.setdefault(name.lower(), []).append(name)
  near = difflib.get_close_matches(str(word).lower(), by_lower, n=3)
  names = [name for lower in near for name in by_lower[lower]][:3]
  return f" Did you mean {' or '.join(names)}?" if names else ""


def resolve(name: str, table: Mapping[str, Any], *, what: str) -> Any:
  """Looks a name up in a table, or imports "package.module:attribute".

  Args:
    name: a key of the table, or the import path of a user's own object.
    table: known names to objects; names that begin with "_" are not listed.
    what: what the table holds, for the error ("model", "method").

  Returns:
    The object.

  Raises:
    ValueError: if the name is unknown or cannot be imported.
  """
  if name in table:
    return table[name]
  module, colon, attribute = str(name).partition(":")
  if colon:
    try:
      return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
      raise ValueError(
        f"{what} {name!r} cannot be imported: {error}"
      ) from error
  public = [known for known in table if not known.startswith("_")]
  raise ValueError(
    f"unknown {what} {name!r}.{did_you_mean(name, public)} Expected one of"
    f" {', '.join(public)}, or your own as 'package.module:attribute'"
  )
