"""Claims: who works in a folder that many processes see.

A claim is a file `claims/N` in the folder. The highest N holds; to follow it is
to make N + 1, which a file system does for one of all who try, shared ones
included. Nothing is removed, so that no one mistakes a new claim for an old
one. A claim is over when

- its holder says so (its time is set to 0);
- it is of this machine, and the lock that its holder has on a file of this
  machine is free: the kernel frees it however the holder ends, `kill -9`
  included; or
- it is of another machine, and its time, which the holder renews every
  `BEAT` seconds, has stood still for `STALE` seconds of this machine's clock:
  the clocks of two machines are never compared.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import sys
import tempfile
import threading
import time
from typing import IO

# Seconds between signs of life, and without one until a claim is over. A
# network file system may show an old time for a minute.
BEAT = 10.0


STALE = 150.0


class Claim:
  """One process's wish to work alone in a folder."""

  def __init__(self, folder: pathlib.Path):
    """Claims nothing yet.

    Args:
      folder: absolute path; it may not exist.
    """
    self._folder = folder / "claims"
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    # Not in the folder, which may be on a file system without locks.
    self._lock_path = pathlib.Path(
      tempfile.gettempdir(), f"kd_jax-{digest}.lock"
    )
    self._lock: IO[str] | None = None
    self._path: pathlib.Path | None = None
    self._released = threading.Event()
    self._seen: tuple[int, int] | None = None
    self._seen_at = self._looked_at = 0.0
    # Whether another has been seen to be at work; None: not known yet.
    self.others_alive: bool | None = None

  def take(self) -> bool:
    """Takes the folder if no one has it; says whether this process has now.

    If not, `others_alive` says what is known of who has it; to know more, ask
    again.

    Raises:
      OSError: if nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
      lock = stack.enter_context(self._lock_path.open("w"))
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        self.others_alive = True
        return False
      number = self._newest() + 1
      if not self._is_over(number - 1, lock) or not self._make(number, lock):
        return False
      self._lock = lock
      stack.pop_all()
    self._released = threading.Event()  # the last claim's stays set
    threading.Thread(
      target=self._beat, args=(number, self._released), daemon=True
    ).start()
    return True

  def release(self) -> None:
    """Ends the claim; another may take the folder."""
    assert self._lock is not None and self._path is not None
    self._released.set()
    if self._path.exists():  # the folder may have been removed
      os.utime(self._path, (0, 0))
    self._lock.close()
    self._lock = None

  def _newest(self) -> int:
    if not self._folder.exists():
      return 0
    return max((int(path.name) for path in self._folder.iterdir()), default=0)

  def _is_over(self, number: int, lock: IO[str]) -> bool:
    if not number:
      return True
    # Opened, because network file systems look again at what is opened.
    with (self._folder / str(number)).open() as file:
      holder, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
    if beat == 0 or holder == _identity(lock):
      return True
    now = time.monotonic()
    if self._seen != (number, beat):
      # A beat since a look of long ago may itself be of long ago.
      recent = self._seen is not None and now - self._looked_at <= STALE
      self.others_alive = True if recent else None
      self._seen, self._seen_at = (number, beat), now
    self._looked_at = now
    return now - self._seen_at > STALE

  def _make(self, number: int, lock: IO[str]) -> bool:
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / str(number)
    try:
      with path.open("x") as file:
        file.write(_identity(lock))
    except FileExistsError:
      return False
    self._path = path
    return True

  def _beat(self, number: int, released: threading.Event):
    path, follower = (self._folder / str(n) for n in (number, number + 1))
    while not released.wait(BEAT):
      if follower.exists() and not released.is_set():
        # This process was silent for so long that it counted as dead. Two must
        # not write in one folder: there is no orderly end.
        print(
          f"{self._folder.parent} has been taken over by another process,"
          f" because this one gave no sign of life for {STALE:g} s: ending at"
          " once",
          file=sys.stderr,
          flush=True,
        )
        os._exit(1)
      try:
        os.utime(path)
        if released.is_set():
          os.utime(path, (0, 0))  # it was released in between
      except FileNotFoundError:  # the folder was removed
        return
      except OSError:  # a file system that is away for a moment
        continue


def _identity(lock: IO[str]) -> str:
  """Says which lock this is, of all machines and containers."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  status = os.fstat(lock.fileno())
  return f"{boot} {status.st_dev} {status.st_ino}"
