"""The weighted sum, and the axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers, losses
from kd_jax.distillers import base

TERMS = {
  "ce": jnp.array([1.0, 3.0]),
  "kd": jnp.array(5.0, jnp.bfloat16),
  "bad": jnp.array([jnp.nan, 1.0]),
}


def test_weighted_sum_averages_examples():
  total = base.weighted_sum(TERMS, {"ce": 2, "kd": 0.5})
  assert total.dtype == jnp.float32
  assert float(total) == 2 * 2.0 + 0.5 * 5.0


def test_weight_zero_leaves_a_term_out():
  assert float(base.weighted_sum(TERMS, {"ce": 1.0, "bad": 0.0})) == 2.0
  assert float(base.weighted_sum(TERMS, {"ce": 1.0, "simkd": 0})) == 2.0


def test_weight_may_be_traced():
  ramp = jax.jit(lambda w: base.weighted_sum(TERMS, {"ce": 1.0, "kd": w}))
  np.testing.assert_allclose(ramp(0.0), 2.0)
  np.testing.assert_allclose(ramp(0.5), 4.5)


def test_weights_that_fit_no_term():
  with pytest.raises(ValueError, match=r"'simkd' is not a term.*bad, ce, kd"):
    base.weighted_sum(TERMS, {"simkd": 1.0})
  with pytest.raises(ValueError, match="at least one weight other than 0"):
    base.weighted_sum(TERMS, {"ce": 0.0})


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
  last = distillers.create("kd").apply(
    {}, tiny.student, None, method="last_map"
  )
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
      train=True,
    ).losses

  logits, label = tiny.student.logits, tiny.batch["label"]
  expected = losses.cross_entropy_loss(logits, label, label_smoothing=0.1)
  np.testing.assert_allclose(terms(smooth)["ce"], expected, rtol=1e-6)
  other = (label + 1) % logits.shape[-1]
  mixed = terms(plain, share=0.75, mixed_label=other)
  both = [losses.cross_entropy_loss(logits, y) for y in (label, other)]
  np.testing.assert_allclose(
    mixed["ce"], 0.75 * both[0] + 0.25 * both[1], rtol=1e-6
  )
  # The teacher has seen the same images: its term needs no labels.
  np.testing.assert_array_equal(mixed["kd"], terms(plain)["kd"])
