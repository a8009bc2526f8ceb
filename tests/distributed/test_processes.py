"""Processes: what starts them, what they agree on, and one result of them.

The faults that take minutes are in `scripts/drills.py`, which lends its tools.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from kd_jax.distributed import launcher as launcher_lib
from kd_jax.distributed import processes, signals
from scripts import drills

REPO = pathlib.Path(__file__).resolve().parents[2]
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
  ("environ", "found"),
  [
    ({}, None),
    (SALLOC, None),  # a shell: srun has not been called
    ({**SALLOC, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ({**SALLOC, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "slurm"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
    (POD, None),  # a notebook's
    ({**POD, "JOB_COMPLETION_INDEX": "0"}, "k8s"),
  ],
)
def test_who_has_started_several(environ, found):
  assert processes.detect(environ) == found


FLAGS = {
  "coordinator_address": None,
  "num_processes": None,
  "process_id": None,
  "local_processes": None,
}


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (
      {"process_id": 0},
      "--process_id without --coordinator_address, ",
    ),
    (
      {"coordinator_address": "a:1", "num_processes": 2},
      "--coordinator_address, --num_processes without --process_id: expected",
    ),
    (
      {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
      "--coordinator_address: expected HOST:PORT of process 0, got 'host'",
    ),
    (
      {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
      "--process_id: expected 0 to --num_processes - 1, got 2 of 2",
    ),
    ({"local_processes": 0}, "--local_processes: expected 1 or more, got 0"),
    (
      {"local_processes": 2, "process_id": 1},
      "--local_processes starts all processes itself: leave out --process_id",
    ),
  ],
)
def test_flags_that_do_not_go_together(given, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    launcher_lib.check_flags(**{**FLAGS, **given})


def test_flags_that_do():
  launcher_lib.check_flags(**FLAGS)
  launcher_lib.check_flags(**{**FLAGS, "local_processes": 2})
  launcher_lib.check_flags(
    coordinator_address="[::1]:80",
    num_processes=2,
    process_id=1,
    local_processes=None,
  )


def test_a_plain_process_joins_nobody():
  processes.initialize(heartbeat_seconds=1)
  assert processes.broadcast({"a": [1]}) == {"a": [1]}
  assert processes.all_gather_object("a") == ["a"]
  processes.require_same("config.x", "a", "Never said")
  assert processes.on_all_processes(lambda: 3) == 3
  with pytest.raises(OSError, match="own"):
    processes.on_all_processes(pathlib.Path("/no/such/own").read_text)


def test_a_heartbeat_that_is_too_short():
  with pytest.raises(ValueError, match="heartbeat_seconds: expected 5 or more"):
    processes.initialize(
      coordinator_address="127.0.0.1:1",
      num_processes=2,
      process_id=0,
      heartbeat_seconds=1,
    )


@pytest.mark.parametrize(
  ("given", "shares"),
  [
    (
      {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
      [{"JAX_NUM_CPU_DEVICES": "2"}] * 2,
    ),
    ({"JAX_PLATFORMS": "cpu"}, [{"JAX_NUM_CPU_DEVICES": "1"}] * 2),
    (
      {"CUDA_VISIBLE_DEVICES": "0,2,5,7"},
      [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "5,7"}],
    ),
    ({"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"}, "is 3, got 2"),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, "a divisor of the 3 GPUs, got 2"),
  ],
)
def test_shares_of_devices(given, shares, monkeypatch):
  for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES"):
    monkeypatch.delenv(name, raising=False)
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  if isinstance(shares, str):
    with pytest.raises(ValueError, match=shares):
      launcher_lib._share_of_devices(2, 0)
  else:
    assert [launcher_lib._share_of_devices(2, i) for i in range(2)] == shares


STARTER = """
import sys
from kd_jax import processes
processes.GRACE = 1.0
sys.exit(processes.start_local(3, [sys.executable, "-c", sys.argv[1]]))
"""
CHILD = """
import signal, sys, time
flags = dict(a.lstrip("-").split("=") for a in sys.argv[1:])
me = int(flags["process_id"])
assert flags["num_processes"] == "3" and ":" in flags["coordinator_address"]
print("out", me, flush=True)
print("err", me, file=sys.stderr, flush=True)
"""


def start_local(code, *, wait=True):
  process = subprocess.Popen(
    [sys.executable, "-c", STARTER, CHILD + code],
    cwd=REPO,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  if not wait:
    return process
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_local_processes_end_well():
  code, out, err = start_local("")
  assert (code, out) == (0, "out 0\n")
  assert sorted(err.splitlines()) == ["[1] err 1", "[2] err 2", "err 0"]


def test_when_one_fails_the_others_are_ended():
  code, _, err = start_local("""
