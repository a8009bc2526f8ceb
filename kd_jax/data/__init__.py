"""Data: which images, in which order, and how they are augmented.

Sources by kind: `cifar`, `tfds`, `folder` (with `val_labels`), `generated`;
`sources` finds them by name. Pipelines: `device`, `grain` (with `fetch`),
`dali`; `pipelines` finds them by name, `batch` has their contract. `evaluation`
pads the batches of a test set, `skipped` counts bad images, `images` decodes
and crops on the host, `digest` compares sets, and `augment` works on the
device.

May import `kd_jax.distributed`, `kd_jax.registry` and `kd_jax.storage`, and no
other room. Heavy packages (grain, DALI, TFDS, scikit-learn, SciPy) are imported
only when they are used.
"""

from kd_jax.data.batch import Batch, Pipeline
from kd_jax.data.common import Constants, EncodedSource, Source
from kd_jax.data.digest import Summary, differences, digest, summarize
from kd_jax.data.evaluation import EvalStream, eval_batches
from kd_jax.data.folder import FolderSource
from kd_jax.data.images import BadImageError, UnreadableError
from kd_jax.data.pipelines import create, eval_stream, names
from kd_jax.data.sources import constants, detect, load, options

__all__ = [
  "BadImageError",
  "Batch",
  "Constants",
  "EncodedSource",
  "EvalStream",
  "FolderSource",
  "Pipeline",
  "Source",
  "Summary",
  "UnreadableError",
  "constants",
  "create",
  "detect",
  "differences",
  "digest",
  "eval_batches",
  "eval_stream",
  "load",
  "names",
  "options",
  "summarize",
]
