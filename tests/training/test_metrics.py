"""Hits, means, non-finite values, and the files that keep them."""

import json
import resource
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from kd_jax import storage
from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.runs import writers
from kd_jax.training import metrics

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  ("logits", "label", "k", "hit"),
  [
    ([3, 2, 1], 0, 1, 1),
    ([3, 2, 1], 1, 1, 0),
    ([3, 2, 1], 1, 2, 1),
    ([3, 2, 1], 2, 2, 0),
    ([3, 2, 1], 2, 3, 1),
    # Ties count against the label.
    ([3, 3, 1], 0, 1, 0),
    ([3, 3, 1], 1, 1, 0),
    ([3, 3, 1], 0, 2, 1),
    ([0, 0, 0], 0, 1, 0),
    ([0, 0, 0], 2, 2, 0),
    # A network that has diverged has no hit.
    ([NAN, NAN, NAN], 0, 1, 0),
    ([NAN, 2, 1], 0, 1, 0),
    ([NAN, 2, 1], 1, 1, 0),
    ([NAN, 2, 1], 1, 2, 1),
    ([INF, 2, 1], 0, 1, 1),
    ([-INF, -INF, 1], 2, 1, 1),
    # Fewer classes than k: every class is among them.
    ([1, 2], 0, 5, 1),
    ([1, 1], 0, 5, 1),
  ],
)
def test_topk_correct(logits, label, k, hit):
  got = metrics.topk_correct(
    jnp.asarray([logits], jnp.float32), jnp.asarray([label]), k
  )
  assert got.dtype == jnp.float32
  assert got.tolist() == [hit]


def test_no_examples_have_no_mean():
  sums = {"ce": np.zeros(2), metrics.COUNT: np.zeros(2)}
  with pytest.raises(ValueError, match="expected images to score, got none"):
    metrics.means(sums)


def test_topk_correct_against_sorting():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((64, 10)).astype(np.float32)
  labels = rng.integers(0, 10, 64)
  for k in (1, 5):
    best = np.argsort(-logits, axis=1)[:, :k]
    expected = (best == labels[:, None]).any(1)
    got = metrics.topk_correct(jnp.asarray(logits), jnp.asarray(labels), k)
    np.testing.assert_array_equal(got, expected)


def test_means_are_exact_over_unequal_counts():
  # Two batches of 3 examples and one of 1: not the mean of means.
  sums = {
    "ce": np.array([3.0, 6.0, 10.0], np.float32),
    "top1": np.array([3.0, 0.0, 1.0], np.float32),
    "top5": np.array([3.0, 3.0, 1.0], np.float32),
    "count": np.array([3.0, 3.0, 1.0], np.float32),
  }
  assert metrics.means(sums) == {
    "ce": 19 / 7,
    "top1": 100 * 4 / 7,
    "top5": 100.0,
  }
  scalars = {"loss": np.float32(6.0), "count": np.float32(4.0)}
  assert metrics.means(scalars) == {"loss": 1.5}


def test_means_add_in_float64():
  # float32 would lose every 1 beside 2^24.
  sums = {"ce": np.array([2**24] + [1] * 1000, np.float32)}
  sums["count"] = np.ones(1001, np.float32)
  assert metrics.means(sums) == {"ce": (2**24 + 1000) / 1001}


def test_global_sums_without_an_axis():
  got = metrics.global_sums({"ce": jnp.float32(3)}, jnp.float32(2), None)
  assert {k: float(v) for k, v in got.items()} == {"ce": 3, "count": 2}


def test_global_sums_over_devices():
  devices = devices_lib.make_devices(num_devices=4)

  def chunk(carry, constants, resident, xs):
    x = xs[0]
    return metrics.global_sums(
      {"ce": jnp.sum(x)}, jnp.float32(x.size), collectives.AXIS
    )

  xs = devices.shard(np.arange(8, dtype=np.float32)[None])
  got = devices.map_chunk(chunk)({}, {}, {}, xs)
  assert {k: float(v) for k, v in got.items()} == {"ce": 28, "count": 8}


def test_first_non_finite():
  sums = {
    "loss": np.array([1.0, INF, NAN]),
    "ce": np.array([1.0, 1.0, 1.0]),
    "kd": np.array([1.0, -INF, 1.0]),
  }
  assert metrics.first_non_finite(sums) == (1, ["loss", "kd"])
  sums["loss"][:] = sums["kd"][:] = 1.0
  assert metrics.first_non_finite(sums) is None
  sums["ce"][2] = NAN
  assert metrics.first_non_finite(sums) == (2, ["ce"])


