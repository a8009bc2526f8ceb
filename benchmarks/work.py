"""What the two sides of `benchmarks.step` have in common: work and weights.

A piece of work is a pair of networks, a method and a batch. `prepare` writes
its initial weights, made by kd_jax, and what kd_jax's networks make of a few
images; either side starts from these files, and the PyTorch side first checks
that its networks make the same of the images.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

# Those that the PyTorch side has.
COMMON = ("none", "kd", "crd", "semckd", "simkd")
PAIRS = (
  "resnet32x4:resnet8x4",
  "resnet32x4:ShuffleV2_1_5",
  "resnet32x4:vgg8",
)
MOMENTUM, WEIGHT_DECAY, LEARNING_RATE = 0.9, 5e-4, 0.05
SEED = 0
CIFAR, IMAGENET = 50_000, 1_281_167  # images of an epoch
_CHECKED = 4  # images


def methods() -> list[str]:
  """The words of kd_jax's methods."""
  from kd_jax import distillers

  return distillers.names()


def title(method: str) -> str:
  """A method's name for a table."""
  from kd_jax import distillers

  if method == "none":
    return "student alone"
  return distillers.DISTILLERS[method].__name__


@functools.cache
def recipe(method: str) -> tuple[dict[str, float], dict[str, Any]]:
  """The loss weights and the fields of a method's CIFAR config."""
  name = "teacher" if method == "none" else method
  config = importlib.import_module(f"configs.{name}_cifar").get_config()
  fields = config.distiller.to_dict()
  fields.pop("name")
  return config.loss_weights.to_dict(), fields


@dataclasses.dataclass(frozen=True)
class Work:
  """What is trained.

  Attributes:
    teacher: name of the network, of `kd_jax.models.names()`.
    student: likewise.
    method: one of `methods()`.
    batch: images per step.
    image_size: height and width in pixels.
    classes: width of the logits.
    examples: size of the training set, of made-up images.
    pad: pixels of zeros around an image before its random crop; 0: no crop.
    flip: whether half of the images are mirrored.
    fields: changes the method's fields.
  """

  teacher: str
  student: str
  method: str
  batch: int
  image_size: int = 32
  classes: int = 100
  examples: int = CIFAR
  pad: int = 4
  flip: bool = True
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.method not in methods():
      raise ValueError(
        f"method: expected one of {', '.join(methods())}, got {self.method!r}"
      )
    if not 0 < self.batch <= self.examples:
      raise ValueError(
        f"batch: expected 1 to {self.examples} (--examples) images, got"
        f" {self.batch}"
      )

  @property
  def epoch_examples(self) -> int:
    """Images of an epoch of the real set, which `examples` may cut short."""
    real = IMAGENET if self.image_size >= 224 else CIFAR
    return max(real, self.examples)

  @property
  def weights(self) -> dict[str, float]:
    """Of the terms of the loss."""
    return recipe(self.method)[0]

  @property
  def settings(self) -> dict[str, Any]:
    """The method's fields."""
    return {**recipe(self.method)[1], **self.fields}

  @property
  def has_teacher(self) -> bool:
    """Whether the method looks at a teacher."""
    return self.method != "none"

  @property
  def networks(self) -> dict[str, str]:
    """The names of the networks that take part, by role."""
    both = {"teacher": self.teacher, "student": self.student}
    return both if self.has_teacher else {"student": self.student}

  def network_file(self, role: str) -> str:
    """The name of the file of a network's weights; both may be one name."""
    name = self.networks[role]
    return f"{role}_{name}_{self.classes}_{self.image_size}.npz"

  @property
  def method_file(self) -> str:
    """The name of the file of what the method learns and remembers."""
    fields = "_".join(f"{k}{v}" for k, v in sorted(self.fields.items()))
    return (
      f"{self.method}_{self.teacher}_{self.student}_{self.batch}"
      f"_{self.classes}_{self.image_size}_{self.examples}{fields}.npz"
    )

  @functools.cached_property
  def source(self) -> Any:
    """The training set, a `kd_jax.data.Source`; made once."""
    from kd_jax import data

    return data.load(
      "synthetic",
      split="train",
      num_examples=self.examples,
      num_classes=self.classes,
      image_size=self.image_size,
    )

  def checked_images(self) -> np.ndarray:
    """The images of the comparison: float32 [4, H, W, 3]."""
    shape = (_CHECKED, self.image_size, self.image_size, 3)
    return np.random.default_rng(SEED).normal(size=shape).astype(np.float32)


