"""Look-up by name, and what all methods inherit."""

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers, losses
from kd_jax.distillers import base, kd


def test_create_sets_fields():
  module = distillers.create("simkd", factor=4, dtype=jnp.bfloat16)
  assert isinstance(module, distillers.DISTILLERS["simkd"])
  assert (module.factor, module.dtype) == (4, jnp.bfloat16)
  yours = distillers.create("kd_jax.distillers.kd:KD", temperature=2.0)
  assert isinstance(yours, kd.KD) and yours.temperature == 2.0


@pytest.mark.parametrize(
  ("name", "fields", "facts"),
  [
    ("simdk", {}, "'simdk'.*Did you mean simkd"),
    ("zzzzz", {}, r"unknown method 'zzzzz'\. Expected one of none, kd"),
    ("simkd", {"facter": 2}, "no field 'facter'.*mean factor.*sync"),
    ("kd", {"parent": None}, "kd has no field 'parent'"),
    ("kd_jax.distillers.base:Head", {}, r"expected a subclass of .*Distiller"),
    ("kd_jax.distillers.kd:KDD", {}, "cannot be imported"),
  ],
)
def test_what_is_not_known(name, fields, facts):
  with pytest.raises(ValueError, match=facts):
    distillers.create(name, **fields)


@pytest.mark.parametrize("count", [0, 2])
def test_the_number_of_teachers_is_checked(tiny, count):
  teachers = {
    "teachers": (tiny.teacher,) * count,
    "teacher_heads": (tiny.head,) * count,
  }
  with pytest.raises(ValueError, match=f"expected one teacher, got {count}"):
    distillers.create("kd").apply({}, **{**tiny.given(), **teachers})


def test_batch_axis_only_with_sync():
  assert distillers.create("sp", axis_name="x").batch_axis is None
  assert distillers.create("sp", axis_name="x", sync=True).batch_axis == "x"
  assert distillers.create("sp", sync=True).batch_axis is None


def test_missing_feature_is_named(tiny):
  with pytest.raises(
    ValueError, match=r"the teacher has no feature 'layer3'; it has .*stage2"
  ):
    base.feature(tiny.teacher, "layer3", whose="teacher")
  bare = tiny.student._replace(features={"pooled": jnp.ones((8, 4))})
  with pytest.raises(ValueError, match="the student has no feature 'stage1'"):
    base.stages(bare, whose="student")


def test_the_classifier_reads_the_students_last_map_by_default(tiny):
  module = distillers.create("kd")
  assert not module.predicts_with_teacher_head
  last = module.apply({}, tiny.student, (), method="last_map")
  np.testing.assert_array_equal(last, tiny.student.features["last"])


def test_labels_are_smoothed_and_mixed(tiny):
  plain, smooth = (
    distillers.create("kd", label_smoothing=s) for s in (0.0, 0.1)
  )

  def terms(module, **more):
    batch = {**tiny.batch, **more}
    return module.apply({}, **tiny.given(batch=batch)).terms

  logits, label = tiny.student.logits, tiny.batch["label"]
  expected = losses.cross_entropy_loss(logits, label, label_smoothing=0.1)
  np.testing.assert_allclose(terms(smooth)["ce"], expected, rtol=1e-6)
  other = (label + 1) % logits.shape[-1]
  mixed = terms(plain, lam=0.75, mixed_label=other)
  both = [losses.cross_entropy_loss(logits, y) for y in (label, other)]
  np.testing.assert_allclose(
    mixed["ce"], 0.75 * both[0] + 0.25 * both[1], rtol=1e-6
  )
  # The teacher sees the mixed images: its term needs no labels.
  np.testing.assert_array_equal(mixed["kd"], terms(plain)["kd"])
