"""The reference toolboxes' networks in the folder of golden values."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from kd_jax import models

OWN = pathlib.Path(__file__).resolve().parent / "golden"
FOLDER = pathlib.Path(os.environ.get("KD_JAX_GOLDEN") or OWN)


def networks() -> Iterator[tuple[pathlib.Path, str, dict[str, Any]]]:
  """Yields each network's file of values, our name of it, and what it is.

  Another folder (KD_JAX_GOLDEN) may have more toolboxes than `tests/golden`:
  theirs are networks that the project does not have.
  """
  for known in sorted((OWN / "models").glob("*.json")):
    path = FOLDER / "models" / known.name
    for name, spec in json.loads(path.read_text()).items():
      values = path.with_suffix("") / f"{name}.npz"
      if spec["image_size"] == 32 and f"{name}_cifar" in models.names():
        name = f"{name}_cifar"
      yield values, name, spec
