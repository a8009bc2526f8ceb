"""What several tests of data need."""

import pytest


@pytest.fixture
def tfds(monkeypatch, tmp_path):
  """TFDS whose own default folder is empty, whatever this machine holds."""
  import tensorflow_datasets as tfds

  real = tfds.builder

  def builder(name, *, data_dir=None, **options):
    return real(name, data_dir=data_dir or tmp_path / "default", **options)

  monkeypatch.setattr(tfds, "builder", builder)
  return tfds
