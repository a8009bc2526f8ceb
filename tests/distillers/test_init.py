"""Lookup by name."""

import jax.numpy as jnp
import pytest

from kd_jax import distillers


def test_create_sets_fields():
  module = distillers.create("simkd", factor=4, dtype=jnp.bfloat16)
  assert isinstance(module, distillers.DISTILLERS["simkd"])
  assert (module.factor, module.dtype) == (4, jnp.bfloat16)
  assert list(distillers.DISTILLERS) == distillers.names()


def test_unknown_method_names_the_nearest():
  with pytest.raises(ValueError, match=r"'simdk'.*Did you mean simkd"):
    distillers.create("simdk")
  with pytest.raises(
    ValueError, match=r"unknown method 'zzzzz'\. Expected one of none, kd"
  ):
    distillers.create("zzzzz")


def test_unknown_field_names_the_nearest():
  with pytest.raises(
    ValueError, match=r"simkd has no field 'facter'.*mean factor.*sync"
  ):
    distillers.create("simkd", facter=2)
  with pytest.raises(ValueError, match="kd has no field 'parent'"):
    distillers.create("kd", parent=None)


def test_your_own_class(tiny):
  module = distillers.create("kd_jax.distillers.kd:KD", temperature=2.0)
  assert (type(module), module.temperature) == (distillers.kd.KD, 2.0)
  with pytest.raises(ValueError, match=r"expected a subclass of .*Distiller"):
    distillers.create("kd_jax.distillers.base:Head")
  with pytest.raises(ValueError, match="cannot be imported"):
    distillers.create("kd_jax.distillers.kd:KDD")


def test_the_number_of_teachers_is_checked(tiny):
  for count in (0, 2):
    with pytest.raises(
      ValueError, match=f"KD: expected one teacher, got {count}"
    ):
      distillers.create("kd").apply(
        {},
        tiny.student,
        (tiny.teacher,) * count,
        tiny.batch,
        teacher_heads=(tiny.classifier,) * count,
        step=0,
        epoch=1,
        train=True,
        method="distill",
      )
