"""Every method against the reference toolboxes' numbers, modules included."""

import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers, losses
from kd_jax.models.layers import ModelOutputs

VALUE, GRADIENT = 1e-5, 1e-4

# Kind in the fixture -> (method, fields read from the case, the prefix of the
# modules' names).
KINDS = {
  r"hint_layer\d+": (
    "fitnet",
    lambda case: {"hint_layer": f"stage{case['layer']}"},
    lambda case: "regressor.",
  ),
  "attention": ("at", lambda case: {}, None),
  "similarity": ("sp", lambda case: {}, None),
  "vid": ("vid", lambda case: {}, lambda case: "vid"),
  "semckd": ("semckd", lambda case: {}, lambda case: "self_attention."),
  "srrl": ("srrl", lambda case: {}, lambda case: "srrl."),
  r"simkd_f\d+": (
    "simkd",
    lambda case: {"factor": case["factor"]},
    lambda case: f"simkd{case['factor']}.",
  ),
  "review_kd": ("reviewkd", lambda case: {}, lambda case: "abf"),
}


def nhwc(x):
  return jnp.asarray(x if x.ndim == 2 else x.transpose(0, 2, 3, 1))


def nchw(x):
  x = np.asarray(x)
  return x if x.ndim == 2 else x.transpose(0, 3, 1, 2)


class Fixture:
  """Inputs of the golden losses, by the names of the fixture."""

  def __init__(self, data, rebuild):
    self.data, self.rebuild = data, rebuild
    self.seed, self.batch = data["seed"], data["batch"]
    self.classes = data["cases"]["cross_entropy"].get("num_classes", 100)

  def cases(self, pattern):
    """[(pair or "", case)] of a kind; it must have at least one."""
    found = [
      (name.rpartition("/")[0], case)
      for name, case in self.data["cases"].items()
      if re.fullmatch(pattern, name.rpartition("/")[2])
    ]
    assert found, f"the golden folder has no case {pattern}"
    return found

  def logits(self, side):
    shape = (self.batch, self.classes)
    return jnp.asarray(
      3 * self.rebuild.normal(f"logits_{side}", shape, seed=self.seed)
    )

  def labels(self):
    labels = self.rebuild.integers(
      "labels", self.classes, (self.batch,), seed=self.seed
    )
    return jnp.asarray(labels, jnp.int32)

  def output(self, pair, side):
    shapes = self.data["pairs"][pair][side]
    names = ["stem", *(f"stage{i}" for i in range(1, len(shapes) - 1))]
    features = {}
    for i, (name, shape) in enumerate(zip([*names, "pooled"], shapes)):
      x = self.rebuild.normal(
        f"{pair}/{side}/feat{i}", (self.batch, *shape), seed=self.seed
      )
      features[name] = nhwc(np.maximum(x, 0))
    features["last"] = features[names[-1]]
    return ModelOutputs(self.logits(side), features)

  def classifier(self, case):
    tensors = case.get("modules", {}).get("teacher_fc")
    if tensors is None:
      return None
    fc = {
      leaf: self.rebuild.fill(f"teacher_fc.{leaf}", shape, seed=self.seed)
      for leaf, shape in tensors
    }
    return lambda pooled: pooled @ fc["weight"].T + fc["bias"]


@pytest.fixture(scope="module")
def fixture(golden_losses, rebuild):
  return Fixture(golden_losses, rebuild)


def assert_gradient(rebuild, gradient, expected, context):
  norm = np.linalg.norm(np.asarray(gradient, np.float64).ravel())
  np.testing.assert_allclose(
    norm, expected["norm"], rtol=GRADIENT, err_msg=context
  )
  probe = rebuild.probe(nchw(gradient), len(expected["probe"]))
  scale = np.abs(expected["probe"]).max()
  np.testing.assert_allclose(
    probe,
    expected["probe"],
    rtol=GRADIENT,
    atol=GRADIENT * scale,
    err_msg=context,
  )


def feature_name(output, key):
  """ "feat2" -> "stage2"; the last one is "pooled"."""
  number, stages = int(key.removeprefix("feat")), len(output.stages())
  if number > stages:
    return "pooled"
  return "stem" if number == 0 else f"stage{number}"


@pytest.mark.parametrize("pattern", ["cross_entropy", r"kd_T[\d.]+"])
def test_logit_losses(fixture, rebuild, quick, pattern):
  for _, case in fixture.cases(pattern):

    def mean_loss(logits, case=case):
      if "temperature" in case:
        return jnp.mean(
          losses.kd_loss(
            logits, fixture.logits("t"), temperature=case["temperature"]
          )
        )
      return jnp.mean(losses.cross_entropy_loss(logits, fixture.labels()))

    value, gradient = quick(jax.value_and_grad(mean_loss))(fixture.logits("s"))
    np.testing.assert_allclose(value, case["loss"], rtol=VALUE)
    assert_gradient(rebuild, gradient, case["grad"]["logits_s"], pattern)


