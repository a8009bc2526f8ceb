"""What is lost by keeping a teacher's largest logits."""

import sys

import numpy as np

from benchmarks import cache_error


def test_more_logits_lose_less(tmp_path, monkeypatch, capsys):
  logits = 3 * np.random.default_rng(0).standard_normal((40, 30), np.float32)
  rows = [cache_error.measure(logits, k, 4.0) for k in (1, 5, 20, 30)]
  for name in ("divergence", "gradient"):
    errors = [row[name] for row in rows]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < 0.1
    assert errors[0] > 100 * errors[-1]
  # One logit and the rest in float16, a class in uint16; all 30 logits.
  assert [rows[0]["bytes"], rows[-1]["bytes"]] == [6, 60]
  assert 0 < rows[0]["mass"] < rows[1]["mass"] < rows[-1]["mass"] < 1.0001

  (tmp_path / "epoch_00001").mkdir()
  part = tmp_path / "epoch_00001" / "part_0_of_1.npz"
  np.savez(part, logits=logits.reshape(4, 10, 30))
  monkeypatch.setattr(sys, "argv", ["cache_error", str(tmp_path)])
  cache_error.main()
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines[2:]] == [
    *map(str, cache_error.KEPT),
    "30",
  ]
