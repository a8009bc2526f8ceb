"""What a method's test file declares, and the tools to declare it.

`tests/distillers/test_x.py` sets `METHOD = Method(...)`; the batteries read it.
"""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from kd_jax import distillers

# Where losses and logits of a float32 run stray from float64 by percents.
STRAYING = 2e-2
FOLDER = pathlib.Path(__file__).resolve().parent / "distillers"


@dataclasses.dataclass(frozen=True, eq=False)
class LossCase:
  """One loss on small inputs.

  Attributes:
    args: positional arguments, as numpy arrays of float32 or int32.
    kwargs: hyper-parameters.
    refused: hyper-parameter -> values out of its range.
    trained: positions of the arguments with gradients.
    minimum: arguments of a student that equals its teacher; None if the loss
      has no zero.
    per_example: whether it returns [B]; else it is relational.
    huge: factor of the inputs up to which it stays finite.
    scale_free: whether a common factor of the inputs changes nothing.
    ordered: whether the order of the examples counts, but for its reversal.
  """

  args: tuple[Any, ...]
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  trained: tuple[int, ...] = (0, 1)
  minimum: tuple[Any, ...] | None = None
  per_example: bool = True
  huge: float = 1e10
  scale_free: bool = False
  ordered: bool = False


@dataclasses.dataclass(frozen=True)
class Golden:
  """Cases of the golden losses that a method must reproduce.

  Attributes:
    pattern: of their names, without the pair.
    fields: case -> fields of the distiller.
    prefix: case -> prefix of the names of its modules' tensors.
    unused: pattern of tensors that only the reference has.
    weights: case -> weights of the terms that it sums; None: 1 of the method's
      own.
    batch: (inputs, case) -> what the batch has beside the labels.
    constants: (inputs, case) -> the teacher constants of the method.
    tolerance: relative, of the value.
  """

  pattern: str
  fields: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda case: {}
  prefix: Callable[[Mapping[str, Any]], str] = lambda case: ""
  unused: str = r"\Z."
  weights: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None
  batch: Callable[..., Mapping[str, Any]] = lambda inputs, case: {}
  constants: Callable[..., dict[str, Any]] | None = None
  tolerance: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Curve:
  """Six training steps of a reference toolbox.

  Attributes:
    word: the toolbox's name of the method.
    folder: of the golden values.
    fields: curves -> fields of the distiller.
    prepare: (variables, rebuild, seed) -> variables as the toolbox starts.
    tolerance: relative, of losses and logits.
    pair: position of the pair's file in the folder; the last has most methods.
    prefix: of the names of the method's tensors.
    also: weights of terms that the toolbox counts in the method's own.
    dot_delta: of the optimiser.
    init: weights of the terms in a first stage; {} if there is none.
  """

  word: str
  fields: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda curves: {}
  folder: str = "train"
  prepare: Callable[..., Any] = lambda variables, rebuild, seed: variables
  tolerance: float = 1e-4
  pair: int = -1
  prefix: str = "distiller."
  also: Mapping[str, float] = dataclasses.field(default_factory=dict)
  dot_delta: float = 0.0
  init: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Method:
  """A method.

  Attributes:
    losses: its losses by name.
    fields: each field of its own -> another value, which changes the term; None
      if the file has a test of the field.
    small: fields for tiny runs.
    terms: names of the terms; None: "ce", "kd" and its own.
    weights: of the terms in the reference's recipe for CIFAR-100.
    data: what the recipe changes of `config.data`.
    optim: what it changes of `config.optim`.
    relational: whether it compares the examples of a batch.
    tokens: whether both networks have to be transformers.
    alike: whether both networks need maps of the same channels.
    reference: (pattern of our module's path, its name in the reference).
    golden: cases of the golden losses.
    curves: six steps of reference toolboxes.
  """

  losses: Mapping[str, LossCase] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  terms: frozenset[str] | None = None
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  optim: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  relational: bool = False
  tokens: bool = False
  alike: bool = False
  reference: tuple[tuple[str, Any], ...] = ()
  golden: tuple[Golden, ...] = ()
  curves: tuple[Curve, ...] = ()


@functools.cache
def method(name: str) -> Method:
  """The declaration of a method."""
  path = FOLDER / f"test_{name}.py"
  spec = importlib.util.spec_from_file_location(f"declared_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.METHOD


def methods() -> dict[str, Method]:
  """All declarations, in the registry's order."""
  return {name: method(name) for name in distillers.names()}


# Methods with what others have too: nothing, logits, modules, the teacher's
# classifier, constants of the teacher, two views, memory banks.
KINDS = ("none", "kd", "vid", "simkd", "ofd", "mlkd", "crd")


def stepped() -> list[Any]:
  """Names of all methods as parameters of tests that run whole steps.

  One of each kind and all relational ones; the others with `-m full`.
  """
  return [
    pytest.param(
      name,
      marks=() if name in KINDS or declared.relational else pytest.mark.full,
    )
    for name, declared in methods().items()
  ]


def terms(name: str) -> tuple[frozenset[str], frozenset[str]]:
  """Names of a method's terms, and of those that are its own."""
  every = method(name).terms or frozenset({"ce", "kd", name})
  return every, every - {"ce", "kd"} or every - {"ce"} or every


def normal(seed: int, *shape: int) -> np.ndarray:
  """Standard normal float32 numbers."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def softmax(z: np.ndarray) -> np.ndarray:
  """Over the last axis, in the precision of `z`."""
  return np.exp(log_softmax(z))


def log_softmax(z: np.ndarray) -> np.ndarray:
  """Over the last axis, in the precision of `z`."""
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))
