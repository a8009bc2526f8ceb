"""Makes weights of other toolboxes this package's own, and back.

    python -m kd_jax convert --from weights.pth --model resnet32x4 --to DIR

writes an export, which evaluates, predicts and teaches like any other; a
`--to` that ends in .pth, .safetensors or .npz gets state dicts under the
reference toolboxes' names instead, and one in .stablehlo a program; see
`kd_jax.export`. `--from` may be an export or a finished run as well. A student
of SimKD's own training loop comes without its teacher's classifier:

    python -m kd_jax convert --simkd_student student.pth --model resnet8x4 \\
        --teacher teacher.pth --teacher_model resnet32x4 --to DIR

makes one model of both files.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_jax import data, models
from kd_jax.interop import card as card_lib
from kd_jax.interop import files, guess, simkd_parts, store
from kd_jax.interop import model as model_lib
from kd_jax.interop.model import Model

# Assumed of a network with this many classes, if its data is not named.
_LIKELY_DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}


@dataclasses.dataclass(frozen=True)
class Origin:
  """What to assume of weights whose file does not say it.

  Attributes:
    data_name: what they were trained on, see `kd_jax.data.constants`: the
      names of the classes and the normalisation. None: CIFAR or ImageNet, as
      the network and its classes have it.
    image_size: pixels, height and width; None: as that data has.
    source: a set that they were trained on, or that is like it; it goes before
      the other two.
  """

  data_name: str | None = None
  image_size: int | None = None
  source: data.Source | data.EncodedSource | None = None


UNKNOWN = Origin()


def open_model(
  path: pathlib.Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  origin: Origin = UNKNOWN,
) -> Model:
  """Reads a model of any form: a file of weights, an export, a finished run.

  Args:
    path: of it.
    model_name: one of `kd_jax.models.names()`; None: the one that fits.
    num_classes: of the classifier; None: as the file has.
    origin: what to assume of a file without a model card.

  Returns:
    The model.

  Raises:
    ValueError: if it cannot be read or does not fit, or if the data has to be
      named.
    ImportError: if it takes PyTorch and there is none.
  """
  if files.is_weights_file(path):
    model = _open_file(path, model_name, num_classes, origin)
  else:
    model = store.load(path)
  for what, wanted, key in (
    ("model", model_name, "architecture"),
    ("number of classes", num_classes, "num_classes"),
  ):
    if wanted is not None and wanted != model.card[key]:
      raise ValueError(
        f"{path}: expected the {what} that was asked for, {wanted}, got"
        f" {model.card[key]}. Ask for that, or for none"
      )
  return model


def _open_file(
  path: pathlib.Path,
  model_name: str | None,
  num_classes: int | None,
  origin: Origin,
) -> Model:
  weights = files.read(path)
  if weights.card is not None:
    return _with_card(path, weights, weights.card)
  name, classes, variables = _network(path, weights, model_name, num_classes)
  return Model(_card(name, classes, origin), variables)


def _network(
  path: pathlib.Path,
  weights: files.Weights,
  model_name: str | None,
  num_classes: int | None,
) -> tuple[str, int, dict[str, Any]]:
  """The name, classes and variables of a file without a card."""
  tensors = files.network_alone(path, weights)
  name, classes = _identify(path, tensors, model_name, num_classes)
  variables = files.variables(
    path, tensors, model_name=name, num_classes=classes
  )
  return name, classes, variables


def _with_card(
  path: pathlib.Path, weights: files.Weights, card: dict[str, Any]
) -> Model:
  """A model of a file that `export.save` wrote."""
  if card.get("format") != card_lib.FORMAT:
    raise ValueError(
      f"{path}: expected a model card of format {card_lib.FORMAT!r}, got"
      f" {card.get('format')!r}. Write it again with python -m kd_jax export"
    )
  if card["batch_norm_folded"]:
    raise ValueError(
      f"{path}: expected a network with BatchNorm, got one whose BatchNorm is"
      " folded into its convolutions, which this file cannot give back. Take"
      " the folder that it was written from, or a file that is not folded"
    )
  variables = files.variables(
    path,
    weights.tensors,
    model_name=card["architecture"],
    num_classes=card["num_classes"],
  )
  if card["head"] is not None:
    try:
      variables = simkd_parts.from_parts(
        card, variables, weights.projector or {}, weights.classifier or {}
      )
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
  return Model(card, variables)


def name_of(path: pathlib.Path) -> str:
  """The network that a file of weights, an export or a run is of.

  Raises:
    ValueError: if it cannot be read, or is of no network that is known.
    ImportError: if it takes PyTorch and there is none.
  """
  if not files.is_weights_file(path):
    return card_lib.read_card(store.find(path))["architecture"]
  weights = files.read(path)
  if weights.card is not None:
    return weights.card["architecture"]
  return _identify(path, files.network_alone(path, weights), None, None)[0]


def _identify(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  model_name: str | None,
  num_classes: int | None,
) -> tuple[str, int]:
  """Fills what was not given from the file."""
  if model_name is None:
    found = guess.guess_model(tensors)
    if found is None:
      raise ValueError(
        f"{path} is of no network that is known here: its"
        f" {len(tensors)} tensors begin with {', '.join(list(tensors)[:3])}."
        f" Name the one it should fit with --model: {', '.join(models.names())}"
      )
    model_name = found.model_name
  if num_classes is None:
    # Without a classifier any number will do: it is reported as missing.
    num_classes = guess.count_classes(model_name, tensors) or 1
  return model_name, num_classes


def _card(model_name: str, num_classes: int, origin: Origin) -> dict[str, Any]:
  """The model card of a network that was trained elsewhere."""
  known: data.Source | data.EncodedSource | data.Constants
  if origin.source is not None:
    known, name = origin.source, origin.source.name
    shape = list(origin.source.image_shape)
    size = None
  else:
    name = origin.data_name or _likely_data(model_name, num_classes)
    known, size = data.constants(name), origin.image_size
    shape = list(known.image_shape)
  if known.num_classes != num_classes:
    raise ValueError(
      f"expected data of {num_classes} classes, as the network has, got"
      f" {name} with {known.num_classes}. Name the data that it was trained on"
    )
  if size is not None:
    if size < 1:
      raise ValueError(f"--image_size: expected 1 pixel or more, got {size}")
    shape[:2] = size, size
  return card_lib.make(
    model_name,
    num_classes=num_classes,
    image_shape=shape,
    class_names=known.class_names,
    mean=known.mean,
    std=known.std,
    trained_on=name,
    data_options={} if size is None else {"image_size": size},
  )


def _likely_data(model_name: str, num_classes: int) -> str:
  name = _LIKELY_DATA.get(num_classes)
  if name is not None:
    # A network for ImageNet leaves one pixel of an image of CIFAR's size.
    network = models.create(model_name, num_classes)
    last = model_lib.output_shapes(network, (32, 32, 3)).features["last"]
    if (name == "imagenet") == (last.shape[1] == 1):
      return name
  raise ValueError(
    "--data: expected the name of the data that the network was trained on,"
    " got none, and there is no telling the normalisation of"
    f" {model_name} with {num_classes} classes. Name data that is alike:"
    " cifar10, cifar100, imagenet, digits"
  )
