"""Tiny network outputs; the reference toolboxes' names of what is learned."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers
from kd_jax.models.layers import ModelOutputs

# Per method: a pattern of our parameter's module path -> the module's name in
# the reference toolboxes, relative to the method's own prefix.
REFERENCE_MODULES = {
  "fitnet": [(r"regressor/(de)?conv", r"conv"), (r"regressor/bn", r"bn")],
  "vid": [
    (
      r"stage(\d+)/conv(\d)",
      lambda m: f"{int(m[1]) - 1}.regressor.{2 * int(m[2]) - 2}",
    ),
    (r"stage(\d+)", lambda m: f"{int(m[1]) - 1}"),
  ],
  "crd": [(r"embed_([st])/linear", r"embed_\1.linear")],
  "srrl": [(r"transfer/conv", "transfer.0"), (r"transfer/bn", "transfer.1")],
  "simkd": [
    (r"projector/conv(\d)", lambda m: f"transfer.{3 * int(m[1]) - 3}"),
    (r"projector/bn(\d)", lambda m: f"transfer.{3 * int(m[1]) - 2}"),
  ],
  "semckd": [
    (
      r"(query|key)(\d+)/linear(\d)",
      lambda m: f"{m[1]}_{int(m[2]) - 1}.linear{m[3]}",
    ),
    (
      r"project(\d+)_(\d+)/conv(\d)",
      lambda m: (
        f"regressor{int(m[1]) - 1}{int(m[2]) - 1}.regressor.{3 * int(m[3]) - 3}"
      ),
    ),
    (
      r"project(\d+)_(\d+)/bn(\d)",
      lambda m: (
        f"regressor{int(m[1]) - 1}{int(m[2]) - 1}.regressor.{3 * int(m[3]) - 2}"
      ),
    ),
  ],
  "reviewkd": [
    (r"level(\d+)/conv(\d)", lambda m: f"{int(m[1]) - 1}.conv{m[2]}.0"),
    (r"level(\d+)/bn(\d)", lambda m: f"{int(m[1]) - 1}.conv{m[2]}.1"),
    (r"level(\d+)/attention", lambda m: f"{int(m[1]) - 1}.att_conv.0"),
  ],
}
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
  "log_scale": "log_scale",
}


def reference_name(method, module, leaf):
  """The name of one tensor in the reference, relative to its prefix."""
  for pattern, replacement in REFERENCE_MODULES[method]:
    match = re.fullmatch(pattern, module)
    if match:
      name = (
        replacement(match)
        if callable(replacement)
        else match.expand(replacement)
      )
      return f"{name}.{LEAVES[leaf]}"
  raise AssertionError(f"{method}: no reference name for {module}/{leaf}")


def to_reference_shape(module, leaf, shape):
  if leaf != "kernel":
    return shape
  if module.endswith("deconv"):
    return (shape[2], shape[3], shape[0], shape[1])
  return (*shape[:-3:-1], *shape[:-2])


def from_reference(module, leaf, value):
  if leaf != "kernel":
    return value
  if module.endswith("deconv"):
    # A transposed convolution scatters; ours correlates the dilated map.
    return value.transpose(2, 3, 0, 1)[::-1, ::-1]
  return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


# These programs run for milliseconds: compiling them fast is what counts.
quick_jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


@pytest.fixture(scope="session")
def fill_distiller(rebuild):
  """fill(method, variables, prefix, seed) -> variables by reference name.

  `variables` may be shapes (`jax.eval_shape` of init), memories excepted.
  `prefix` goes before the relative name ("distiller." in the training curves).
  The names that were used are returned beside the variables.
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


@pytest.fixture(scope="session")
def golden_losses(golden):
  return json.loads((golden / "losses.json").read_text())


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
  pooled = np.asarray(features["last"]).mean((1, 2))
  features["pooled"] = jnp.asarray(pooled)
  logits = rng.standard_normal((batch, classes)).astype(np.float32)
  return ModelOutputs(jnp.asarray(logits), features)


