import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import LossCase, Method, normal

from kd_jax import distillers
from kd_jax.models.layers import ModelOutputs

SHAPE = (4, 3, 3, 5)
LOW_S, LOW_T = ([normal(10 * i + j, *SHAPE) for j in (0, 1)] for i in (0, 1))
MADE, HIGH = normal(2, *SHAPE), normal(3, *SHAPE)
MASK = (normal(4, *SHAPE[:3]) > 0).astype(np.float32)
METHOD = Method(
  losses={
    "vitkd_loss": LossCase(
      (LOW_S, LOW_T, MADE, HIGH, MASK),
      kwargs={"alpha": 0.3, "beta": 0.2, "mask_ratio": 0.5},
      refused={
        "alpha": (-1.0,),
        "beta": (-1.0,),
        "mask_ratio": (0.0, -1.0, 1.5),
      },
      trained=(0, 1, 2, 3),
      minimum=(LOW_T, LOW_T, HIGH, HIGH, MASK),
      huge=1e5,
    )
  },
  fields={"alpha": 1.0, "beta": 1.0, "mask_ratio": 0.25},
  weights={"ce": 1, "kd": 0, "vitkd": 1},
  tokens=True,
)
# Name of a layer in the reference -> in the module.
LAYERS = {
  "align2.0": "low0",
  "align2.1": "low1",
  "align": "high",
  "generation.0": "generate0",
  "generation.2": "generate1",
}


def grid(tokens):
  return tokens.reshape(tokens.shape[0], 14, 14, -1)


def test_golden(golden_inputs, rebuild):
  inputs = golden_inputs
  ((_, case),) = inputs.cases("vitkd")
  params = {}
  for name, shape in case["modules"]["vitkd"]:
    x = rebuild.fill(f"vitkd.{name}", shape, seed=inputs.seed)
    layer, _, leaf = name.rpartition(".")
    if not layer:
      params["mask_token"] = x[0, 0]
    elif leaf == "bias":
      params.setdefault(LAYERS[layer], {})["bias"] = x
    else:
      axes = (2, 3, 1, 0) if x.ndim == 4 else (1, 0)
      params.setdefault(LAYERS[layer], {})["kernel"] = x.transpose(axes)
  module = distillers.create(
    "vitkd", **{n: case[n] for n in ("alpha", "beta", "mask_ratio")}
  )

  def output(side, low, high):
    blocks = {"block1": low[..., 0], "block2": low[..., 1], "block3": high}
    return ModelOutputs(
      inputs.tensor(f"logits_{side}"), {n: grid(x) for n, x in blocks.items()}
    )

  teacher = output("t", *map(inputs.tensor, case["teacher"]))
  batch = {
    "label": inputs.labels(case),
    "noise": grid(inputs.tensor("vitkd_noise"))[..., 0],
  }

  def call(function, variables, batch, low, high):
    return function(
      variables,
      *(output("s", low, high), teacher, batch),
      **{"teacher_head": None, "step": 0, "epoch": 1, "train": True},
    )

  given = [inputs.tensor(name) for name in case["student"]]
  shapes = jax.eval_shape(
    lambda: call(module.init, jax.random.key(0), batch, *given)["params"]
  )
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

  def loss(low, high, batch):
    terms = call(module.apply, {"params": params}, batch, low, high).terms
    return jnp.mean(terms["vitkd"])

  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given, batch)
  np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
  for name, gradient in zip(case["student"], gradients, strict=True):
    inputs.assert_gradient(gradient, case["grad"][name], name)


def test_every_example_has_its_own_mask(tiny_for):
  """By the step's key and its index, whatever else is in the batch."""
  module = distillers.create("vitkd")
  rngs = {"distiller": jax.random.key(3)}

  def mask(index):
    call = jax.jit(
      lambda index: module.apply(
        *({}, {"index": index}, (*index.shape, 4, 4)),
        **{"method": "_mask", "rngs": rngs},
      )
    )
    return np.asarray(call(jnp.asarray(index)))

  masks = mask([3, 5, 8])
  np.testing.assert_array_equal(masks.sum((1, 2)), 8)
  assert len({m.tobytes() for m in masks}) == 3
  np.testing.assert_array_equal(mask([8, 3]), masks[[2, 0]])
  tiny = tiny_for("vitkd")
  with pytest.raises(ValueError, match=r"batch\['index'\].*got only label"):
    tiny.shapes(module, batch={"label": tiny.batch["label"]})


def test_networks_without_tokens_are_refused(tiny, tiny_for):
  module = distillers.create("vitkd")
  facts = "expected two transformers.*block1.*a {} with stem_preact"
  with pytest.raises(ValueError, match=facts.format("student")):
    tiny.shapes(module)
  with pytest.raises(ValueError, match=facts.format("teacher")):
    tiny.shapes(module, student=tiny_for("vitkd").student)
