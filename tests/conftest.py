"""The test session: four CPU devices, strict promotion, golden values."""

import importlib.util
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "allow")

TESTS = pathlib.Path(__file__).resolve().parent
REPO = TESTS.parent
GOLDEN = pathlib.Path(os.environ.get("KD_JAX_GOLDEN") or TESTS / "golden")


def _load_rebuild():
  path = GOLDEN / "rebuild.py"
  if not path.exists():  # the naming scheme is part of the layout
    path = TESTS / "golden" / "rebuild.py"
  spec = importlib.util.spec_from_file_location("golden_rebuild", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """The folder of golden values (KD_JAX_GOLDEN, else tests/golden)."""
  return GOLDEN


@pytest.fixture(scope="session")
def rebuild():
  """`rebuild.py` of the golden folder: tensors from their names."""
  return _load_rebuild()


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
  """The repository's top level."""
  return REPO
