"""Every method against the reference toolboxes' numbers, modules included."""

import re

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import pytest

from kd_jax import distillers

GRADIENT = 1e-4
GOLDEN = [
  pytest.param(name, golden, id=f"{name}-{golden.pattern}")
  for name, method in method_cases.methods().items()
  for golden in method.golden
]


def input_name(pair, key, output):
  """ "feat2" -> "stage2"; the last feature is "pooled"; "" for the logits."""
  key = key.removeprefix(f"{pair}/s/")
  if key == "logits_s":
    return ""
  if key.startswith("pre"):
    return preactivation(key)
  number = int(key.removeprefix("feat"))
  if number > len(output.stages()):
    return "pooled"
  return f"stage{number}" if number else "stem"


def preactivation(key):
  """ "pre0" -> "stage1_preact"."""
  return f"stage{int(key.removeprefix('pre')) + 1}_preact"


def network(inputs, pair, case, side):
  """A network's output, with the pre-activations that a case names."""
  output = inputs.output(pair, side)
  # The older cases name the inputs that have a gradient, without the pair.
  names = case.get(
    {"s": "student", "t": "teacher"}[side],
    [f"{pair}/{side}/{key}" for key in case["grad"]],
  )
  more = {
    preactivation(name.rpartition("/")[2]): inputs.tensor(name)
    for name in names
    if "/pre" in name
  }
  return output._replace(features={**output.features, **more})


def classifier(inputs, case, side):
  """The classifier of a case's network; it need not have one."""
  shapes = dict(case.get("modules", {}).get(f"{side}_fc", ()))
  for entry in case.get(side, ()):  # such as "teacher_fc.weight:100,256"
    name, _, shape = entry.partition(":")
    if name.startswith(f"{side}_fc."):
      leaf = name.removeprefix(f"{side}_fc.")
      shapes[leaf] = [int(n) for n in shape.split(",")]
  fc = {
    leaf: inputs.rebuild.fill(f"{side}_fc.{leaf}", shape, seed=inputs.seed)
    for leaf, shape in shapes.items()
  }

  def head(pooled):
    logits = pooled @ fc["weight"].T
    if "bias" not in fc:
      return logits
    return logits + jnp.expand_dims(fc["bias"], range(pooled.ndim - 1))

  return head


def expected_modules(case, unused):
  return {
    f"{group}.{name}": shape
    for group, tensors in case.get("modules", {}).items()
    for name, shape in tensors
    if group != "teacher_fc"
    and "num_batches" not in name
    and name != "log_scale"
    and not re.search(unused, name)
  }


@pytest.mark.parametrize(("method", "kind"), GOLDEN)
def test_method(golden_inputs, fill_distiller, method, kind):
  inputs = golden_inputs
  for pair, case in inputs.cases(kind.pattern):
    student, teacher = (network(inputs, pair, case, side) for side in "st")
    module = distillers.create(method, **kind.fields(case))
    given = {
      "batch": {"label": inputs.labels(case), **kind.batch(inputs, case)},
      "teacher_heads": (classifier(inputs, case, "teacher"),),
      "student_head": classifier(inputs, case, "student"),
      **{"step": 0, "epoch": 1, "train": True, "method": "distill"},
    }
    variables = jax.eval_shape(
      lambda m=module, s=student, t=teacher, g=given: m.init(
        jax.random.key(0), s, (t,), **g
      )
    )
    variables, used = fill_distiller(
      method, variables, kind.prefix(case), inputs.seed
    )
    assert used == expected_modules(case, kind.unused)
    if kind.constants:
      constants = kind.constants(inputs, case)
      assert variables["constants"].keys() == constants.keys()
      variables["constants"] = constants

    weights = kind.weights(case) if kind.weights else {method: 1}

    def loss(
      varied,
      variables,
      teacher,
      module=module,
      student=student,
      given=given,
      weights=weights,
    ):
      features = {**student.features, **varied}
      if student.features:
        features["last"] = features[f"stage{len(student.stages())}"]
      output, _ = module.apply(
        variables,
        student._replace(
          logits=features.pop("", student.logits), features=features
        ),
        (teacher,),
        mutable=["batch_stats"],
        **given,
      )
      value = sum(w * jnp.mean(output.terms[n]) for n, w in weights.items())
      return value, output.logits

    names = {
      key: input_name(pair, key, student)
      for key in case["grad"]  # others are a module's own
      if re.fullmatch(r"logits_s|(.*/s/)?(feat|pre)\d", key)
    }
    varied = {
      n: student.features.get(n, student.logits) for n in names.values()
    }
    (value, logits), gradients = jax.jit(
      jax.value_and_grad(loss, has_aux=True)
    )(varied, variables, teacher)
    context = f"{pair} {kind.pattern} {kind.fields(case)}"
    np.testing.assert_allclose(
      value, case["loss"], rtol=kind.tolerance, err_msg=context
    )
    for key, name in names.items():
      inputs.assert_gradient(
        gradients[name], case["grad"][key], f"{context} {key}"
      )
    if "logits_probe" in case:
      expected = np.asarray(case["logits_probe"])
      np.testing.assert_allclose(
        inputs.rebuild.probe(logits, len(expected)),
        expected,
        rtol=GRADIENT,
        atol=kind.tolerance * np.abs(expected).max(),
        err_msg=context,
      )