@pytest.fixture(scope="session")
def quick():
  """jax.jit, compiling fast."""
  return quick_jit


class Tiny:
  """A student, a teacher, a batch, and short ways to run a distiller."""

  def __init__(self):
    self.student = tiny_output(0)
    self.teacher = tiny_output(1, widths=(8, 16), sizes=(8, 8))
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.standard_normal((16, 5)), jnp.float32)
    self.classifier = lambda pooled: pooled @ weights
    self.train_labels = np.arange(40, dtype=np.int32) % 5
    self.compiled = {}
    index = np.array([3, 11, 19, 24, 0, 36, 7, 8], np.int32)
    self.batch = {"index": index, "label": self.train_labels[index]}

  def create(self, method, **fields):
    if method == "crd":
      fields = {"k": 16, "feat_dim": 8, **fields}
    return distillers.create(method, **fields)

  def init_function(self, module, *, student=None, teacher=None, batch=None):
    """key -> the module's variables; the forward pass is dead code."""
    student, teacher = student or self.student, teacher or self.teacher
    batch = batch or {**self.batch, "train_labels": self.train_labels}
    return lambda key: module.init(
      key,
      student,
      (teacher,),
      batch,
      teacher_heads=(self.classifier,),
      step=0,
      epoch=1,
      train=True,
      method="distill",
    )

  def shapes(self, module, **outputs):
    """The shapes of the module's variables."""
    return jax.eval_shape(
      self.init_function(module, **outputs), jax.random.key(0)
    )

  def real_init(self, module, **outputs):
    """The variables that the module's own initialisers draw."""
    return quick_jit(self.init_function(module, **outputs))(jax.random.key(0))

  def init(self, module, **outputs):
    """Variables of the module's shapes, drawn with numpy.

    Compiling one random draw per weight takes seconds for the larger methods.
    """
    variables = self.shapes(module, **outputs)
    rng = np.random.default_rng(3)

    count = np.bincount(self.train_labels, minlength=5).astype(np.int32)
    known = {
      "order": np.argsort(self.train_labels, kind="stable").astype(np.int32),
      "class_count": count,
      "class_start": (np.cumsum(count) - count).astype(np.int32),
    }

    def draw(path, x):
      name = path[-1].key
      if name in known:
        return jnp.asarray(known[name])
      value = np.full(x.shape, {"scale": 1, "var": 1}.get(name, 0), x.dtype)
      if name == "kernel":
        value = rng.standard_normal(x.shape, x.dtype)
        value /= np.sqrt(np.prod(x.shape[:-1]))
      elif name.startswith("bank"):
        value = rng.uniform(-0.6, 0.6, x.shape).astype(x.dtype)
      elif name == "bias":
        value = 0.1 * rng.standard_normal(x.shape, x.dtype)
      return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(draw, variables)

  def apply(
    self,
    module,
    variables,
    *,
    student=None,
    teacher=None,
    batch=None,
    train=True,
    seed=1,
  ):
    """(DistillOutput, moved collections) of one call, compiled."""

    def call(key, variables, student, teacher, batch):
      return module.apply(
        variables,
        student,
        (teacher,),
        batch,
        teacher_heads=(self.classifier,),
        step=0,
        epoch=1,
        train=train,
        method="distill",
        rngs={"distiller": key} if train else {},
        mutable=["batch_stats", "memory"] if train else [],
      )

    signature = (module, train)
    if signature not in self.compiled:
      self.compiled[signature] = quick_jit(call)
    return self.compiled[signature](
      jax.random.key(seed),
      variables,
      student or self.student,
      teacher or self.teacher,
      batch or self.batch,
    )

  def term(self, method, **fields):
    """The method's own term, averaged, for its initial weights."""
    module = self.create(method, **fields)
    output, _ = self.apply(module, self.init(module))
    return float(jnp.mean(output.terms[method]))


@pytest.fixture(scope="session")
def make_output():
  """tiny_output(seed, batch=, classes=, widths=, sizes=)."""
  return tiny_output


@pytest.fixture(scope="session")
def tiny():
  return Tiny()
