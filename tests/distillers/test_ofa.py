import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import LossCase, Method, normal

from kd_jax import distillers, losses
from kd_jax.models.layers import ModelOutputs

S, T = 3 * normal(0, 2, 4, 7)
LABELS = np.array([0, 6, 2, 2], np.int32)
# Layers of a convolutional stage's exit in the reference, before the last.
LAYERS = {"1": 5, "2": 4, "3": 3, "4": 3}


def separable(m):
  place = {"depthwise": 0, "pointwise": 1, "bn": 2}[m[3]] + 4 * int(m[4])
  return f"{m[1]}.{m[2]}.op.{place}"


def inside_block(m):
  place = {"qkv": "attn.qkv", "proj": "attn.proj"}.get(m[3], m[3])
  place = f"mlp.{place}" if place.startswith("fc") else place
  return f"{m[1]}.1.{m[2]}.{place}"


METHOD = Method(
  losses={
    "ofa_loss": LossCase(
      (S, T, LABELS),
      kwargs={"temperature": 4.0, "eps": 1.5},
      refused={"temperature": (0.0, -1.0), "eps": (0.5,)},
    )
  },
  fields={"eps": 2.0, "exits": (1,)},
  terms=frozenset({"ce", "kd", "ofa", "ofa_logits"}),
  weights={"ce": 1, "kd": 0, "ofa": 1, "ofa_logits": 1},
  reference=(
    (r"exit(\d)/down(\d)/(depthwise|pointwise|bn)(\d)", separable),
    (r"exit(\d)/conv", r"\1.0"),
    (r"exit(\d)/merge(\d)_norm", r"\1.0.fn.\2.norm"),
    (r"exit(\d)/merge(\d)", r"\1.0.fn.\2.reduction"),
    (r"exit(\d)/block(\d)/(\w+)", inside_block),
    (r"exit(\d)/fc", lambda m: f"{m[1]}.{LAYERS[m[1]]}"),
    (r"exit(\d)/classifier", r"\1.3"),
  ),
)


def test_the_loss(golden_inputs):
  """Of logits alone; the method wants stages too."""
  logits = [golden_inputs.tensor(f"logits_{side}") for side in "st"]
  for _, case in golden_inputs.cases(r"ofa_eps[\d.]+"):
    settings = {n: case[n] for n in ("temperature", "eps")}

    def loss(student, case=case, settings=settings):
      labels = golden_inputs.labels(case)
      return jnp.mean(losses.ofa_loss(student, logits[1], labels, **settings))

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits[0])
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    expected = case["grad"]["logits_s"]
    golden_inputs.assert_gradient(gradient, expected, "ofa")


def compare(inputs, case, fill, features, given, **fields):
  """Value and gradients of the term "ofa" against a golden value."""
  module = distillers.create("ofa", eps=case["eps"], **fields)
  teacher = ModelOutputs(
    inputs.tensor("logits_t"), {"pooled": jnp.zeros((8, 192))}
  )

  def call(function, features, *variables, **more):
    return function(
      *variables,
      ModelOutputs(inputs.tensor("logits_s"), features),
      teacher,
      {"label": inputs.labels(case)},
      **{"teacher_head": None, "step": 0, "epoch": 1, "train": True, **more},
    )

  shapes = jax.eval_shape(
    lambda: call(module.init, features(given), jax.random.key(0))
  )
  variables = fill(shapes)

  def loss(given):
    output, _ = call(
      module.apply, features(given), variables, mutable=["batch_stats"]
    )
    return jnp.mean(output.terms["ofa"])

  value, gradients = jax.jit(jax.value_and_grad(loss))(given)
  np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
  return gradients


def test_exits_of_convolutional_stages(golden_inputs, fill_distiller):
  inputs = golden_inputs
  ((_, case),) = inputs.cases("ofa_cnn_heads")

  def fill(shapes):
    variables, used = fill_distiller("ofa", shapes, "ofa.", inputs.seed)
    expected = case["modules"]["ofa"]
    assert used == {
      f"ofa.{n}": shape for n, shape in expected if "num_batches" not in n
    }
    return variables

  given = {name: inputs.tensor(name) for name in case["student"]}
  gradients = compare(
    *(inputs, case, fill),
    lambda given: {f"stage{name[7]}": x for name, x in given.items()},
    given,
  )
  for name, gradient in gradients.items():
    inputs.assert_gradient(gradient, case["grad"][name], name)


@pytest.mark.parametrize("stage", [1, 4])
def test_exits_of_tokens(golden_inputs, fill_distiller, stage):
  inputs = golden_inputs
  ((_, case),) = inputs.cases(f"ofa_vit_head{stage}")

  def fill(shapes):
    variables, used = fill_distiller("ofa", shapes, "ofa_vit.", inputs.seed)
    assert used == {f"ofa_vit.{n}": s for n, s in case["modules"]["ofa_vit"]}
    return variables

  def features(tokens):
    grid = tokens[:, 1:].reshape(8, 14, 14, 192)
    found = {f"stage{i}": grid for i in range(1, 5)}
    return {**found, "block1": grid, f"class_token{stage}": tokens[:, 0]}

  tokens = inputs.tensor("ofa_tokens_s")
  gradient = compare(inputs, case, fill, features, tokens, exits=(stage,))
  inputs.assert_gradient(gradient, case["grad"]["ofa_tokens_s"], "tokens")


def test_bad_input(tiny):
  with pytest.raises(ValueError, match=r"student's 2 stages.*got \(1, 3\)"):
    tiny.shapes(tiny.create("ofa", exits=(1, 3)))
  student = tiny.student
  grid = jnp.ones((8, 15, 15, 8))
  for bad, facts in (
    (grid, "that halves, got 15x15"),
    (grid[:, :7, :7, :6], "4 heads divide, got 6"),
  ):
    tokens = {"stage1": bad, "block1": bad}
    with pytest.raises(ValueError, match=facts):
      tiny.shapes(tiny.create("ofa"), student=student._replace(features=tokens))
