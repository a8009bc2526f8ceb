"""launch.py with a fault, for `drills.py`.

--data_file=FILE: process 1 opens FILE with every batch, as a pipeline does that
reads images from files. --apart: each process has its own workdir, as on
machines without a common file system. --no_room_at=STEP: while the best weights
of that step are saved, no file can grow; then there is room again.
"""

import pathlib
import resource
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from absl import app, flags

import launch

_DATA_FILE = flags.DEFINE_string("data_file", None, "Read with every batch.")
_APART = flags.DEFINE_bool("apart", False, "Other workdirs for all.")
_NO_ROOM_AT = flags.DEFINE_integer("no_room_at", None, "Of the best weights.")


def main(argv: list[str]) -> None:
  """Prepares the fault, and runs launch.py."""
  import jax

  from kd_jax.data import grain
  from kd_jax.distributed import processes
  from kd_jax.runs import checkpoint, train

  if _DATA_FILE.value is not None:
    next_chunk = grain.GrainPipeline.next_chunk

    def read(self, k):
      if jax.process_index() == 1:
        pathlib.Path(_DATA_FILE.value).read_bytes()
      return next_chunk(self, k)

    grain.GrainPipeline.next_chunk = read
  save = checkpoint.Checkpointer.save

  def save_without_room(self, step, *arguments, **more):
    if self._directory.name != "best" or step != _NO_ROOM_AT.value:
      save(self, step, *arguments, **more)
      return
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, whole[1]))
    try:
      save(self, step, *arguments, **more)
      self.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, whole)

  checkpoint.Checkpointer.save = save_without_room
  if _APART.value:
    processes.VISIBLE = 1.0
    whole = train.train_and_evaluate
    train.train_and_evaluate = lambda config, workdir, *_: whole(
      config, f"{workdir}/{jax.process_index()}"
    )
  launch.main(argv)


if __name__ == "__main__":
  app.run(main, flags_parser=launch.parse)
