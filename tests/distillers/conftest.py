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

# These programs run for milliseconds: compiling them fast is what counts.
quick_jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(scope="session")
def quick():
  """jax.jit, compiling fast."""
  return quick_jit


LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def reference_name(method, module, leaf):
  """Name of one tensor in the reference toolboxes, without its prefix."""
  for pattern, replacement in method_cases.method(method).reference:
    if match := re.fullmatch(pattern, module):
      named = callable(replacement)
      name = replacement(match) if named else match.expand(replacement)
      return f"{name}.{LEAVES[leaf]}"
  raise AssertionError(f"{method}: no reference name for {module}/{leaf}")


def from_reference(module, leaf, value):
  if leaf != "kernel":
    return value
  if module.endswith("deconv"):
    # A transposed convolution scatters; ours correlates the dilated map.
    return value.transpose(2, 3, 0, 1)[::-1, ::-1]
  return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def to_reference_shape(module, leaf, shape):
  if leaf != "kernel":
    return shape
  if module.endswith("deconv"):
    return (*shape[2:], *shape[:2])
  return (*shape[:-3:-1], *shape[:-2])


@pytest.fixture(scope="session")
def fill_distiller(rebuild):
  """fill(method, variables, prefix, seed) -> (variables, used shapes by name).

  `variables` may be shapes (`jax.eval_shape` of init), memories excepted.
  """

  def fill(method, variables, prefix, seed):
    used = {}

    def leaf_value(path, old):
      keys = [entry.key for entry in path]
      if keys[0] not in ("params", "batch_stats"):
        return old
      module, leaf = "/".join(keys[1:-1]), keys[-1]
      if leaf == "log_scale":  # a constant in the reference, not by name
        return jnp.full(old.shape, math.log(math.exp(5 - 1e-5) - 1))
      name = prefix + reference_name(method, module, leaf)
      shape = to_reference_shape(module, leaf, old.shape)
      used[name] = list(shape)
      value = rebuild.fill(name, shape, seed=seed)
      value = from_reference(module, leaf, value)
      assert value.shape == old.shape, (name, value.shape, old.shape)
      return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(leaf_value, variables), used

  return fill


class GoldenInputs:
  """Cases and named inputs of the golden losses.

  Those of `losses_2.json`, if the folder has it, name their tensors; of the
  others the rules of the folder's README make them.
  """

  def __init__(self, folder, rebuild):
    data = json.loads((folder / "losses.json").read_text())
    self.rebuild, self.seed, self.batch = rebuild, data["seed"], data["batch"]
    self.classes, self.cases_, self.tensors = 100, dict(data["cases"]), {}
    for side in "st":
      self.tensors[f"logits_{side}"] = {"shape": [100], "scale": 3}
    for pair, sides in data["pairs"].items():
      for side, shapes in sides.items():
        for i, shape in enumerate(shapes):
          name = f"{pair}/{side}/feat{i}"
          self.tensors[name] = {"shape": shape, "kind": "relu"}
    if (path := folder / "losses_2.json").exists():
      more = json.loads(path.read_text())
      assert (more["seed"], more["batch"]) == (self.seed, self.batch)
      self.tensors |= more["tensors"]
      self.cases_ |= more["cases"]

  def cases(self, pattern):
    """[(pair or "", case)] of the cases of a kind; there must be one."""
    names = {name: name.rpartition("/")[::2] for name in self.cases_}
    found = [
      (pair, self.cases_[name])
      for name, (pair, kind) in names.items()
      if re.fullmatch(pattern, kind)
    ]
    assert found, f"the golden folder has no case {pattern}"
    return found

  def tensor(self, name):
    """An input by its name, in our layout."""
    entry = self.tensors[name]
    shape = (self.batch, *entry["shape"])
    x = self.rebuild.normal(name, shape, seed=self.seed)
    x = np.float32(entry.get("scale", 1)) * x
    if entry.get("kind") == "relu":
      x = np.maximum(x, 0)
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
    features = {}
    names = [n for n in self.tensors if re.match(rf"{pair}/{side}/feat\d", n)]
    for i, name in enumerate(names):
      own = "stem" if i == 0 else f"stage{i}"
      features["pooled" if i == len(names) - 1 else own] = self.tensor(name)
      if i == len(names) - 2:
        features["last"] = features[own]
    return ModelOutputs(self.tensor(f"logits_{side}"), features)

  def assert_gradient(self, gradient, expected, context, tolerance=1e-4):
    norm = np.linalg.norm(np.asarray(gradient, np.float64).ravel())
    np.testing.assert_allclose(
      norm, expected["norm"], rtol=tolerance, err_msg=context
    )
    x = np.asarray(gradient)
    x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    probe = self.rebuild.probe(x, len(expected["probe"]))
    scale = np.abs(expected["probe"]).max()
    np.testing.assert_allclose(
      probe,
      expected["probe"],
      rtol=tolerance,
      atol=tolerance * scale,
      err_msg=context,
    )


