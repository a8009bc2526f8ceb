"""The barrier that Orbax's saving threads use."""

import collections
import time
from typing import Any

import jax
from jax._src import distributed

from kd_jax.distributed import processes


class Barrier:
  """Where Orbax's threads wait for those of the other processes.

  JAX's own barrier waits for a process that has failed until a deadline of
  minutes. Here a process whose thread has left a save in the middle is seen to
  have done so, and the others' threads fail as well.
  """

  def __init__(self, name: str):
    """Makes the barriers of one folder; all processes do.

    Args:
      name: of the folder.
    """
    self._name, self._round = name, 0
    self._uses: collections.Counter[str] = collections.Counter()

  def begin(self) -> None:
    """Begins with another save; no thread of any process may be waiting."""
    if self._round and jax.process_count() > 1 and processes.is_first():
      client: Any = distributed.global_state.client
      client.key_value_delete(f"{self._root()}/")
    self._round += 1
    self._uses.clear()

  def wait(self, *, key: str, timeout_ms: int) -> None:
    """Waits for all processes; what `orbax.checkpoint.AsyncOptions` takes.

    Raises:
      RuntimeError: if another process has come to the end without this key.
      TimeoutError: after `timeout_ms`.
    """
    if jax.process_count() == 1:
      return
    # The key-value store that Orbax uses too; it has no public name.
    client: Any = distributed.global_state.client
    self._uses[key] += 1
    root = self._root()
    place = f"{root}/{key}/{self._uses[key]}"
    own = str(jax.process_index())
    if key.endswith("set_value_start") and self._uses[key] == 2:
      client.key_value_set(f"{root}/over/{own}", "", allow_overwrite=True)
    client.key_value_set(f"{place}/{own}", "", allow_overwrite=True)
    everyone = {str(i) for i in range(jax.process_count())}
    deadline = time.monotonic() + timeout_ms / 1000
    while missing := everyone - _children(client, place):
      gone = missing & _children(client, f"{root}/over")
      # Both may have come since: an arrival is told before the end.
      gone -= _children(client, place)
      if gone and not place.startswith(f"{root}/Thread"):
        raise RuntimeError(f"{FOLLOWED} {', '.join(sorted(gone))} has failed")
      if time.monotonic() > deadline:
        raise TimeoutError(
          f"process {', '.join(sorted(missing))} has not come to {key} within"
          f" {timeout_ms / 1000:g} s"
        )
      time.sleep(0.02)

  def _root(self) -> str:
    return f"kd_jax{self._name}/{self._round}"


# How the failure of a process begins that only followed another's.
FOLLOWED = "the save of process"


def _children(client, folder: str) -> set[str]:
  return {
    key.rpartition("/")[2] for key, _ in client.key_value_dir_get(folder + "/")
  }
