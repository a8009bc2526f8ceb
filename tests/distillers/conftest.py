"""Tiny network outputs, and the reference toolboxes' tensors by name."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import pytest

from kd_jax import distillers
from kd_jax.models.layers import ModelOutputs

LEAVES = {
  **{"kernel": "weight", "scale": "weight", "bias": "bias"},
  **{"mean": "running_mean", "var": "running_var"},
}


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield


def reference_name(method, module, leaf):
  """Name of one tensor in the reference toolboxes, without its prefix."""
  for pattern, replacement in method_cases.method(method).reference:
    if re.fullmatch(pattern, module):
      return f"{re.sub(pattern, replacement, module)}.{LEAVES[leaf]}"
  raise AssertionError(f"{method}: no reference name for {module}/{leaf}")


@pytest.fixture(scope="session")
def fill_distiller(rebuild):
  """fill(method, variables, prefix, seed) -> (variables, used shapes by name).

  `variables` may be shapes (`jax.eval_shape` of init), memories excepted.
  """

  def fill(method, variables, prefix, seed):
    used = {}

    def leaf_value(path, old):
      kind, *modules, leaf = (entry.key for entry in path)
      if kind not in ("params", "batch_stats"):
        return old
      if leaf == "log_scale":  # a constant in the reference, not by name
        return jnp.full(old.shape, math.log(math.exp(5 - 1e-5) - 1))
      if leaf == "theta":  # likewise
        return jnp.ones(old.shape)
      # Our axes in the order of PyTorch's.
      axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(old.ndim, (0,))
      transposed = modules[-1].startswith("deconv") and old.ndim == 4
      axes = (2, 3, 0, 1) if transposed else axes
      name = prefix + reference_name(method, "/".join(modules), leaf)
      used[name] = [old.shape[axis] for axis in axes]
      value = rebuild.fill(name, used[name], seed=seed)
      value = value.transpose(np.argsort(axes))
      # A transposed convolution scatters; ours correlates the dilated map.
      return jnp.asarray(value[::-1, ::-1] if transposed else value)

    return jax.tree_util.tree_map_with_path(leaf_value, variables), used

  return fill


class GoldenInputs:
  """Cases and inputs of the golden losses.

  The cases of `losses_2.json`, if the folder has that file, name their tensors.
  Those of `losses.json` follow the rules of the folder's README.
  """

  def __init__(self, folder, rebuild):
    data = json.loads((folder / "losses.json").read_text())
    self.rebuild, self.seed, self.batch = rebuild, data["seed"], data["batch"]
    self.classes, self.named = 100, dict(data["cases"])
    self.tensors = {
      f"{pair}/{side}/feat{i}": {"shape": shape, "kind": "relu"}
      for pair, sides in data["pairs"].items()
      for side, shapes in sides.items()
      for i, shape in enumerate(shapes)
    }
    for side in "st":
      self.tensors[f"logits_{side}"] = {"shape": [self.classes], "scale": 3}
    if (path := folder / "losses_2.json").exists():
      more = json.loads(path.read_text())
      assert (more["seed"], more["batch"]) == (self.seed, self.batch)
      self.tensors |= more["tensors"]
      self.named |= more["cases"]

  def cases(self, pattern):
    """[(pair or "", case)] of the cases of a kind; there must be one."""
    found = [
      (name.rpartition("/")[0], {"batch": self.batch, **case})
      for name, case in self.named.items()
      if re.fullmatch(pattern, name.rpartition("/")[2])
    ]
    assert found, f"the golden folder has no case {pattern}"
    return found

  def tensor(self, name):
    """An input by its name, in our layout."""
    entry = self.tensors[name]
    if entry.get("kind") == "one":
      return jnp.ones(())
    shape = (self.batch, *entry["shape"])
    x = self.rebuild.normal(name, shape, seed=self.seed)
    x = np.float32(entry.get("scale", 1)) * x
    x = np.maximum(x, 0) if entry.get("kind") == "relu" else x
    return jnp.asarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)

  def labels(self, case):
    found = case.get("labels")
    if found is None:
      found = self.rebuild.integers(
        "labels", self.classes, (self.batch,), seed=self.seed
      )
    return jnp.asarray(found, jnp.int32)

  def output(self, pair, side):
    """A network's output: logits, and the pair's features if there are any."""
    prefix = f"{pair}/{side}/feat"
    maps = [self.tensor(n) for n in self.tensors if n.startswith(prefix)]
    features = {f"stage{i}" if i else "stem": x for i, x in enumerate(maps)}
    if maps:
      features["pooled"] = features.pop(f"stage{len(maps) - 1}")
      features["last"] = maps[-2]
    return ModelOutputs(self.tensor(f"logits_{side}"), features)

  def assert_gradient(self, gradient, expected, context):
    """Compares norm and probe to 1e-4."""
    x = np.asarray(gradient)
    x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    norm = np.linalg.norm(x.astype(np.float64).ravel())
    np.testing.assert_allclose(norm, expected["norm"], 1e-4, err_msg=context)
    theirs = np.asarray(expected["probe"])
    ours, scale = self.rebuild.probe(x, len(theirs)), np.abs(theirs).max()
    np.testing.assert_allclose(
      ours, theirs, 1e-4, 1e-4 * scale, err_msg=context
    )


@pytest.fixture(scope="session")
def golden_inputs(golden, rebuild):
  return GoldenInputs(golden, rebuild)


def tiny_output(seed, *, batch=8, classes=5, widths=(6, 12), sizes=(8, 4)):
  """A network's output, fabricated."""
  features = {}
  shapes = [(sizes[0], widths[0]), *zip(sizes, widths)]
  for i, (size, width) in enumerate(shapes):
    x = jnp.asarray(
      method_cases.normal(100 * seed + i, batch, size, size, width)
    )
    name = f"stage{i}" if i else "stem"
    features |= {f"{name}_preact": x, name: jnp.maximum(x, 0)}
  features["last"] = features[name]
  features["pooled"] = jnp.mean(features["last"], (1, 2))
  logits = method_cases.normal(100 * seed + 99, batch, classes)
  return ModelOutputs(jnp.asarray(logits), features)


