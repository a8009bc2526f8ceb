"""Each check says what, expected and got."""

import jax.numpy as jnp
import pytest

from kd_jax import losses

Z = jnp.ones((4, 5))
M = jnp.ones((4, 2, 2, 3))
Y = jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize(
  "call, words",
  [
    (
      lambda: losses.cross_entropy_loss(Z[0], Y),
      r"logits: expected an array with 2 axes, got shape \(5,\)",
    ),
    (
      lambda: losses.cross_entropy_loss(Z.astype(int), Y),
      "logits: expected a floating-point array, got int32",
    ),
    (
      lambda: losses.cross_entropy_loss(Z, Z),
      "labels: expected integers, got float32; pass class indices",
    ),
    (
      lambda: losses.cross_entropy_loss(Z, Y[:, None]),
      r"labels: expected shape \(4,\).*got \(4, 1\)",
    ),
    (
      lambda: losses.cross_entropy_loss(Z, Y, label_smoothing=1.0),
      r"label_smoothing: expected a number in \[0, 1\), got 1.0",
    ),
    (
      lambda: losses.kd_loss(Z, Z[:, :3], temperature=1.0),
      r"student_logits and teacher_logits: expected equal shapes, got "
      r"\(4, 5\) and \(4, 3\)",
    ),
    (
      lambda: losses.kd_loss(Z, Z, temperature=0),
      "temperature: expected a number above 0, got 0",
    ),
    (
      lambda: losses.fitnet_loss(M, M[..., :2]),
      "student_map and teacher_map: expected equal shapes",
    ),
    (
      lambda: losses.simkd_loss(M, Z),
      r"teacher_map: expected an array with 4 axes, got shape \(4, 5\)",
    ),
    (
      lambda: losses.at_loss([M, M], [M]),
      "student_maps and teacher_maps: expected equally many maps, got 2 and 1",
    ),
    (lambda: losses.at_loss([], []), "student_maps: expected at least one map"),
    (
      lambda: losses.at_loss(M, [M[:2]]),
      "student_maps and teacher_maps: expected one batch size, got 4 and 2",
    ),
    (
      lambda: losses.sp_loss(M, Z[:3]),
      "student_map and teacher_map: expected one batch size, got 4 and 3",
    ),
    (
      lambda: losses.vid_loss(M, jnp.ones(2), M),
      r"variance: expected shape \(3,\), one value per channel, got \(2,\)",
    ),
    (
      lambda: losses.srrl_loss(Z, Z, Z[:, :4], Z),
      "student_feature and teacher_feature: expected equal shapes",
    ),
    (
      lambda: losses.semckd_attention(M[0], M[0][..., :2], soft=1.0),
      "queries and keys: expected one width, got 3 and 2",
    ),
    (
      lambda: losses.semckd_loss([[M]], [[M]], jnp.ones((4, 2, 1))),
      r"attention: expected \[B, 1, 1\].*got \(4, 2, 1\)",
    ),
    (
      lambda: losses.reviewkd_loss([M, Z], [M]),
      "student_maps and teacher_maps: expected equally many maps",
    ),
    (
      lambda: losses.crd_loss(Z[:, :1], Z[:, :1], 1.0, 1.0, num_examples=5),
      r"a positive and at least one negative per row, got shape \(4, 1\)",
    ),
    (
      lambda: losses.crd_scores(Z, Z[:, :3], Z.astype(int), temperature=1.0),
      "embedding and bank: expected one width, got 5 and 3",
    ),
    (
      lambda: losses.crd_scores(Z, Z, Z, temperature=1.0),
      "indices: expected an integer array with 2 axes, got float32",
    ),
  ],
)
def test_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
