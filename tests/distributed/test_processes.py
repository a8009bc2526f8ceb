"""Processes: how they start, what they agree on, and what they compute.

The faults that take minutes are in `scripts/drills.py`.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from kd_jax.distributed import launcher as launcher_lib
from kd_jax.distributed import processes
from scripts import drill_processes

REPO = pathlib.Path(__file__).resolve().parents[2]
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
  ("environ", "found"),
  [
    ({}, None),
    (SALLOC, None),  # a shell: srun has not been called
    ({**SALLOC, "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({**SALLOC, "SLURM_STEP_NUM_TASKS": "4"}, "slurm"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
    (POD, None),  # a notebook's
    ({**POD, "JOB_COMPLETION_INDEX": "0"}, "k8s"),
  ],
)
def test_detect(environ, found):
  assert processes.detect(environ) == found


def flags(address=None, count=None, index=None, local=None):
  return {
    "coordinator_address": address,
    "num_processes": count,
    "process_id": index,
    "local_processes": local,
  }


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (flags(index=0), "--process_id without --coordinator_address, "),
    (flags("a:1", 2), "--num_processes without --process_id: expected"),
    (flags("host", 2, 0), "expected HOST:PORT of process 0, got 'host'"),
    (flags("a:1", 2, 2), "expected 0 to --num_processes - 1, got 2 of 2"),
    (flags(local=0), "--local_processes: expected 1 or more, got 0"),
    (flags(index=1, local=2), "all processes itself: leave out --process_id"),
    (flags(), None),
    (flags(local=2), None),
    (flags("[::1]:80", 2, 1), None),
  ],
)
def test_check_flags(given, words):
  if words is None:
    launcher_lib.check_flags(**given)
    return
  with pytest.raises(ValueError, match=re.escape(words)):
    launcher_lib.check_flags(**given)


def test_a_single_process_agrees_with_itself():
  processes.initialize(heartbeat_seconds=1)
  assert processes.broadcast({"a": [1]}) == {"a": [1]}
  assert processes.all_gather_object("a") == ["a"]
  processes.require_same("config.x", "a", "Never said")
  assert processes.on_all_processes(lambda: 3) == 3
  with pytest.raises(OSError, match="own"):
    processes.on_all_processes(pathlib.Path("/no/such/own").read_text)


def test_too_short_a_heartbeat():
  with pytest.raises(ValueError, match="heartbeat_seconds: expected 5 or more"):
    processes.initialize(
      coordinator_address="127.0.0.1:1",
      num_processes=2,
      process_id=0,
      heartbeat_seconds=1,
    )


@pytest.mark.parametrize(
  ("platforms", "cores", "gpus", "shares"),
  [
    ("cpu", "4", None, [{"JAX_NUM_CPU_DEVICES": "2"}] * 2),
    ("cpu", None, None, [{"JAX_NUM_CPU_DEVICES": "1"}] * 2),
    (
      *(None, None, "0,2,5,7"),
      [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "5,7"}],
    ),
    ("cpu", "3", None, "is 3, got 2"),
    (None, None, "0,1,2", "a divisor of the 3 GPUs, got 2"),
  ],
)
def test_share_of_devices(platforms, cores, gpus, shares, monkeypatch):
  given = {
    "JAX_PLATFORMS": platforms,
    "JAX_NUM_CPU_DEVICES": cores,
    "CUDA_VISIBLE_DEVICES": gpus,
  }
  for name, value in given.items():
    monkeypatch.delenv(name, raising=False)
    if value is not None:
      monkeypatch.setenv(name, value)
  if isinstance(shares, str):
    with pytest.raises(ValueError, match=shares):
      launcher_lib.share_of_devices(2, 0)
  else:
    assert [launcher_lib.share_of_devices(2, i) for i in range(2)] == shares


STARTER = """
import sys
from kd_jax.distributed import launcher
launcher.GRACE = 1.0
sys.exit(launcher.start_local(3, [sys.executable, "-c", sys.argv[1]]))
"""
CHILD = """
import os, signal, sys, time
flags = dict(a.lstrip("-").split("=") for a in sys.argv[1:])
me = int(flags["process_id"])
assert flags["num_processes"] == "3" and ":" in flags["coordinator_address"]
print("out", me, flush=True)
print("err", me, file=sys.stderr, flush=True)
"""


def start_local(code):
  return subprocess.Popen(
    [sys.executable, "-c", STARTER, CHILD + code],
    cwd=REPO,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  ("code", "expected", "words"),
  [
    ("", 0, ""),
    (
      "if me == 1:\n  sys.exit(7)\ntime.sleep(60)",
      *(7, "launch.py: ending process 0, 2, which waited"),
    ),
    (
      "if me == 2:\n  os.kill(os.getpid(), signal.SIGKILL)",
      *(128 + signal.SIGKILL, "launch.py: process 2 was ended by SIGKILL"),
    ),
  ],
)
def test_local_processes(code, expected, words):
  process = start_local(code)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (expected, "out 0\n")
  assert {"[1] err 1", "[2] err 2", "err 0"} <= set(err.splitlines())
  assert words in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_are_passed_on(name):
  process = start_local(f"""
