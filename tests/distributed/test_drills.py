"""The cheap ones of `scripts/drills.py`: real processes, really killed."""

import json
import re

import pytest

from scripts import drill_processes, drills


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("drills")


def test_two_processes_of_two_devices_give_the_result_of_one(folder):
  """And one process resumes what two have stopped."""
  jobs = [["crd", "crd-2x2", 0, {"checkpoint.every_minutes": 0.0}]]
  said = drill_processes.train_in(
    folder, 2, 2, [*jobs, ["crd", "stopped", 2, {}]]
  )
  assert said.count("training _tiny_wide first") == 1  # said by one of them
  assert said.count("stopped by SIGTERM at step") == 1
  assert said.count("stopped by a signal to another process at step") == 1
  (step,) = drill_processes.steps_saved(folder / "stopped")
  assert 2 < step < 8
  jobs = [["crd", "crd-1x1", 0, {}], ["crd", "stopped", 0, {}]]
  said = drill_processes.train_in(folder, 1, 1, jobs)
  assert re.search(rf"{drill_processes.RESUMED} {step} of 8", said)
  expected = json.loads((folder / "crd-1x1" / "result.json").read_text())
  for name in ("crd-2x2", "stopped"):
    worst = drill_processes.worst_difference(
      folder / name, folder / "crd-1x1", "/params"
    )
    # Rounding: 1.2e-5 of a bias that began at 0, in 8 steps.
    assert worst[0] < 5e-5, (name, worst)
    result = json.loads((folder / name / "result.json").read_text())
    for score in ("top1", "top5"):  # every image counts once
      assert result["final"][score] == expected["final"][score]


@pytest.mark.full
def test_a_killed_process_ends_the_other(folder):
  shown = list(drills.lose(folder, "lost", 1))
  assert re.search(drill_processes.LOST, shown[-1])


@pytest.mark.full
def test_kill_then_sigterm_then_damage_change_nothing(folder):
  list(drills.alone(folder))
