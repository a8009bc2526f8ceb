"""Axes, features and the terms of every method."""

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers, losses
from kd_jax.distillers import base


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
  last = distillers.create("kd").apply({}, tiny.student, (), method="last_map")
  np.testing.assert_array_equal(last, tiny.student.features["last"])


def test_labels_are_smoothed_and_mixed(tiny):
  plain, smooth = (
    distillers.create("kd", label_smoothing=s) for s in (0.0, 0.1)
  )

  def terms(module, **more):
    return module.apply(
      {},
      tiny.student,
      tiny.teacher,
      {**tiny.batch, **more},
      teacher_head=None,
      step=0,
      epoch=1,
      train=True,
    ).terms

  logits, label = tiny.student.logits, tiny.batch["label"]
  expected = losses.cross_entropy_loss(logits, label, label_smoothing=0.1)
  np.testing.assert_allclose(terms(smooth)["ce"], expected, rtol=1e-6)
  other = (label + 1) % logits.shape[-1]
  mixed = terms(plain, lam=0.75, mixed_label=other)
  both = [losses.cross_entropy_loss(logits, y) for y in (label, other)]
  np.testing.assert_allclose(
    mixed["ce"], 0.75 * both[0] + 0.25 * both[1], rtol=1e-6
  )
  # The teacher has seen the same images: its term needs no labels.
  np.testing.assert_array_equal(mixed["kd"], terms(plain)["kd"])
