"""Claims: one at a time, whoever dies, on one machine and on several."""

import multiprocessing
import os
import subprocess
import sys
import time
import types

import pytest

from kd_jax.distributed import claims


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(claims, "BEAT", 0.02)
  monkeypatch.setattr(claims, "STALE", 0.3)


def other_machine(folder, number=1):
  """A claim of a machine whose locks are not ours."""
  path = folder / "claims" / str(number)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("another boot 1 2")
  return path


def test_one_holds_until_it_releases(tmp_path):
  first, second = (claims.Claim(tmp_path / "run") for _ in range(2))
  assert first.take()
  assert not second.take()
  assert second.others_alive is True
  first.release()
  assert second.take()
  second.release()
  assert sorted(p.name for p in (tmp_path / "run" / "claims").iterdir()) == [
    *("1", "2")
  ]


def test_folders_are_apart(tmp_path):
  held = [claims.Claim(tmp_path / name) for name in "ab"]
  assert [claim.take() for claim in held] == [True, True]
  for claim in held:
    claim.release()


def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path):
  code = (
    "import os, pathlib, signal, sys; from kd_jax import claims;"
    "assert claims.Claim(pathlib.Path(sys.argv[1])).take();"
    "os.kill(os.getpid(), signal.SIGKILL)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": os.getcwd()},
    check=False,
  )
  assert done.returncode == -9
  claim = claims.Claim(tmp_path)
  assert claim.take()
  claim.release()
  assert (tmp_path / "claims" / "2").exists()


def test_another_machine_that_beats_is_alive(tmp_path, quick):
  path, claim = other_machine(tmp_path), claims.Claim(tmp_path)
  assert not claim.take()
  assert claim.others_alive is None
  for beat in range(1, 10):
    os.utime(path, (beat, beat))
    assert not claim.take()
    assert claim.others_alive is True
    time.sleep(0.05)


def test_a_beat_since_a_look_of_long_ago_is_no_sign_of_life(
  tmp_path, monkeypatch
):
  """Another machine beat after the first look, and died within the hour."""
  path, claim, now = other_machine(tmp_path), claims.Claim(tmp_path), 1000.0
  clock = types.SimpleNamespace(monotonic=lambda: now)
  monkeypatch.setattr(claims, "time", clock)
  assert not claim.take()
  os.utime(path, (1, 1))
  now += 3600
  assert not claim.take()
  assert claim.others_alive is None
  now += claims.STALE
  assert not claim.take()
  assert claim.others_alive is None
  # Had it lived, the next beat would have said so.
  os.utime(path, (2, 2))
  assert not claim.take()
  assert claim.others_alive is True
  now += claims.STALE + 1
  assert claim.take()
  claim.release()


def test_another_machine_that_is_silent_is_followed(tmp_path, quick):
  path, claim = other_machine(tmp_path, 7), claims.Claim(tmp_path)
  # Whatever its clock says.
  os.utime(path, (4e9, 4e9))
  begun = time.monotonic()
  while not claim.take():
    assert claim.others_alive is None
    time.sleep(0.02)
  assert time.monotonic() - begun > 0.25
  assert (tmp_path / "claims" / "8").exists()
  claim.release()


def test_another_machine_that_released_is_followed_at_once(tmp_path):
  os.utime(other_machine(tmp_path), (0, 0))
  claim = claims.Claim(tmp_path)
  assert claim.take()
  claim.release()


def test_a_holder_beats_until_it_releases(tmp_path, quick):
  claim = claims.Claim(tmp_path)
  assert claim.take()
  path = tmp_path / "claims" / "1"
  os.utime(path, (1, 1))
  deadline = time.monotonic() + 10
  while path.stat().st_mtime == 1 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert path.stat().st_mtime > 1e9
  claim.release()
  time.sleep(0.1)
  assert path.stat().st_mtime == 0


def test_who_was_followed_ends_at_once(tmp_path):
  code = (
    "import pathlib, sys, time; from kd_jax import claims;"
    "claims.BEAT = 0.05; folder = pathlib.Path(sys.argv[1]);"
    "assert claims.Claim(folder).take();"
    "(folder / 'claims' / '2').write_text('another'); time.sleep(60)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": os.getcwd()},
    check=False,
    capture_output=True,
    text=True,
    timeout=50,
  )
  assert done.returncode == 1
  assert done.stderr == (
    f"{tmp_path} has been taken over by another process, because this one gave"
    " no sign of life for 150 s: ending at once\n"
  )


def _race(folder, barrier, wins):
  # As on machines of their own: no common lock.
  claims.tempfile.tempdir = str(folder / str(os.getpid()))
  os.mkdir(claims.tempfile.tempdir)
  claims.STALE = 0.5
  claim = claims.Claim(folder / "run")
  assert not claim.take()
  time.sleep(0.6)
  barrier.wait()
  wins.put(claim.take())
  barrier.wait()


def test_one_of_many_machines_follows_a_dead_one(tmp_path):
  other_machine(tmp_path / "run")
  context = multiprocessing.get_context("spawn")
  barrier, wins = context.Barrier(3), context.Queue()
  racers = [
    context.Process(target=_race, args=(tmp_path, barrier, wins))
    for _ in range(3)
  ]
  for racer in racers:
    racer.start()
  for racer in racers:
    racer.join(60)
    assert racer.exitcode == 0
  made = [p.name for p in (tmp_path / "run" / "claims").iterdir()]
  assert sorted(wins.get(timeout=5) for _ in racers) == [False, False, True]
  assert sorted(made) == ["1", "2"]


def test_a_folder_that_was_removed(tmp_path):
  claim = claims.Claim(tmp_path / "run")
  assert claim.take()
  (tmp_path / "run" / "claims" / "1").unlink()
  claim.release()
