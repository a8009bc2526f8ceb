"""Which settings make two runs the same run."""

import json
import re
from typing import Any

from ml_collections import ConfigDict

from kd_jax import storage

# No result depends on these: a resumed run may have other values.
_FREE = re.compile(
  r"(stages\.\w+\.)?("
  r"preset|trials|steps_per_dispatch|eval\.batch_size|verify_export"
  r"|(checkpoint|log|parallel)\..*|data\.(dir|num_workers)"
  r"|(teacher|teachers\.\d+)\.checkpoint|teacher\.cache"
  # Fields of earlier versions.
  r"|trials_together"
  r")"
)


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Return a config as JSON holds it: tuples are lists."""
  return json.loads(json.dumps(config.to_dict()))


def config_fingerprint(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
  """Return the fields that a result depends on, flat.

  Args:
    config: with all defaults resolved, or the content of `config.json`.

  Returns:
    Dotted name -> value.
  """
  tree = config if isinstance(config, dict) else as_json(config)
  found = {
    name: value
    for name, value in storage.flatten(tree).items()
    if not _FREE.fullmatch(name)
  }
  # The run itself keeps the fingerprint of the weights.
  found["init_from"] = bool(found.get("init_from")) or None
  # Older configs do not have these fields.
  for name in ("data.seed", "teacher.cache_dtype", "init_from", "stages"):
    if found.get(name) in (None, {}):
      found.pop(name, None)
  if not found.get("teacher.cache_top_k"):
    found.pop("teacher.cache_top_k", None)
  return {"optim.dot_delta": 0.0, **found}
