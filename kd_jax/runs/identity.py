"""Which settings make two runs the same run."""

import json
import re
from typing import Any

from ml_collections import ConfigDict

from kd_jax import storage

# What may differ when a run goes on: where things are and how often they are
# written, but nothing that a result depends on.
_FREE = re.compile(
  r"trials(_together)?|(checkpoint|log|parallel)\..*|data\.(dir|num_workers)"
  r"|verify_export|(teacher|teachers\.\d+)\.checkpoint"
)


def as_json(config: ConfigDict) -> dict[str, Any]:
  """A config as JSON holds it: tuples are lists."""
  return json.loads(json.dumps(config.to_dict()))


def config_fingerprint(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
  """The fields that make a run this run and no other, flat.

  Args:
    config: settled, or the content of `config.json`.

  Returns:
    Dotted name -> value.
  """
  tree = config if isinstance(config, dict) else as_json(config)
  found = {
    name: value
    for name, value in storage.flatten(tree).items()
    if not _FREE.fullmatch(name)
  }
  if found.get("data.seed") is None:  # as in a run of before there was one
    found.pop("data.seed", None)
  return found
