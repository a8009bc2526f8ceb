"""Opens a model at any path: a file of weights, an export, a finished run."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kd_jax import data, models
from kd_jax.interop import card as card_lib
from kd_jax.interop import files, guess, naming, pytorch, simkd_parts, store
from kd_jax.interop.model import Model

# Assumed of a network with this many classes, if its data is not named.
_LIKELY_DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}


_Source = data.Source | data.EncodedSource


@dataclasses.dataclass(frozen=True)
class Origin:
  """The data behind weights whose file has no model card.

  Attributes:
    data_name: data that they were trained on, see `kd_jax.data.constants`,
      which gives class names and normalisation. None: CIFAR or ImageNet, as
      the network and its number of classes suggest.
    image_size: height and width in pixels; None: that of the data.
    source: a data set that they were trained on, or one like it, or a function
      that loads it; it replaces the other two.
  """

  data_name: str | None = None
  image_size: int | None = None
  source: _Source | Callable[[], _Source] | None = None


UNKNOWN = Origin()


def open_model(
  path: pathlib.Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  origin: Origin = UNKNOWN,
  names: naming.Names = naming.AS_THEY_ARE,
) -> Model:
  """Read a model of any form.

  Args:
    path: a file of weights, an export, or a finished run's workdir.
    model_name: name of the network; None: the one that fits.
    num_classes: of the classifier; None: as the file has.
    origin: the data behind a file without a model card.
    names: what to make of the names in a file of weights.

  Raises:
    ValueError: if it cannot be read or does not fit, or if the data must be
      named.
    ImportError: if it needs PyTorch, which is missing.
  """
  if model_name is not None:
    models.entry(model_name)  # imports a network of the user's own
  if files.is_weights_file(path):
    model = _open_file(path, model_name, num_classes, origin, names)
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
  names: naming.Names,
) -> Model:
  weights = files.read(path, names)
  if weights.card is not None:
    return _with_card(path, weights, weights.card)
  name, classes, variables = read_network(
    path, weights, model_name, num_classes
  )
  return Model(make_card(name, classes, origin), variables)


def network_alone(
  path: pathlib.Path, weights: files.Weights
) -> dict[str, np.ndarray]:
  """Get the tensors of a network that needs no other part.

  Args:
    path: of the file, for the error.
    weights: its content.

  Raises:
    ValueError: if it is a student of SimKD's training loop.
  """
  if weights.projector is not None:
    raise ValueError(
      f"{path}: expected a network with a classifier of its own, got a SimKD"
      " student, which predicts through its teacher's. Make one model of both"
      f" with python -m kd_jax convert --simkd_student {path} --teacher FILE"
      " --to DIR"
    )
  return weights.tensors


def read_network(
  path: pathlib.Path,
  weights: files.Weights,
  model_name: str | None,
  num_classes: int | None,
) -> tuple[str, int, dict[str, Any]]:
  """Make the variables of a network without a model card.

  Args:
    path: of the file, for errors.
    weights: its content.
    model_name: see `open_model`.
    num_classes: see `open_model`.

  Returns:
    The network's name, its number of classes, its variables.

  Raises:
    ValueError: see `network_alone`, `identify` and `make_variables`.
  """
  tensors = network_alone(path, weights)
  name, classes = identify(path, tensors, model_name, num_classes)
  return name, classes, make_variables(path, tensors, name, classes)


def make_variables(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  model_name: str,
  num_classes: int,
) -> dict[str, Any]:
  """Make a network's variables from a file's tensors.

  Args:
    path: of the file, for the error.
    tensors: see `files.Weights`.
    model_name: name of the network.
    num_classes: of its classifier.

  Returns:
    `{"params": ..., "batch_stats": ...}` of numpy float32 arrays.

  Raises:
    ValueError: if they do not fit: it lists the tensors missing, unexpected
      and misshapen, and names the network that fits.
  """
  try:
    return pytorch.from_state_dict(model_name, num_classes, tensors)
  except ValueError as error:
    found = guess.guess_model(tensors)
    hint = f"it looks like {found}" if found else guess.explain_names(tensors)
    hint = f" {hint[0].upper()}{hint[1:]}" if hint else ""
    raise ValueError(f"{path}: {error}{hint}") from error


def _with_card(
  path: pathlib.Path, weights: files.Weights, card: dict[str, Any]
) -> Model:
  """Make the model of a file that has a card."""
  if card["batch_norm_folded"]:
    raise ValueError(
      f"{path}: expected a network with BatchNorm, got one whose BatchNorm is"
      " folded into its convolutions, which a state dict cannot undo. Use the"
      " folder that it was written from, or a file that is not folded"
    )
  variables = make_variables(
    path, weights.tensors, card["architecture"], card["num_classes"]
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
  """Name the network of a file of weights, an export or a run.

  Raises:
    ValueError: if it cannot be read, or no known network fits.
    ImportError: if it needs PyTorch, which is missing.
  """
  weights = None
  if files.is_weights_file(path):
    weights = files.read(path)
    card = weights.card
  else:
    card = card_lib.read_card(store.find(path))
  if card is not None:
    card_lib.require_imported(card)
    name: str = card["architecture"]
    return name
  assert weights is not None
  return identify(path, network_alone(path, weights), None, None)[0]


def identify(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  model_name: str | None,
  num_classes: int | None,
) -> tuple[str, int]:
  """Fill in the name and the number of classes that were not given.

  Raises:
    ValueError: if no known network has these tensors.
  """
  if model_name is None:
    found = guess.guess_model(tensors)
    if found is None:
      raise ValueError(
        f"{path} fits no known network: {guess.explain(tensors)}"
      )
    model_name = found.model_name
  if num_classes is None:
    # Without a classifier any number will do: it is reported as missing.
    num_classes = guess.count_classes(model_name, tensors) or 1
  return model_name, num_classes


def make_card(
  model_name: str, num_classes: int, origin: Origin
) -> dict[str, Any]:
  """Make the model card of a network that was trained elsewhere.

  Raises:
    ValueError: if the data is unknown or has another number of classes.
  """
  known: Any = origin.source
  if callable(known):
    known = known()
  if known is None:
    name = origin.data_name or likely_data(model_name, num_classes)
    known, size = data.constants(name), origin.image_size
  else:
    name, size = known.name, None
  if known.num_classes != num_classes:
    raise ValueError(
      f"expected data of {num_classes} classes, as the network has, got"
      f" {name} with {known.num_classes}. Name the data that it was trained on"
    )
  if size is not None and size < 1:
    raise ValueError(f"image size: expected 1 pixel or more, got {size}")
  shape, resize = known.image_shape, getattr(known, "resize", None)
  if size is not None:
    if resize is not None:
      resize = round(size * resize / shape[0])
    shape = (size, size, shape[2])
  return card_lib.make(
    model_name,
    num_classes=num_classes,
    image_shape=shape,
    class_names=known.class_names,
    mean=known.mean,
    std=known.std,
    trained_on=name,
    data_options={} if size is None else {"image_size": size},
    resize=resize,
  )


def likely_data(model_name: str, num_classes: int) -> str:
  """Name the data that a network was probably trained on.

  Raises:
    ValueError: if its number of classes and its image size suggest none.
  """
  name = _LIKELY_DATA.get(num_classes)
  if name is not None:
    is_large = models.entry(model_name).image_size > 32
    if is_large == (name == "imagenet"):
      return name
  raise ValueError(
    f"{model_name} with {num_classes} classes: the file does not tell the data"
    " that it was trained on, and so not the normalisation. Name the data, or"
    " data like it: cifar10, cifar100, imagenet, digits"
  )
