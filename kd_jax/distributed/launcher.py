"""Starts several processes on this machine and validates the process flags."""

import glob
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from kd_jax.distributed import signals

# Seconds that local processes have to end by themselves when one has failed.
GRACE = 20.0


def check_flags(
  *,
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  local_processes: int | None,
) -> None:
  """Refuses flags that do not go together.

  Raises:
    ValueError: that says which.
  """
  given = {
    "--coordinator_address": coordinator_address,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  named = [name for name, value in given.items() if value is not None]
  if local_processes is not None:
    if named:
      raise ValueError(
        "--local_processes starts all processes itself: leave out"
        f" {', '.join(named)}"
      )
    if local_processes < 1:
      raise ValueError(
        f"--local_processes: expected 1 or more, got {local_processes}"
      )
    return
  if not named:
    return
  if len(named) < len(given):
    missing = [name for name in given if name not in named]
    raise ValueError(
      f"{', '.join(named)} without {', '.join(missing)}: expected all three of"
      f" {', '.join(given)}, or none"
    )
  assert coordinator_address is not None and num_processes is not None
  assert process_id is not None
  if not re.fullmatch(r".+:\d+", coordinator_address):
    raise ValueError(
      "--coordinator_address: expected HOST:PORT of process 0, got"
      f" {coordinator_address!r}"
    )
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise ValueError(
      "--process_id: expected 0 to --num_processes - 1, got"
      f" {process_id} of {num_processes}"
    )


def _share_of_devices(count: int, index: int) -> dict[str, str]:
  """The environment that gives a local process its share of the devices.

  Raises:
    ValueError: if there are fewer GPUs than processes, or they do not divide.
  """
  if "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
      files = glob.glob("/dev/nvidia[0-9]*")
      gpus = [str(i) for i in range(len(files))]
    else:
      gpus = [gpu for gpu in named.split(",") if gpu]
    if gpus:
      if len(gpus) % count:
        raise ValueError(
          f"--local_processes: expected a divisor of the {len(gpus)} GPUs, got"
          f" {count}. Choose GPUs with CUDA_VISIBLE_DEVICES, or take the CPU"
          " with JAX_PLATFORMS=cpu"
        )
      size = len(gpus) // count
      mine = gpus[index * size : (index + 1) * size]
      return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
  devices = int(os.environ.get("JAX_NUM_CPU_DEVICES") or count)
  if devices % count:
    raise ValueError(
      "--local_processes: expected a divisor of JAX_NUM_CPU_DEVICES, which is"
      f" {devices}, got {count}"
    )
  return {"JAX_NUM_CPU_DEVICES": str(devices // count)}


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start_local(count: int, command: Sequence[str]) -> int:
  """Runs a command as `count` processes of this machine, to the end.

  Of the first, everything is shown; of the others, what they write to stderr,
  after their number. SIGTERM and SIGINT are passed on. When one fails, the
  others have `GRACE` seconds to notice, and are then killed.

  Args:
    count: how many.
    command: to which the flags that `initialize` takes are added.

  Returns:
    The exit code of the first that failed (128 + the signal that killed it),
    or 0.

  Raises:
    ValueError: if the devices cannot be shared out.
  """
  environments = [
    {**os.environ, **_share_of_devices(count, i)} for i in range(count)
  ]
  address = f"127.0.0.1:{_free_port()}"
  children: list[subprocess.Popen] = []
  pumps = []
  passed_on: list[int] = []

  def pass_on(number, frame):
    del frame
    passed_on.append(number)
    for child in children:
      if child.poll() is None:
        child.send_signal(number)

  before = {
    number: signal.signal(number, pass_on)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    for index, environment in enumerate(environments):
      child = subprocess.Popen(
        [
          *command,
          f"--coordinator_address={address}",
          f"--num_processes={count}",
          f"--process_id={index}",
        ],
        env=environment,
        # Ctrl-C goes to a terminal's whole group: it is passed on once.
        start_new_session=True,
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=None if index == 0 else subprocess.PIPE,
      )
      children.append(child)
      if index:
        pumps.append(
          threading.Thread(target=_pump, args=(index, child), daemon=True)
        )
        pumps[-1].start()
    return _wait(children)
  finally:
    for child in children:
      if child.poll() is None:
        child.kill()
      child.wait()
    for pump in pumps:
      pump.join()
    for number, handler in before.items():
      signal.signal(number, handler)


def _pump(index, child):
  for line in child.stderr:
    sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
    sys.stderr.flush()


def _wait(children) -> int:
  code, deadline = 0, None
  while True:
    left = [i for i, child in enumerate(children) if child.poll() is None]
    failed = [i for i, child in enumerate(children) if child.returncode]
    if failed and not code:
      code = children[failed[0]].returncode
      deadline = time.monotonic() + GRACE
      if code < 0:
        name = signal.Signals(-code).name
        code = 128 - code
        signals.complain(f"process {failed[0]} was ended by {name}")
    if not left:
      return code
    if deadline is not None and time.monotonic() > deadline:
      signals.complain(
        f"ending process {', '.join(map(str, left))}, which waited"
      )
      for index in left:
        children[index].kill()
      deadline = None
    time.sleep(0.05)