@pytest.mark.parametrize("pattern", KINDS)
def test_method(fixture, rebuild, fill_distiller, quick, pattern):
  method, fields, prefix = KINDS[pattern]
  for pair, case in fixture.cases(pattern):
    student, teacher = fixture.output(pair, "s"), fixture.output(pair, "t")
    classifier = fixture.classifier(case)
    batch = {"label": fixture.labels()}
    module = distillers.create(method, **fields(case))
    call = {"teacher_head": classifier, "step": 0, "epoch": 1}
    variables = jax.eval_shape(
      lambda module=module, s=student, t=teacher, b=batch, c=call: module.init(
        jax.random.key(0), s, t, b, train=True, **c
      )
    )
    if prefix is not None:
      variables, used = fill_distiller(
        method, variables, prefix(case), fixture.seed
      )
      expected = {
        f"{group}.{name}": shape
        for group, tensors in case["modules"].items()
        for name, shape in tensors
        if group != "teacher_fc"
        and "num_batches" not in name
        and name != "log_scale"
      }
      if method == "semckd":  # the reference's unused second sub-network
        expected = {
          name: shape
          for name, shape in expected.items()
          if not re.search(r"(query|key)_\d+\.regressor", name)
        }
      assert used == expected
    varying = [feature_name(student, key) for key in case["grad"]]

    @quick
    def value_and_grad(
      inputs,
      variables,
      teacher,
      module=module,
      student=student,
      batch=batch,
      call=call,
      method=method,
    ):
      def loss(inputs):
        features = {**student.features, **inputs}
        last = f"stage{len(student.stages())}"
        features["last"] = features[last]
        output, _ = module.apply(
          variables,
          ModelOutputs(student.logits, features),
          teacher,
          batch,
          train=True,
          mutable=["batch_stats"],
          **call,
        )
        value = jnp.mean(output.terms[method])
        return value, output.logits

      return jax.value_and_grad(loss, has_aux=True)(inputs)

    inputs = {name: student.features[name] for name in varying}
    (value, logits), gradients = value_and_grad(inputs, variables, teacher)
    context = f"{pair} {pattern} {case.get('layer', case.get('factor', ''))}"
    np.testing.assert_allclose(value, case["loss"], rtol=VALUE, err_msg=context)
    for key, name in zip(case["grad"], varying):
      assert_gradient(
        rebuild, gradients[name], case["grad"][key], f"{context} {key}"
      )
    if "logits_probe" in case:
      expected = np.asarray(case["logits_probe"])
      np.testing.assert_allclose(
        rebuild.probe(logits, len(expected)),
        expected,
        rtol=GRADIENT,
        atol=VALUE * np.abs(expected).max(),
        err_msg=context,
      )


def test_crd(fixture, rebuild, fill_distiller, quick):
  by_pair = {}
  for pair, case in fixture.cases(r"crd_call\d+"):
    by_pair.setdefault(pair, []).append(case)
  for pair, calls in by_pair.items():
    first = calls[0]
    n, k = first["n_data"], first["k"]
    student, teacher = fixture.output(pair, "s"), fixture.output(pair, "t")
    module = distillers.create(
      "crd",
      k=k,
      nce_temperature=first["temperature"],
      momentum=first["momentum"],
    )
    call = {"teacher_head": None, "step": 0, "epoch": 1, "train": True}
    batch = {
      "label": fixture.labels(),
      "train_labels": jnp.arange(n) % fixture.classes,
    }
    variables = jax.jit(
      lambda key, module=module, s=student, t=teacher, b=batch, c=call: (
        module.init(key, s, t, b, **c)
      )
    )(jax.random.key(0))
    variables, _ = fill_distiller("crd", variables, "", fixture.seed)
    memory = dict(variables["memory"])
    start = {}
    for bank, name in (("bank_s", "memory_v1"), ("bank_t", "memory_v2")):
      rows = rebuild.normal(name, memory[bank].shape, seed=fixture.seed)
      rows /= np.linalg.norm(rows, axis=1, keepdims=True)
      memory[bank] = start[bank] = jnp.asarray(rows)

    @quick
    def value_and_grad(
      pooled,
      params,
      memory,
      batch,
      student=student,
      teacher=teacher,
      module=module,
      call=call,
    ):
      def loss(pooled):
        features = {**student.features, "pooled": pooled}
        output, moved = module.apply(
          {"params": params, "memory": memory},
          ModelOutputs(student.logits, features),
          teacher,
          batch,
          mutable=["memory"],
          **call,
        )
        return jnp.mean(output.terms["crd"]), moved["memory"]

      return jax.value_and_grad(loss, has_aux=True)(pooled)

    for number, case in enumerate(calls):
      negatives = rebuild.integers(
        f"negatives{number}", n, (fixture.batch, k), seed=fixture.seed
      )
      batch = {
        "label": fixture.labels(),
        "index": jnp.asarray(case["index"], jnp.int32),
        "negatives": jnp.asarray(negatives, jnp.int32),
      }
      (value, memory), gradient = value_and_grad(
        student.features["pooled"], variables["params"], memory, batch
      )
      np.testing.assert_allclose(value, case["loss"], rtol=VALUE)
      key = next(iter(case["grad"]))
      assert_gradient(rebuild, gradient, case["grad"][key], f"{pair} {number}")
      np.testing.assert_allclose(memory["z_s"], case["z_v1"], rtol=VALUE)
      np.testing.assert_allclose(memory["z_t"], case["z_v2"], rtol=VALUE)
      for bank, name in (("bank_s", "memory_v1"), ("bank_t", "memory_v2")):
        expected = case[f"{name}_probe"]
        np.testing.assert_allclose(
          rebuild.probe(memory[bank], len(expected)),
          expected,
          rtol=GRADIENT,
          atol=VALUE,
        )
      change = np.linalg.norm(memory["bank_s"] - start["bank_s"])
      np.testing.assert_allclose(
        change, case["memory_v1_norm_change"], rtol=GRADIENT
      )
    assert flax.core.unfreeze(memory).keys() == variables["memory"].keys()
