"""What the battery cannot derive: arguments that do not fit each other."""

import numpy as np
import pytest

from kd_jax import losses

Z = np.ones((4, 5), np.float32)
M = np.ones((4, 2, 2, 3), np.float32)
INDEX = np.zeros((4, 5), np.int32)


@pytest.mark.parametrize(
  "call, facts",
  [
    (lambda: losses.at_loss([M, M], [M]), "equally many maps, got 2 and 1"),
    (lambda: losses.at_loss([], []), "student_maps: expected at least one map"),
    (
      lambda: losses.at_loss(M, np.moveaxis(np.tile(M, 30), -1, 1)),
      r"one aspect ratio, got \(4, 2, 2, 3\) and \(4, 90, 2, 2\)",
    ),
    (lambda: losses.reviewkd_loss([M, M], [M]), "equally many maps"),
    (
      lambda: losses.reviewkd_loss([Z], [Z]),
      r"student_maps\[0\]: expected an array with 4 axes, a map \[B, H, W, C\]",
    ),
    (
      lambda: losses.vid_loss(M, np.ones(2, np.float32), M),
      "student_mean and variance: expected one width, got 3 and 2",
    ),
    (
      lambda: losses.vid_loss(M, np.array([1, 0, 1], np.float32), M),
      "variance: expected finite values above 0, got values from 0.0 to 1.0",
    ),
    (
      lambda: losses.semckd_attention(M[0], M[0][..., :2], soft=1.0),
      "queries and keys: expected one width, got 3 and 2",
    ),
    (
      lambda: losses.semckd_attention(M[0], M[0], soft=0.0),
      "soft: expected a finite number above 0, got 0.0",
    ),
    (
      lambda: losses.semckd_loss([[M]], [[M]], np.ones((4, 2, 1), np.float32)),
      r"attention: expected \[B, 1, 1\].*got \(4, 2, 1\)",
    ),
    (
      lambda: losses.semckd_loss(
        [[M, M], [M]], [[M, M], [M]], np.ones((4, 2, 2), np.float32)
      ),
      "equally many maps, got 2 and 1",
    ),
    (
      lambda: losses.crd_loss(Z[:, :1], Z[:, :1], 1.0, 1.0, num_examples=5),
      r"a positive and at least one negative per row, got shape \(4, 1\)",
    ),
    (
      lambda: losses.crd_scores(Z, Z[:, :3], INDEX, temperature=1.0),
      "embedding and bank: expected one width, got 5 and 3",
    ),
    (
      lambda: losses.crd_scores(Z, Z, Z, temperature=1.0),
      "indices: expected an integer array with 2 axes, got float32",
    ),
    (
      lambda: losses.crd_scores(Z, Z, INDEX, temperature=Z),
      r"temperature: expected a number, got float32 of shape \(4, 5\)",
    ),
    (
      lambda: losses.crd_update(Z, Z, INDEX[:, 0], momentum=1.5),
      "momentum: expected a finite number of at least 0 and of at most 1, got",
    ),
    (
      lambda: losses.crd_update(Z, Z[:, :3], INDEX[:, 0], momentum=0.5),
      "embedding and bank: expected one width, got 3 and 5",
    ),
    (
      lambda: losses.draw_negatives(None, INDEX[:, 0], INDEX[0], None, k=3),
      "index and labels: expected one batch size, got 4 and 5",
    ),
    (
      lambda: losses.draw_negatives(None, INDEX[0], INDEX[0], None, k=0),
      "k: expected a whole number of at least 1, got 0",
    ),
    (
      lambda: losses.adaptive_average_pool(M, (0, 1)),
      "size: expected a whole number of at least 1, got 0",
    ),
    (
      lambda: losses.nearest_resize(Z, (1, 1)),
      r"x: expected a map \[B, H, W, C\], got shape \(4, 5\)",
    ),
    (
      lambda: losses.similarity_matrix(Z[0]),
      r"x: expected an array with at least 2 axes, got shape \(5,\)",
    ),
  ],
)
def test_what_does_not_fit_is_refused(call, facts):
  with pytest.raises(ValueError, match=facts):
    call()
