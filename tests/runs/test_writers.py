"""The files that keep a run's metrics, and its progress bar."""

import json
import sys

from tensorboardX.proto import event_pb2

from kd_jax import storage
from kd_jax.runs import writers


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
  progress.advance(1)
  progress.line("epoch 1")
  progress.close()
  got = capsys.readouterr()
  assert got.out == "epoch 1\n"
  assert got.err == ""


def test_progress_shows_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  progress = writers.Progress(total=4, initial=1, title="kd:x", enabled=True)
  progress.advance(3)
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


def test_a_writer_that_is_off_writes_nothing(tmp_path):
  writer = writers.Writer(tmp_path, resume_step=0, enabled=False)
  writer.write(1, "train", {"loss": 1.0})
  writer.close()
  assert list(tmp_path.iterdir()) == []
