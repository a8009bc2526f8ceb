"""Arguments that do not fit each other, beyond what the battery tries."""

import numpy as np
import pytest

from kd_jax import losses

Z = np.ones((4, 5), np.float32)
M = np.ones((4, 2, 2, 3), np.float32)
NCHW = np.ones((4, 90, 2, 2), np.float32)
INDEX = np.zeros((4, 5), np.int32)
TABLE = losses.ClassTable(INDEX[0], INDEX[0, :2], INDEX[0, :2] + 1)
WRONG = (np.array([0, 0]), np.array([0, -1]))


@pytest.mark.parametrize(
  ("name", "args", "kwargs", "facts"),
  [
    ("at_loss", ([M, M], [M]), {}, "equally many maps, got 2 and 1"),
    ("at_loss", ([], []), {}, "student_maps: expected at least one map"),
    ("at_loss", (M, NCHW), {}, r"one aspect ratio, got \(4, 2.*\(4, 90"),
    ("reviewkd_loss", ([M, M], [M]), {}, "equally many maps, got 2 and 1"),
    ("reviewkd_loss", ([Z], [Z]), {}, r"maps\[0\]: .* \[B, H, W, C\]"),
    ("vid_loss", (M, Z[0, :2], M), {}, "variance: .* width.* 3 and 2"),
    ("vid_loss", (M, 0 * Z[0, :3], M), {}, "variance: .*finite .* 0.0"),
    ("semckd_attention", (M[0], M[0, ..., :2]), {"soft": 1.0}, "got 3 and 2"),
    (
      "semckd_attention",
      (M[0], M[0]),
      {"soft": 0.0},
      "soft: .* above 0, got 0",
    ),
    ("semckd_loss", ([[M]], [[M]], M[0]), {}, r"\[B, 1, 1\].*\(2, 2, 3"),
    (
      "semckd_loss",
      ([[M, M], [M]], [[M, M], [M]], M[..., :2, 0]),
      {},
      "equally many maps, got 2 and 1",
    ),
    ("crd_loss", (Z[:, :1], Z[:, :1], 1, 1), {"num_examples": 5}, "negative"),
    (
      "crd_scores",
      (Z, Z[:, :3], INDEX),
      {"temperature": 1.0},
      "width.* 5 and 3",
    ),
    ("crd_scores", (Z, Z, Z), {"temperature": 1.0}, "indices: .*got float32"),
    ("crd_scores", (Z, Z, INDEX), {"temperature": Z}, r"temperature: .*\(4, 5"),
    ("crd_update", (Z, Z, INDEX[:, 0]), {"momentum": 1.5}, "momentum: .* 1.5"),
    (
      "crd_update",
      (Z, Z[:, :3], INDEX[:, 0]),
      {"momentum": 0.5},
      "width.* 3 and",
    ),
    (
      "draw_negatives",
      (0, INDEX[:, 0], INDEX[0], 0),
      {"k": 3},
      "size.* 4 and 5",
    ),
    ("draw_negatives", (0, INDEX[0], INDEX[0], 0), {"k": 0}, "k: .* got 0"),
    ("class_table", (INDEX[0] + 9, 4), {}, r"in \[0, 4\), got values from 9"),
    ("class_table", (INDEX[0] - 1, 4), {}, r"in \[0, 4\), got values from -1"),
    ("draw_negatives", (0, *WRONG, TABLE), {"k": 1}, r"labels: .*from -1 to 0"),
    ("draw_positives", (0, *WRONG[::-1], TABLE), {}, r"index: .*from -1 to 0"),
    ("crd_scores", (Z, Z, INDEX - 1), {"temperature": 1.0}, "indices: .*-1"),
    ("crd_scores", (Z, Z, INDEX + 4), {"temperature": 1.0}, "indices: .*to 4"),
    ("crd_update", (Z, Z, -INDEX[:, 0] - 1), {"momentum": 0.5}, "index: .*-1"),
    ("sp_loss", ([M], [M]), {}, "student_map: expected one array, got a list"),
    ("similarity_matrix", ([M[0]],), {}, "x: expected one array, got a list"),
    ("class_table", (INDEX[0] + 1, 4), {}, "at least two classes.*class 1"),
    ("class_table", (Z[0], 4), {}, "train_labels: expected an integer array"),
    ("adaptive_average_pool", (M, (0, 1)), {}, "size: .* at least 1, got 0"),
    ("nearest_resize", (Z, (1, 1)), {}, r"x: expected a map \[B, H, W, C\]"),
    ("similarity_matrix", (Z[0],), {}, r"x: .*least 2 axes.* \(5,\)"),
  ],
)
def test_refused(name, args, kwargs, facts):
  with pytest.raises(ValueError, match=facts):
    getattr(losses, name)(*args, **kwargs)
