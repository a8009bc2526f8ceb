"""Lookup by name."""

import jax.numpy as jnp
import pytest

from kd_jax import distillers
from kd_jax.distillers import base


def test_create_sets_fields():
  module = distillers.create("simkd", factor=4, dtype=jnp.bfloat16)
  assert isinstance(module, distillers.DISTILLERS["simkd"])
  assert (module.factor, module.dtype) == (4, jnp.bfloat16)
  assert list(distillers.DISTILLERS) == distillers.names()


def test_unknown_method_names_the_nearest():
  with pytest.raises(ValueError, match=r"'simdk'.*Did you mean simkd.*reviewk"):
    distillers.create("simdk")
  with pytest.raises(ValueError, match=r"unknown method 'zzzzz'\. The methods"):
    distillers.create("zzzzz")


def test_unknown_field_names_the_nearest():
  with pytest.raises(
    ValueError, match=r"simkd has no field 'facter'.*mean factor.*sync"
  ):
    distillers.create("simkd", facter=2)
  with pytest.raises(ValueError, match="kd has no field 'parent'"):
    distillers.create("kd", parent=None)


def test_the_base_is_abstract():
  with pytest.raises(TypeError, match="abstract"):
    base.Distiller()