def with_blocks(output):
  """A network's output with grids of tokens, as a transformer has them."""
  maps = [output.features["stem"], *output.stages()]
  blocks = {f"block{i}": x for i, x in enumerate(maps, start=1)}
  return output._replace(features={**output.features, **blocks})


class Tiny:
  """A student, a teacher, a batch, and short ways to run a distiller."""

  def __init__(self, *, tokens=False, alike=False):
    self.student = tiny_output(0)
    widths = (6, 12) if alike else (8, 16)
    self.teacher = tiny_output(1, widths=widths, sizes=(8, 8))
    if tokens:
      # Of one size in both networks.
      self.teacher = tiny_output(1, widths=(8, 16))
      self.student, self.teacher = map(
        with_blocks, (self.student, self.teacher)
      )
    weights = jnp.asarray(method_cases.normal(2, 16, 5))
    self.head = lambda pooled: pooled @ weights
    own = jnp.asarray(method_cases.normal(3, 12, 5))
    self.student_head = lambda pooled: pooled @ own
    self.train_labels = np.arange(40, dtype=np.int32) % 5
    index = np.array([3, 11, 19, 24, 0, 36, 7, 8], np.int32)
    self.batch = {"index": index, "label": self.train_labels[index]}
    self.compiled = {}

  def create(self, method, **fields):
    small = method_cases.method(method).small
    return distillers.create(method, **{**small, **fields})

  def given(self, student=None, teacher=None, batch=None, *, train=True):
    """Arguments of `distill`, by name."""
    student, teachers = student or self.student, (teacher or self.teacher,)
    views = {"strong_student": student, "strong_teachers": teachers}
    return {
      "student": student,
      "teachers": teachers,
      "batch": {**views, **(batch or self.batch)},
      "teacher_heads": (self.head,),
      "student_head": self.student_head,
      **{"step": 0, "epoch": 1, "train": train, "method": "distill"},
    }

  def init_function(self, module, **given):
    """key -> the module's variables; the forward pass is dead code."""
    given.setdefault("batch", {**self.batch, "train_labels": self.train_labels})
    return lambda key: module.init(key, **self.given(**given))

  def shapes(self, module, **given):
    """The shapes of the module's variables."""
    init = self.init_function(module, **given)
    return jax.eval_shape(init, jax.random.key(0))

  def real_init(self, module, **given):
    """The variables that the module's own initialisers draw."""
    return jax.jit(self.init_function(module, **given))(jax.random.key(0))

  def init(self, module, **given):
    """Variables of the module's shapes, drawn with numpy, and its memory.

    Compiling one random draw per weight takes seconds for the larger methods.
    """

    def draw(path, x):
      value = np.ones(x.shape, x.dtype)
      if path[-1].key == "kernel":
        value = method_cases.normal(x.size, *x.shape)
        value /= np.sqrt(np.prod(x.shape[:-1]))
      elif path[-1].key not in ("scale", "var"):
        value = 0.1 * method_cases.normal(x.size, *x.shape)
      return jnp.asarray(value)

    shapes = self.shapes(module, **given)
    memory = shapes.pop("memory", None)
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    if memory is not None:
      init = self.init_function(module, **given)
      made = jax.jit(lambda key: init(key)["memory"])(jax.random.key(0))
      variables["memory"] = made
    return variables

  def apply(self, module, variables, *, train=True, seed=1, **given):
    """(DistillOutput, moved collections) of one call, compiled."""

    def call(key, variables, given):
      return module.apply(
        variables,
        rngs={"distiller": key} if train else {},
        mutable=["batch_stats", "memory"] if train else [],
        **self.given(**given, train=train),
      )

    if (module, train) not in self.compiled:
      self.compiled[module, train] = jax.jit(call)
    given = {
      n: getattr(self, n) for n in ("student", "teacher", "batch")
    } | given
    return self.compiled[module, train](jax.random.key(seed), variables, given)

  def term(self, method, **fields):
    """The method's own terms, averaged, for its initial weights."""
    module = self.create(method, **fields)
    output, _ = self.apply(module, self.init(module))
    _, own = method_cases.terms(method)
    return sum(float(jnp.mean(output.terms[name])) for name in own)


@pytest.fixture(scope="session")
def make_output():
  """tiny_output(seed, batch=, classes=, widths=, sizes=)."""
  return tiny_output


@pytest.fixture(scope="session")
def tiny_for():
  """tiny_for(method) -> the networks that a method needs."""
  make = functools.cache(Tiny)

  def networks(name):
    declared = method_cases.method(name)
    return make(tokens=declared.tokens, alike=declared.alike)

  return networks


@pytest.fixture(scope="session")
def tiny(tiny_for):
  return tiny_for("kd")
