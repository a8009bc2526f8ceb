"""Recognise a network by the tensors of its state dict."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from kd_jax import models
from kd_jax.interop import naming, pytorch

_COUNTER = ".num_batches_tracked"

# Tensors of each network, without batch counters. Computing all networks'
# shapes takes ten seconds, so the count rules most out first; a network that is
# not in the table is never ruled out.
TENSOR_COUNTS = {
  "resnet8": 47,
  "resnet14": 77,
  "resnet20": 107,
  "resnet32": 167,
  "resnet38": 197,
  "resnet44": 227,
  "resnet56": 287,
  "resnet110": 557,
  "resnet116": 587,
  "resnet200": 1007,
  "resnet8x2": 52,
  "resnet14x2": 82,
  "resnet38x2": 202,
  "resnet110x2": 562,
  "resnet8x4": 52,
  "resnet14x4": 82,
  "resnet20x4": 112,
  "resnet26x4": 142,
  "resnet32x4": 172,
  "resnet38x4": 202,
  "resnet44x4": 232,
  "resnet56x4": 292,
  "resnet110x4": 562,
  "ResNet50_cifar": 267,
  "wrn_16_1": 69,
  "wrn_16_2": 70,
  "wrn_40_1": 189,
  "wrn_40_2": 190,
  "vgg8": 32,
  "vgg11": 50,
  "vgg13": 62,
  "vgg16": 80,
  "vgg19": 98,
  "MobileNetV2": 267,
  "MobileNetV2_1_0": 267,
  "ShuffleV1": 247,
  "ShuffleV2": 282,
  "ShuffleV2_1_5": 282,
  "ResNet18": 102,
  "ResNet34": 182,
  "ResNet50": 267,
  "ResNet10x2": 67,
  "ResNet18x2": 107,
  "ResNet34x2": 187,
  "resnext50_32x4d": 267,
  "wrn_50_2": 267,
  "MobileNetV2_Imagenet": 262,
  "ShuffleV2_Imagenet": 282,
}


class Guess(NamedTuple):
  """A network that fits.

  Attributes:
    model_name: one of `kd_jax.models.names()`.
    num_classes: of its classifier.
  """

  model_name: str
  num_classes: int

  def __str__(self) -> str:
    return f"{self.model_name} with {self.num_classes} classes"


def count_classes(
  model_name: str, tensors: Mapping[str, np.ndarray]
) -> int | None:
  """Count the classes of the classifier in a state dict.

  Args:
    model_name: the network.
    tensors: names to arrays, without wrappers' prefixes.

  Returns:
    The number of classes; None if there is no such classifier.

  Raises:
    ValueError: if the model is unknown.
  """
  head = models.create(model_name, 1).head
  for mapping in models.entry(model_name).weight_names:
    bias = tensors.get(f"{mapping.rename((head,))}.bias")
    if bias is not None and bias.ndim == 1 and bias.size:
      return int(bias.size)
  return None


def guess_model(tensors: Mapping[str, np.ndarray]) -> Guess | None:
  """Find the network with just the names and shapes of a state dict.

  Args:
    tensors: names to arrays, without wrappers' prefixes.

  Returns:
    The first that fits, in the order of `kd_jax.models.names()`, or None.
  """
  got = _shapes(tensors)
  for name in models.names():
    num_classes = count_classes(name, tensors)
    if num_classes is None or TENSOR_COUNTS.get(name, len(got)) != len(got):
      continue
    for mapping in models.entry(name).weight_names:
      if pytorch.tensor_shapes(name, num_classes, mapping) == got:
        return Guess(name, num_classes)
  return None


Shapes = dict[str, tuple[int, ...]]


def _shapes(tensors: Mapping[str, np.ndarray]) -> Shapes:
  return {
    name: tuple(array.shape)
    for name, array in tensors.items()
    if not name.endswith(_COUNTER)
  }


def explain(tensors: Mapping[str, np.ndarray]) -> str:
  """Explain why a state dict fits no network, in one line.

  Args:
    tensors: names to arrays, without wrappers' prefixes.

  Returns:
    What `explain_names` finds; or which networks are nearest, and where they
    differ.
  """
  if found := explain_names(tensors):
    return found
  got = _shapes(tensors)
  nearest = sorted(
    _candidates(len(got), _count_rows(got)),
    key=lambda item: -_similarity(got, item[1]),
  )
  told = [_difference(name, got, shapes) for name, shapes in nearest[:3]]
  return (
    f"the nearest networks are {'; '.join(told)}. Name the one that it should"
    " fit with --model_name"
  )


def explain_names(tensors: Mapping[str, np.ndarray]) -> str:
  """Explain what to do about the names of a state dict.

  Args:
    tensors: names to arrays, without wrappers' prefixes.

  Returns:
    How to choose one of several networks, the rule that gives a network's
    names, or that option-A shortcuts are not supported; else "".
  """
  got = _shapes(tensors)
  first = naming.first_parts(got)
  if 1 < len(first) < 6 and all(p.endswith(".") for p in first):
    parts = {p: naming.strip_prefixes(tensors, naming.Names(p)) for p in first}
    found = {p: g for p, part in parts.items() if (g := guess_model(part))}
    if found or {"student.", "teacher."} <= first.keys():
      told = [f"{p} ({found.get(p, 'no known network')})" for p in first]
      best = next(iter(found), "student.").rstrip(".")
      return (
        f"it has several parts, {' and '.join(told)}. Name the one that is"
        f" meant: python -m kd_jax convert --prefix {best}"
      )
  classes = _count_rows(got)
  for name, expected in _candidates(len(got), classes, exact=True):
    if rule := _rename_rule(got, expected):
      return (
        f"its shapes are those of {name} with {classes} classes, under other"
        f" names. Rename them: python -m kd_jax convert --rename '{rule}'"
      )
  for name, expected in _candidates(len(got), classes, more=_OPTION_A):
    plain = {n: s for n, s in expected.items() if ".downsample." not in n}
    if sorted(plain.values()) == sorted(got.values()):
      return (
        f"it looks like {name} with option-A shortcuts, which have no weights:"
        " its downsample tensors are missing. Such networks are not supported"
        " yet"
      )
  return ""


def _count_rows(shapes: Shapes) -> int:
  """Rows of the only matrix, which are the classes; else 1."""
  rows = [shape[0] for shape in shapes.values() if len(shape) == 2]
  return rows[0] if len(rows) == 1 and rows[0] else 1


# Tensors of the two shortcuts of a ResNet for CIFAR.
_OPTION_A = 10


def _candidates(
  count: int, classes: int, *, exact: bool = False, more: int = 0
) -> Iterator[tuple[str, Shapes]]:
  """Networks of about as many tensors, with their shapes."""
  counts = {n: TENSOR_COUNTS[n] for n in models.names() if n in TENSOR_COUNTS}
  close = sorted(counts, key=lambda name: abs(counts[name] - count))[:8]
  for name in counts if exact or more else close:
    if (exact or more) and counts[name] != count + more:
      continue
    for mapping in models.entry(name).weight_names:
      yield name, pytorch.tensor_shapes(name, classes, mapping)


def _rename_rule(got: Shapes, expected: Shapes) -> str | None:
  """Find texts to replace that turn the file's names into the network's."""
  if sorted(got.values()) != sorted(expected.values()):
    return None
  ours, theirs = (
    list(dict.fromkeys(re.findall(r"[A-Za-z]\w*?(?=\d*(?:\.|$))", text)))
    for text in (".".join(expected), ".".join(got))
  )
  old = [word for word in theirs if word not in ours]
  new = [word for word in ours if word not in theirs]
  if not old or max(len(old), len(new)) > 4:
    return None
  for words in itertools.permutations([*new, *[""] * len(old)], len(old)):
    # A word without a counterpart goes, with its dot.
    rule = [
      (a, b) if b else (f"{a}.", "") for a, b in zip(old, words, strict=True)
    ]
    try:
      found = naming.strip_prefixes(
        got, naming.Names(rename=tuple(rule)), shared=False
      )
    except ValueError:
      continue
    if found == expected:
      return ",".join(f"{a}={b}" for a, b in rule)
  return None


def _similarity(got: Shapes, expected: Shapes) -> float:
  """How many names, and names with their shape, are in both."""
  names = got.keys() & expected.keys()
  same = sum(got[name] == expected[name] for name in names)
  total = len(got.keys() | expected.keys())
  return len(names) / total + same / total


def _difference(name: str, got: Shapes, expected: Shapes) -> str:
  """Describe in a few words where a state dict is not a network's."""
  missing = sorted(expected.keys() - got.keys())
  unknown = sorted(got.keys() - expected.keys())
  misshapen = [
    f"{n} {list(got[n])} instead of {list(expected[n])}"
    for n in expected
    if n in got and got[n] != expected[n]
  ]
  words = [
    f"{len(items)} {what} ({items[0]})"
    for what, items in (
      ("tensors missing", missing),
      ("not its own", unknown),
      ("of another shape", misshapen),
    )
    if items
  ]
  return f"{name}: {', '.join(words)}"
