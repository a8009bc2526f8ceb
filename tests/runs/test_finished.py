"""Exports of runs: complete, equal to the run, from any of its weights."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import base as base_config
from kd_jax import data, distillers, models, storage
from kd_jax.data import augment
from kd_jax.interop import card as card_lib
from kd_jax.interop import model as model_lib
from kd_jax.interop import store
from kd_jax.models import base
from kd_jax.runs import finished, train
from kd_jax.runs import workdir as workdir_lib
from kd_jax.training import loss


def restore(path):
  """The arrays of a run's checkpoint, by Orbax alone."""
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(path).item_metadata.tree
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    return reader.restore(path, restore_args=arguments)


def newest_state(workdir):
  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  return restore(newest / "state")


def variables_of(state, part):
  rest = state["collections"].get(part, {})
  return {"params": state["params"].get(part, {}), **rest}


def assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def simkd(smoke_run):
  return smoke_run("simkd_cifar")


@pytest.fixture
def kd(smoke_run):
  return smoke_run("kd_cifar")


def evaluation_logits(workdir, state, images):
  """What the run's own evaluation computes: the whole teacher included."""
  config = storage.read_json(workdir / "config.json")
  teacher = models.create(config["teacher"]["name"], 10)
  checkpoint = workdir_lib.result(workdir)["teacher"]["checkpoint"]
  teacher_variables = store.load(checkpoint).variables
  student = models.create(config["student"]["name"], 10)
  fields = config["distiller"]
  distiller = distillers.create(fields.pop("name"), **fields)
  source = data.load("synthetic", split="train", num_examples=64)

  @jax.jit
  def run(images):
    x = augment.normalize(images, mean=source.mean, std=source.std)
    outputs, heads = loss.run_teachers((teacher,), (teacher_variables,), x)
    return distiller.apply(
      variables_of(state, "distiller"),
      student.apply(variables_of(state, "student"), x, train=False),
      outputs,
      {"label": jnp.zeros(len(images), jnp.int32)},
      teacher_heads=heads,
      step=0,
      epoch=1,
      train=False,
      method="distill",
    ).logits

  return run(images)


@pytest.mark.parametrize("method", ["simkd", "kd"])
def test_the_last_weights(method, simkd, kd, tmp_path):
  run = {"simkd": simkd, "kd": kd}[method]
  finished.export_run(run, tmp_path / "export", weights="last")
  state, model = newest_state(run), store.load(tmp_path / "export")
  expected = student = variables_of(state, "student")
  if method == "simkd":
    teacher = store.load(workdir_lib.result(run)["teacher"]["checkpoint"])
    parts = {"student": student, "distiller": variables_of(state, "distiller")}
    expected = {
      kind: {name: part[kind] for name, part in parts.items()}
      for kind in ("params", "batch_stats")
    }
    expected["params"]["classifier"] = teacher.variables["params"]["fc"]
  assert_equal(model.variables, expected)
  assert model.card["test"] == workdir_lib.result(run)["final"]
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
  logits = model.logits(images)
  assert logits.dtype == jnp.float32
  wanted = evaluation_logits(run, state, images)
  np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)


def test_a_run_exports_its_best_weights(simkd):
  (best,) = (simkd / "best").iterdir()
  model = store.load(simkd)  # a finished run's workdir names its export
  assert_equal(model.variables, restore(best / "state"))
  assert model.card["test"] == workdir_lib.result(simkd)["best"]


def test_card(simkd, kd):
  card = card_lib.read_card(simkd / "export")
  result = workdir_lib.result(simkd)
  classifier = 128 * 10 + 10  # of resnet8x2
  parameters = result["parameters"] + result["distiller_parameters"]
  assert card["head"].pop("teacher_maps") == [[4, 4, 128]]
  assert card == {
    **card,
    "format": "kd_jax export 2",
    "architecture": "resnet8",
    "num_classes": 10,
    "class_names": [f"class {i}" for i in range(10)],
    "image_shape": [16, 16, 3],
    "method": "simkd",
    "trained_on": "synthetic",
    "data_options": {"image_size": 16, "num_examples": 64},
    "resize": None,
    "head": {
      "distiller": {"name": "simkd", "factor": 2},
      "teachers": ["resnet8x2"],
      "weights": [1.0],
    },
    "parameters": parameters + classifier,
  }
  assert card["normalization"]["mean"] == pytest.approx([127 / 255] * 3)
  card = card_lib.read_card(kd / "export")
  assert card["head"] is None
  assert card["parameters"] == base.count_parameters(
    store.load(kd).variables["params"]
  )


def test_an_unfinished_run(kd, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(kd, run, ignore=shutil.ignore_patterns("export", "result*"))
  before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
  finished.export_run(run, tmp_path / "export")
  assert_equal(
    store.load(tmp_path / "export").variables, store.load(kd).variables
  )
  # Another process may be writing it.
  assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
  ("missing", "weights", "words"),
  [
    ("best", "best", "best holds no weights yet"),
    ("checkpoints", "last", "checkpoints holds no weights yet"),
    ("config.json", "best", "expected the workdir of a run"),
  ],
)
def test_a_run_without_weights(kd, tmp_path, missing, weights, words):
  run = tmp_path / "run"
  shutil.copytree(kd, run, ignore=shutil.ignore_patterns(missing))
  with pytest.raises(ValueError, match=words):
    finished.export_run(run, tmp_path / "export", weights=weights)
  assert not (tmp_path / "export").exists()


def test_a_combination_exports_what_predicts(tmp_path):
  """A SimKD student like any other, without the variables of its companion."""
  config = base_config.distillation(
    "simkd+crd",
    weights={"simkd": 1.0, "crd": 0.8},
    factor=4,
    crd={"k": 16, "feat_dim": 8},
  )
  config = base_config.finish(config, "smoke").lock()
  parts = train.prepare(config, tmp_path / "run").parts
  (teacher,) = parts.teachers
  image = jnp.zeros((1, *parts.train_source.image_shape))
  variables = jax.jit(teacher.network.init)(jax.random.key(0), image)
  teachers = (dataclasses.replace(teacher, variables=variables),)
  state = parts.programs.initialize(np.uint32(0), (variables,))
  distiller = parts.programs.distiller
  assert set(state.params["distiller"]) == {"simkd", "crd"}
  card = finished.model_card(
    config,
    source=parts.train_source,
    distiller=distiller,
    teachers=teachers,
    scores={},
  )
  assert card["method"] == "simkd+crd"
  assert card["head"]["distiller"] == {"name": "simkd", "factor": 4}
  exported = finished.inference_variables(state, distiller, teachers)
  model_lib.check_fit(card, exported, "the export")
  rows = [len(parts.train_source.labels), 8]
  banks = jax.tree_util.tree_leaves_with_path(
    state.collections["distiller"]["memory"]
  )
  split = [
    path[-1].key
    for (path, x), spec in zip(
      banks,
      jax.tree.leaves(parts.programs.specs.collections["distiller"]["memory"]),
      strict=True,
    )
    if spec and [*x.shape] == rows
  ]
  assert split == ["bank_s", "bank_t"]