signal.signal(signal.{name}, lambda *_: sys.exit(75))
print("ready", me, file=sys.stderr, flush=True)
time.sleep(60)
""")
  ready = 0
  while ready < 3:
    ready += "ready" in process.stderr.readline()
  process.send_signal(getattr(signal, name))
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75 and out == "out 0\n"


JOIN = """
import json, pathlib, sys
import jax
from kd_jax.distributed import processes

def refused(check, *arguments):
  try:
    check(*arguments)
  except processes.RefusedError as error:
    return str(error)

processes.VISIBLE = 1.0
processes.initialize(heartbeat_seconds=10)
me, folder = jax.process_index(), pathlib.Path(sys.argv[1])
print(json.dumps([
  processes.broadcast(f"{me} of {jax.process_count()}"),
  processes.all_gather_object("x" * 9000 * me) == ["", "x" * 9000],
  refused(processes.require_same, "config.x", "3 images", "Never said"),
  refused(processes.require_same, "config.data", f"{3 - me} images", "Copy"),
  refused(processes.on_all_processes, lambda: [1][me:] or int("a")),
  refused(processes.require_shared, folder / "shared" / "run"),
  refused(processes.require_shared, folder / str(me)),
]))
"""


def slurm(index):
  return {
    "SLURM_JOB_ID": str(os.getpid()),  # JAX makes the port of it
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
def test_processes_find_each_other_and_agree(launcher, tmp_path):
  children = [
    subprocess.Popen(
      [sys.executable, "-c", JOIN, str(tmp_path)],
      cwd=REPO,
      env={**drill_processes.environment(1), **launcher(index)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = [child.communicate(timeout=120)[0] for child in children]
  host = socket.gethostname()
  for index, text in enumerate(said):
    first, gathered, same, data, failed, shared, apart = json.loads(
      text.splitlines()[-1]
    )
    assert (first, gathered, same, shared) == ("0 of 2", True, None, None)
    assert data == (
      "config.data: expected the same in all 2 processes. Process 0"
      f" ({host}) has 3 images; process 1 ({host}) has 2 images. Copy"
    )
    assert failed.startswith("process 1 of 2: ValueError: invalid literal")
    assert f"{tmp_path / str(index)}: expected a folder that all 2" in apart
    assert f"process 1 ({host}) does not see what process 0 writes" in apart
  assert os.listdir(tmp_path) == ["shared"]


COMMANDS = {
  # Takes only srun's own flags.
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
  "scancel": """
echo "$@" >> calls
kill -TERM "$(cat task)"
touch sent
[[ -z $SLOW ]] || sleep 1
""",
  "scontrol": 'echo "$@" >> calls',
  # Needs a moment to save.
  "trainer": """
trap 'sleep 0.5; exit 75' TERM
echo $$ > task  # before the file that the tests wait for
echo "$@" > arguments
while [[ $4 != fail ]]; do sleep 0.1; done
exit 3
""",
}


def sbatch(name, folder, *arguments, **variables):
  for command, text in COMMANDS.items():
    (folder / command).write_text(f"#!/bin/bash\n{text}\n")
    (folder / command).chmod(0o755)
  (folder / "scripts").symlink_to(REPO / "scripts")
  return subprocess.Popen(
    ["bash", str(REPO / "scripts" / name), "--config", "a b.py", *arguments],
    cwd=folder,
    env={
      **os.environ,
      "PATH": f"{folder}:{os.environ['PATH']}",
      "PYTHON": "trainer",
      "SLURM_JOB_ID": "7",
      "SLURM_SUBMIT_DIR": str(folder),
      **variables,
    },
  )


def terminate_when(path, job):
  while not path.exists():
    assert job.poll() is None
  job.terminate()


# Of an array, this is the task whose own id is that of the whole array.
ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
  ("name", "variables", "job_id"),
  [
    ("one_node.sbatch", {}, "7"),
    ("several_nodes.sbatch", {}, "7"),
    ("one_node.sbatch", ARRAY, "7_3"),
    # A second signal comes while the first is being passed on.
    ("one_node.sbatch", {"SLOW": "1", "SLURM_CPUS_PER_TASK": "8"}, "7"),
  ],
)
def test_a_stopped_job_is_requeued(name, variables, job_id, tmp_path):
  text = (REPO / "scripts" / name).read_text()
  for line in ("--requeue", "--signal=B:TERM@180", "--open-mode=append"):
    assert f"#SBATCH {line}\n" in text
  job = sbatch(name, tmp_path, **variables)
  terminate_when(tmp_path / "arguments", job)
  if "SLOW" in variables:
    terminate_when(tmp_path / "sent", job)
  assert job.wait(timeout=30) == 75
  arguments = (tmp_path / "arguments").read_text()
  assert arguments == "launch.py --config a b.py\n"
  calls = (tmp_path / "calls").read_text().splitlines()
  assert calls[0] == f"--signal=TERM {job_id}"
  assert calls[-1] == f"requeue {job_id}"
  cpus = variables.get("SLURM_CPUS_PER_TASK", "")
  assert (tmp_path / "cpus").read_text() == f"{cpus}\n"


def test_a_failed_job_is_not_requeued(tmp_path):
  job = sbatch("one_node.sbatch", tmp_path, "fail")
  assert job.wait(timeout=30) == 3
  assert not (tmp_path / "calls").exists()