@pytest.fixture(scope="session")
def golden_inputs(golden, rebuild):
  return GoldenInputs(golden, rebuild)


def tiny_output(seed, *, batch=8, classes=5, widths=(6, 12), sizes=(8, 4)):
  """A network's output, fabricated."""
  rng = np.random.default_rng(seed)
  features = {}
  shapes = [(sizes[0], widths[0]), *zip(sizes, widths)]
  names = ["stem", *(f"stage{i + 1}" for i in range(len(widths)))]
  for name, (size, width) in zip(names, shapes):
    x = rng.standard_normal((batch, size, size, width)).astype(np.float32)
    features[f"{name}_preact"] = jnp.asarray(x)
    features[name] = jnp.asarray(np.maximum(x, 0))
  features["last"] = features[names[-1]]
  features["pooled"] = jnp.mean(features["last"], (1, 2))
  logits = rng.standard_normal((batch, classes)).astype(np.float32)
  return ModelOutputs(jnp.asarray(logits), features)


class Tiny:
  """A student, a teacher, a batch, and short ways to run a distiller."""

  def __init__(self):
    self.student = tiny_output(0)
    self.teacher = tiny_output(1, widths=(8, 16), sizes=(8, 8))
    weights = jnp.asarray(method_cases.normal(2, 16, 5))
    self.head = lambda pooled: pooled @ weights
    self.train_labels = np.arange(40, dtype=np.int32) % 5
    index = np.array([3, 11, 19, 24, 0, 36, 7, 8], np.int32)
    self.batch = {"index": index, "label": self.train_labels[index]}
    self.compiled = {}

  def create(self, method, **fields):
    small = method_cases.method(method).small
    return distillers.create(method, **{**small, **fields})

  def given(self, student=None, teacher=None, batch=None, *, train=True):
    """Arguments of `distill`, by name."""
    return {
      "student": student or self.student,
      "teachers": (teacher or self.teacher,),
      "batch": batch or self.batch,
      "teacher_heads": (self.head,),
      **{"step": 0, "epoch": 1, "train": train, "method": "distill"},
    }

  def init_function(self, module, **given):
    """key -> the module's variables; the forward pass is dead code."""
    given.setdefault("batch", {**self.batch, "train_labels": self.train_labels})
    return lambda key: module.init(key, **self.given(**given))

  def shapes(self, module, **given):
    """The shapes of the module's variables."""
    return jax.eval_shape(
      self.init_function(module, **given), jax.random.key(0)
    )

  def real_init(self, module, **given):
    """The variables that the module's own initialisers draw."""
    return quick_jit(self.init_function(module, **given))(jax.random.key(0))

  def init(self, module, **given):
    """Variables of the module's shapes, drawn with numpy, and its memory.

    Compiling one random draw per weight takes seconds for the larger methods.
    """
    shapes = self.shapes(module, **given)
    rng = np.random.default_rng(3)

    def draw(path, x):
      name = path[-1].key
      value = np.full(x.shape, {"scale": 1, "var": 1}.get(name, 0), x.dtype)
      if name == "kernel":
        value = rng.standard_normal(x.shape, x.dtype)
        value /= np.sqrt(np.prod(x.shape[:-1]))
      elif name == "bias":
        value = 0.1 * rng.standard_normal(x.shape, x.dtype)
      return jnp.asarray(value)

    memory = shapes.pop("memory", None)
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    if memory is not None:
      made = self.init_function(module, **given)
      variables["memory"] = quick_jit(lambda key: made(key)["memory"])(
        jax.random.key(0)
      )
    return variables

  def apply(self, module, variables, *, train=True, seed=1, **given):
    """(DistillOutput, moved collections) of one call, compiled."""

    def call(key, variables, student, teacher, batch):
      return module.apply(
        variables,
        rngs={"distiller": key} if train else {},
        mutable=["batch_stats", "memory"] if train else [],
        **self.given(student, teacher, batch, train=train),
      )

    if (module, train) not in self.compiled:
      self.compiled[module, train] = quick_jit(call)
    return self.compiled[module, train](
      jax.random.key(seed),
      variables,
      given.get("student", self.student),
      given.get("teacher", self.teacher),
      given.get("batch", self.batch),
    )

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
def tiny():
  return Tiny()