if me == 1:
  sys.exit(7)
time.sleep(60)
""")
  assert code == 7
  assert "launch.py: ending process 0, 2, which waited" in err


def test_one_that_is_killed_is_named():
  code, _, err = start_local("""
import os
if me == 2:
  os.kill(os.getpid(), signal.SIGKILL)
""")
  assert code == 128 + signal.SIGKILL
  assert "launch.py: process 2 was ended by SIGKILL" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_are_passed_on(name):
  process = start_local(
    f"""
signal.signal(signal.{name}, lambda *_: sys.exit(75))
print("ready", me, file=sys.stderr, flush=True)
time.sleep(60)
""",
    wait=False,
  )
  ready = 0
  while ready < 3:
    ready += "ready" in process.stderr.readline()
  process.send_signal(getattr(signal, name))
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75 and out == "out 0\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_signals(number, capsys):
  seen = []
  outside = signal.signal(number, lambda *_: seen.append("outside"))
  try:
    with pytest.raises(SystemExit) as stopped, signals.ended_by_signals(75):
      try:
        signal.raise_signal(number)
      except Exception:  # as whoever tries something may catch
        raise AssertionError("it was held up") from None
      finally:
        signal.raise_signal(number)  # acts as without the context
        seen.append("released")
    assert stopped.value.code == 75
    assert seen == ["outside", "released"]
    signal.raise_signal(number)
    assert seen[2:] == ["outside"]
  finally:
    signal.signal(number, outside)
  name = signal.Signals(number).name
  said = f"launch.py: stopped by {name}: the same command goes on\n"
  assert capsys.readouterr().err == said


JOIN = """
import jax
from kd_jax import processes
processes.initialize(heartbeat_seconds=10)
me = jax.process_index()
print(processes.from_first(f"{me} of {jax.process_count()}"))
print(processes.from_all("x" * me))
processes.require_same("config.x", "3 images", "Never said")
try:
  processes.require_same("config.data", f"{3 - me} images", "Copy them")
except processes.RefusedError as error:
  print(error)