def events(folder):
  """(tag, step, value) of every scalar in a folder of event files."""
  found = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      found += [
        (value.tag, event.step, value.simple_value)
        for value in event.summary.value
      ]
  return found


def test_writer_writes_lines_and_events(tmp_path):
  writer = writers.Writer(tmp_path, resume_step=0)
  writer.write(4, "train", {"loss": 0.5})
  assert storage.read_metrics(tmp_path / "metrics.jsonl") == [
    {"step": 4, "kind": "train", "loss": 0.5}
  ]  # before it is closed: a crash loses nothing
  writer.write(8, "eval", {"top1": 25.0, "epoch": 1})
  writer.close()
  assert storage.read_metrics(tmp_path / "metrics.jsonl")[1:] == [
    {"step": 8, "kind": "eval", "top1": 25.0, "epoch": 1}
  ]
  assert events(tmp_path / "tensorboard") == [
    ("train/loss", 4, 0.5),
    ("eval/top1", 8, 25.0),
    ("eval/epoch", 8, 1.0),
  ]
  assert "tensorflow" not in sys.modules


def test_writer_drops_what_is_made_again(tmp_path):
  writer = writers.Writer(tmp_path, resume_step=0)
  for step in (2, 4, 6, 8):
    writer.write(step, "train", {"loss": float(step)})
  writer.close()
  path = tmp_path / "metrics.jsonl"
  writer = writers.Writer(tmp_path, resume_step=4)
  writer.write(6, "train", {"loss": 0.0})
  writer.close()
  got = [(r["step"], r["loss"]) for r in storage.read_metrics(path)]
  assert got == [(2, 2.0), (4, 4.0), (6, 0.0)]
  assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_writer_goes_on_after_a_last_line_cut_short(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  whole = json.dumps({"step": 2, "kind": "train", "loss": 1.0})
  path.write_text(f'{whole}\n{{"step": 4, "ki')
  assert storage.read_metrics(path) == [json.loads(whole)]
  assert "left out a line that was cut short" in caplog.text
  writer = writers.Writer(tmp_path, resume_step=9)
  writer.write(10, "train", {"loss": 2.0})
  writer.close()
  lines = path.read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [2, 10]


def test_progress_prints_plain_lines_without_a_terminal(capsys):
  progress = writers.Progress(total=4, initial=1, title="kd", enabled=True)
  progress.advance(1, loss="0.5")
  progress.line("epoch 1")
  progress.close()
  got = capsys.readouterr()
  assert got.out == "epoch 1\n"
  assert got.err == ""


def test_progress_shows_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  progress = writers.Progress(total=4, initial=1, title="kd:x", enabled=True)
  progress.advance(3, loss="0.5")
  progress.line("epoch 1")
  progress.close()
  got = capsys.readouterr()
  assert "epoch 1\n" in got.out
  assert "kd:x: " in got.err
  assert "4/4" in got.err


def test_progress_of_another_process_is_silent(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  progress = writers.Progress(total=4, initial=0, title="kd", enabled=False)
  progress.advance(4)
  progress.line("epoch 1")
  progress.close()
  assert capsys.readouterr() == ("", "")


def test_a_full_disk_loses_no_line(tmp_path, caplog):
  writer = writers.Writer(tmp_path, resume_step=0)
  writer.write(1, "train", {"loss": 1.0})
  path = tmp_path / "metrics.jsonl"
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  # Room for half a line.
  limit = path.stat().st_size + 20
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    for step in (2, 3):
      writer.write(step, "train", {"loss": 1.0})
      assert len(path.read_text().splitlines()) == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert caplog.text.count("its lines are kept and written when there is") == 1
  writer.write(4, "train", {"loss": 1.0})
  writer.close()
  assert [r["step"] for r in storage.read_metrics(path)] == [1, 2, 3, 4]
  steps = {step for _, step, _ in events(tmp_path / "tensorboard")}
  assert {2, 3, 4} <= steps


def test_a_writer_that_is_off_writes_nothing(tmp_path):
  writer = writers.Writer(tmp_path, resume_step=0, enabled=False)
  writer.write(1, "train", {"loss": 1.0})
  writer.close()
  assert list(tmp_path.iterdir()) == []