def steps_per_epoch(work: Work) -> int:
  """Whole batches of the training set."""
  return work.examples // work.batch


def _quickly(function: Any) -> Any:
  """`jax.jit` for what runs once, on the CPU."""
  import jax

  return jax.jit(
    function, compiler_options={"xla_backend_optimization_level": 0}
  )


def prepare(works: Iterable[Work], folder: pathlib.Path) -> None:
  """Writes the files of the works that are not there yet.

  Args:
    works: those to be measured.
    folder: where to.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for work in works:
    for role in work.networks:
      path = folder / work.network_file(role)
      if not path.exists():
        _save(path, _network(work, role))
    path = folder / work.method_file
    if not path.exists():
      _save(path, _method(work))


def _save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  part = path.with_suffix(".part")
  with part.open("wb") as file:
    np.savez(file, **arrays)
  part.rename(path)  # whole or not there


def _network(work: Work, role: str) -> dict[str, np.ndarray]:
  """A state dict, and under "logits" what the network says of the images."""
  import jax

  from kd_jax import models
  from kd_jax.interop import pytorch

  name = work.networks[role]
  network = models.create(name, work.classes)
  images = work.checked_images()

  def make(key, images):
    variables = network.init(key, images, train=False)
    return variables, network.apply(variables, images, train=False).logits

  key = jax.random.fold_in(jax.random.key(SEED), len(role))
  variables, logits = jax.device_get(_quickly(make)(key, images))
  state_dict = pytorch.to_state_dict(name, variables)
  return {**state_dict, "logits": logits}


def _method(work: Work) -> dict[str, np.ndarray]:
  """Leaves of the distiller's variables by path, e.g. params/conv1/kernel."""
  import jax
  import jax.numpy as jnp
  from flax import traverse_util

  from kd_jax import distillers
  from kd_jax.distillers import base

  shape = (work.batch, work.image_size, work.image_size, 3)
  outputs = {}
  for role, name in work.networks.items():
    outputs[role] = _zeros(_output_shapes(name, work.classes, shape))
  size = work.batch
  batch = {
    "label": jnp.zeros(size, jnp.int32),
    "index": jnp.arange(size, dtype=jnp.int32),
    "mask": jnp.ones(size, bool),
    "train_labels": jnp.arange(work.examples, dtype=jnp.int32) % work.classes,
  }
  distiller = distillers.create(work.method, **work.settings)
  teachers = [outputs["teacher"]] if "teacher" in outputs else []
  if distiller.views > 1:
    views = {"strong_student": outputs["student"], "strong_teachers": teachers}
    batch = {**batch, **views}

  def head(pooled):
    return jnp.zeros((*pooled.shape[:-1], work.classes))

  def init(key):
    return distiller.init(
      {"params": key, "distiller": key},
      outputs["student"],
      teachers,
      batch,
      teacher_heads=[head] * len(teachers),
      student_head=head,
      step=jnp.zeros((), jnp.int32),
      epoch=jnp.ones((), jnp.int32),
      train=True,
      method="distill",
    )

  variables = jax.device_get(_quickly(init)(jax.random.key(SEED)))
  if base.CONSTANTS in variables:  # NaN until they are read of a teacher
    zeros = jax.tree.map(np.zeros_like, variables[base.CONSTANTS])
    variables[base.CONSTANTS] = zeros
  leaves = traverse_util.flatten_dict(variables, sep="/")
  tensors = _torch_tensors(work, variables)
  return {**leaves, **{f"torch/{k}": v for k, v in tensors.items()}}


def _torch_tensors(work: Work, variables: Any) -> dict[str, np.ndarray]:
  """The learned part under PyTorch's names, of the methods it has."""
  from kd_jax.interop import pytorch

  if work.method not in COMMON:
    return {}
  return pytorch.tensors_from_variables(variables, rename=".".join)


@functools.lru_cache
def _output_shapes(name: str, classes: int, shape: tuple[int, ...]) -> Any:
  import jax
  import jax.numpy as jnp

  from kd_jax import models

  init = functools.partial(
    models.create(name, classes).init_with_output, train=False
  )
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(init, jax.random.key(0), images)[0]


def _zeros(shapes: Any) -> Any:
  import jax
  import jax.numpy as jnp

  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of one of the files."""
  with np.load(path) as arrays:
    return dict(arrays)


def main() -> None:
  """Prepares one work: `python -m benchmarks.work JSON FOLDER`."""
  fields, folder = sys.argv[1:]
  prepare([Work(**json.loads(fields))], pathlib.Path(folder))
  print("{}")


if __name__ == "__main__":
  main()