"""


def slurm(index):
  return {
    # JAX makes the port of it.
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": str(index),
    "SLURM_LOCALID": str(index),
  }


def mpi(index):
  return {
    "OMPI_MCA_orte_hnp_uri": f"{os.getpid() << 12}.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(index),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
  }


def mpi5(index):
  """Open MPI 5 does not say where process 0 is."""
  port = 20000 + os.getpid() % 10000
  environment = {**mpi(index), "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
  del environment["OMPI_MCA_orte_hnp_uri"]
  return environment


@pytest.mark.parametrize("launcher", [slurm, mpi, mpi5])
def test_processes_find_each_other(launcher):
  """In the environment of the launcher's tasks."""
  children = [
    subprocess.Popen(
      [sys.executable, "-c", JOIN],
      cwd=REPO,
      env={**drills.environment(1), **launcher(index)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = [child.communicate(timeout=120)[0] for child in children]
  host = socket.gethostname()
  expected = [
    "0 of 2",
    "['', 'x']",
    "config.data: expected the same in all 2 processes. Process 0"
    f" ({host}) has 3 images; process 1 ({host}) has 2 images. Copy them",
  ]
  assert [text.splitlines()[-3:] for text in said] == [expected] * 2


COMMANDS = {
  # With no flags but those that srun has.
  "srun": """
while [[ $1 == --* ]]; do
  case $1 in
    --kill-on-bad-exit=[01] | --wait=[0-9]* | --unbuffered | --label) shift ;;
    *) echo "srun: unrecognized option '$1'" >&2; exit 1 ;;
  esac
done
echo "$SRUN_CPUS_PER_TASK" > cpus
"$@" &
wait $!
""",
  "scancel": 'echo "$@" >> calls; kill -TERM "$(cat task)"',
  "scontrol": 'echo "$@" >> calls',
  # It saves for a while.
  "trainer": """
trap 'sleep 0.5; exit 75' TERM
echo $$ > task  # before the file that the tests wait for
echo "$@" > arguments
while [[ $4 != fail ]]; do sleep 0.1; done
exit 3
""",
}


def sbatch(name, folder, *arguments):
  for command, text in COMMANDS.items():
    (folder / command).write_text(f"#!/bin/bash\n{text}\n")
    (folder / command).chmod(0o755)
  (folder / "scripts").symlink_to(REPO / "scripts")
  return subprocess.Popen(
    ["bash", str(REPO / "scripts" / name), *arguments],
    cwd=folder,
    env={
      **os.environ,
      "PATH": f"{folder}:{os.environ['PATH']}",
      "PYTHON": "trainer",
      "SLURM_JOB_ID": "7",
      "SLURM_SUBMIT_DIR": str(folder),
    },
  )


@pytest.mark.parametrize("name", ["one_node.sbatch", "several_nodes.sbatch"])
def test_a_job_is_stopped_and_put_back_into_the_queue(name, tmp_path):
  text = (REPO / "scripts" / name).read_text()
  for line in ("--requeue", "--signal=B:TERM@180", "--open-mode=append"):
    assert f"#SBATCH {line}\n" in text
  job = sbatch(name, tmp_path, "--config", "a b.py")
  while not (tmp_path / "arguments").exists():
    assert job.poll() is None
  job.terminate()
  assert job.wait(timeout=30) == 75
  arguments = (tmp_path / "arguments").read_text()
  assert arguments == "launch.py --config a b.py\n"
  calls = (tmp_path / "calls").read_text()
  assert calls == "--signal=TERM 7\nrequeue 7\n"


def test_a_job_that_ends_before_scancel_does_is_put_back_too(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(
    COMMANDS, "scancel", f"{COMMANDS['scancel']}; touch sent; sleep 1"
  )
  monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
  job = sbatch("one_node.sbatch", tmp_path, "--config", "a")
  while not (tmp_path / "arguments").exists():
    assert job.poll() is None
  job.terminate()
  while not (tmp_path / "sent").exists():
    assert job.poll() is None
  time.sleep(0.1)
  job.terminate()  # and a second signal, while the first is answered
  assert job.wait(timeout=30) == 75
  calls = (tmp_path / "calls").read_text().splitlines()
  assert calls[0] == "--signal=TERM 7" and calls[-1] == "requeue 7"
  assert (tmp_path / "cpus").read_text() == "8\n"


def test_of_an_array_one_task_is_put_back(tmp_path, monkeypatch):
  """The task whose own id is that of the whole array."""
  monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
  monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
  job = sbatch("one_node.sbatch", tmp_path, "--config", "a")
  while not (tmp_path / "arguments").exists():
    assert job.poll() is None
  job.terminate()
  assert job.wait(timeout=30) == 75
  calls = (tmp_path / "calls").read_text()
  assert calls == "--signal=TERM 7_3\nrequeue 7_3\n"


def test_a_job_that_fails_is_not(tmp_path):
  job = sbatch("one_node.sbatch", tmp_path, "--config", "a", "fail")
  assert job.wait(timeout=30) == 3
  assert not (tmp_path / "calls").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("processes")


def test_one_result(folder):
  """Four methods; then a run of 4 processes, gone on with by 2 and by 1."""
  # With a clock that always says save.
  changes = {"checkpoint.every_minutes": 0.0}
  jobs = [[method, f"{method}-2x2", 0, changes] for method in drills.METHODS]
  said = drills.train_in(folder, 2, 2, jobs)
  assert said.count("training _tiny_wide first") == 1  # by both, told once
  jobs = [[method, f"{method}-1x1", 0, {}] for method in drills.METHODS]
  assert "training" not in drills.train_in(folder, 1, 1, jobs)
  for method in drills.METHODS:
    ours, theirs = folder / f"{method}-2x2", folder / f"{method}-1x1"
    worst = drills.worst_difference(ours, theirs, "/params")
    # Rounding: of a bias that began at 0, 1.2e-5 in 8 steps.
    assert worst[0] < 5e-5, (method, worst)
    ours, theirs = (
      json.loads((path / "result.json").read_text()) for path in (ours, theirs)
    )
    for name in ("top1", "top5"):  # every image counts once
      assert ours["final"][name] == theirs["final"][name]

  said = drills.train_in(folder, 4, 1, [["crd", "crd-n", 2, {}]])
  assert said.count("stopped by SIGTERM at step") == 1
  assert said.count("stopped by a signal to another process at step") == 3
  (step,) = drills.steps_saved(folder / "crd-n")
  assert 2 < step < 8
  said = drills.train_in(folder, 2, 1, [["crd", "crd-n", step, {}]])
  assert f"going on from step {step} of 8" in said
  then = drills.steps_saved(folder / "crd-n")[-1]
  assert step < then < 8
  said = drills.train_in(folder, 1, 1, [["crd", "crd-n", 0, {}]])
  assert f"going on from step {then} of 8" in said
  worst = drills.worst_difference(
    folder / "crd-n", folder / "crd-1x1", "/params"
  )
  assert worst[0] < 5e-5, worst


def test_a_killed_process_ends_the_others(folder):
  """And where the workdir is not shared, none begins."""
  list(drills.not_shared(folder))
  shown = list(drills.lose(folder, "lost", 1))
  assert re.search(drills.LOST, shown[-1])
