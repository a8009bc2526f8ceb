"""PyTorch's side does the same work as kd_jax's, from the same weights."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import jax_side, step, torch_networks, torch_side
from benchmarks import work as work_lib
from kd_jax import data, models
from kd_jax.data import augment
from kd_jax.interop import pytorch

TINY = work_lib.Work(
  teacher="_tiny_wide",
  student="_tiny",
  method="kd",
  batch=8,
  image_size=16,
  classes=10,
  examples=32,
  pad=0,
  flip=False,
)


def tiny(method: str, **changes) -> work_lib.Work:
  fields = {"k": 5} if method == "crd" else {}
  return dataclasses.replace(TINY, method=method, fields=fields, **changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("weights")
  work_lib.prepare([tiny(method) for method in work_lib.COMMON], folder)
  return folder


def torch_losses(work: work_lib.Work, weights, steps: int) -> list[float]:
  """Of the eager side's step, on the batches that kd_jax's pipeline has."""
  source = work.source
  eager = torch_side.Eager(work, weights, workers=0)
  pipeline = data.create(
    "device", source, batch_size=work.batch, seed=work_lib.SEED
  )
  found = []
  for _ in range(steps):
    index = np.array(pipeline.next_chunk(1)["index"][0])
    images = augment.normalize(
      jnp.asarray(source.images[index]), source.mean, source.std
    )
    batch = (
      torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))),
      torch.from_numpy(source.labels[index].astype(np.int64)),
      torch.from_numpy(index.astype(np.int64)),
    )
    found.append(eager.step(*batch)[0])
  return found


# SemCKD's attention amplifies rounding: only its first loss is compared.
@pytest.mark.parametrize(
  ("method", "steps"),
  [
    *[("none", 4), ("kd", 4), ("simkd", 4)],
    pytest.param("semckd", 1, marks=pytest.mark.full),
  ],
)
def test_sides_have_the_same_losses(method, steps, weights):
  work = tiny(method)
  ours = jax_side.Program(work, weights).run(steps)
  theirs = torch_losses(work, weights, steps)
  np.testing.assert_allclose(theirs, ours, rtol=1e-4)
  assert len(set(ours)) == steps  # it moves


def test_crd_has_the_same_losses_of_the_same_negatives(weights):
  """The second and third step see the banks that those before have moved."""
  work = tiny("crd")
  source = work.source
  program = jax_side.Program(work, weights)
  eager = torch_side.Eager(work, weights, workers=0)
  step_ = jax.jit(program._alone)
  state, rng = program._state, np.random.default_rng(0)
  images = augment.normalize(
    jnp.asarray(source.images), source.mean, source.std
  )
  images = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))
  for _ in range(3):
    index = rng.choice(work.examples, work.batch, replace=False)
    negatives = rng.integers(work.examples, size=(work.batch, 5))
    batch = {
      "image": source.images[index],
      "label": source.labels[index],
      "index": index.astype(np.int32),
      "mask": np.ones(work.batch, bool),
      "negatives": negatives.astype(np.int32),
    }
    variables, seeds = program._constants
    state, sums = step_(state, variables, batch, seeds)
    labels = source.labels[index].astype(np.int64)
    theirs, _ = eager.step(
      images[index], *map(torch.from_numpy, (labels, index, negatives))
    )
    ours = float(sums["loss"]) / work.batch
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)


def test_crd_contrasts_the_same_whichever_way(weights):
  """All negatives are drawn, so that it does not matter which way."""
  work = tiny("crd")
  torch.manual_seed(0)
  method = torch_side.Trainer(work, weights).method
  assert (method.bank_s != 0).any() and (method.class_count == 3).any()
  labels = torch.from_numpy(work.source.labels[:8].astype(np.int64))
  drawn = method._drawn(labels)
  assert drawn.shape == (8, 5)
  others = torch.from_numpy(work.source.labels)[drawn]
  assert (others != labels[:, None]).all()
  v = torch.nn.functional.normalize(torch.randn(8, 128))
  whole, gathered = (
    method._scores(v, method.bank_t, drawn, way) for way in (True, False)
  )
  torch.testing.assert_close(whole, gathered)
  before = method.bank_s.clone()
  index = torch.arange(8)
  method.remember((v, v, torch.tensor(2.0), torch.tensor(3.0), index))
  assert method.z_s == 2 and method.z_t == 3
  moved = (method.bank_s != before).any(dim=1)
  assert moved[:8].all() and not moved[8:].any()


def test_compiled_step_copies_no_constants(weights, monkeypatch):
  """CUDA graphs copy each input of another address: the whole set."""
  seen = []

  def backend(graph, inputs):
    del inputs
    for node in graph.graph.find_nodes(op="placeholder"):
      kind = node.meta["tensor_dict"].get("_dynamo_static_input_type")
      if kind is None:
        seen.append(node.meta["example_value"].shape)
    return graph

  compile_ = torch.compile
  monkeypatch.setattr(
    torch, "compile", lambda f, mode: compile_(f, backend=backend)
  )
  work = tiny("simkd", pad=4, flip=True)
  (loss,) = torch_side.Compiled(work, weights).run(1)
  assert np.isfinite(loss)
  assert seen == [(work.batch,)]  # of the inputs, the indices alone


@pytest.mark.parametrize("pair", [*work_lib.PAIRS, "ResNet50:ResNet18"])
def test_networks_have_the_same_tensors(pair):
  for name in pair.split(":"):
    expected = pytorch.tensor_shapes(
      name, 100, models.entry(name).weight_names[0]
    )
    with torch.device("meta"):
      found = torch_networks.create(name, 100).state_dict()
    counters = {n for n in found if n.endswith("num_batches_tracked")}
    shapes = {n: tuple(t.shape) for n, t in found.items() if n not in counters}
    assert shapes == dict(expected), name


def test_another_network_is_noticed(weights, tmp_path):
  work = tiny("none")
  name = work.network_file("student")
  arrays = work_lib.read(weights / name)
  arrays["layer1.0.conv1.weight"] *= 1.01
  np.savez(tmp_path / name, **arrays)
  with pytest.raises(ValueError, match=r"_tiny: expected the logits of kd_jax"):
    torch_networks.load(work, "student", tmp_path)


def test_refusals_say_what_to_do(weights):
  with pytest.raises(ValueError, match="method: expected one of none, kd"):
    tiny("nothing")
  with pytest.raises(ValueError, match=r"batch: expected 1 to 32 \(--examples"):
    tiny("kd", batch=64)
  with pytest.raises(ValueError, match=r"'wrn_16_1' on PyTorch's side.*jax"):
    torch_networks.create("wrn_16_1", 10)
  with pytest.raises(ValueError, match=r"methods none, kd,.* got at\. Leave"):
    torch_side.Trainer(tiny("at"), weights)
  with pytest.raises(ValueError, match="divisor of the 4 steps of an epoch"):
    jax_side.Program(tiny("kd"), weights, steps_per_dispatch=3)
  with pytest.raises(SystemExit, match="expected TEACHER:STUDENT, got 'vgg8'"):
    step.make_cells(step.parse(["--pairs", "vgg8"]))
