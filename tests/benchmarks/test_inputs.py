"""Input pipelines and image loaders beside PyTorch's."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import image_loading, input_pipeline, measure


def check_rates(row, line, key, turns):
  """That a row has each turn, their median and spread, and shows them."""
  shown = " ".join(line.split())
  found = row[f"{key}_turns"]
  assert len(found) == turns and min(found) > 0
  assert row[key] == np.median(found)
  least, most = row[f"{key}_least"], row[f"{key}_most"]
  assert (least, most) == (min(found), max(found))
  assert f" {row[key]:,.0f} {least:,.0f}-{most:,.0f}" in shown


@pytest.fixture
def coarse_clock(monkeypatch):
  """CPU seconds that go on by one a look: too few ticks for so little work."""
  seconds = itertools.count()
  monkeypatch.setattr(measure, "cpu_seconds", lambda: next(seconds))


def test_input_pipelines_beside_each_other(tmp_path, capsys, coarse_clock):
  out = tmp_path / "input.json"
  input_pipeline.main(
    [
      *("--examples", "32", "--batch-size", "8", "--chunk", "2"),
      *("--repeats", "3", "--workers", "0", "--out", str(out)),
    ]
  )
  rows = json.loads(out.read_text())["rows"]
  _, _, *lines, _ = capsys.readouterr().out.splitlines()
  assert len(rows) == len(lines) == 7
  for row, line in zip(rows, lines, strict=True):
    assert line.startswith(row["pipeline"])
    check_rates(row, line, "images_per_second", 3)
    # An epoch is all of the 32 images, in a made-up second.
    assert row["images_per_cpu_second"] == 32


def test_image_loaders_beside_each_other(
  tmp_path, monkeypatch, capsys, coarse_clock
):
  for i in range(2):
    Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
  monkeypatch.setattr(image_loading, "dali_is_installed", lambda: False)
  out = tmp_path / "loading.json"
  image_loading.main(
    [
      *("--data_dir", str(tmp_path), "--batch_size", "2", "--batches", "1"),
      *("--workers", "0", "--repeats", "3", "--out", str(out)),
    ]
  )
  rows = json.loads(out.read_text())["rows"]
  _, _, *lines, _ = capsys.readouterr().out.splitlines()
  names = [row["loader"] for row in rows]
  assert names == ["grain", "PyTorch, uint8", "PyTorch, float"]
  for row, line in zip(rows, lines, strict=True):
    assert line.startswith(row["loader"])
    check_rates(row, line, "images_per_second", 3)
