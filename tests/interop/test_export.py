"""Exports: whole, equal to the run, readable by plain Orbax, never half."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kd_jax import data, distillers, models, storage
from kd_jax.data import augment
from kd_jax.interop import card as card_lib
from kd_jax.interop import model as model_lib
from kd_jax.interop import store
from kd_jax.models import base
from kd_jax.runs import finished
from kd_jax.runs import workdir as workdir_lib
from kd_jax.training import loss


def arrays(tree):
  return {k: np.asarray(v) for k, v in storage.flatten(tree).items()}


def assert_equal(ours, theirs):
  ours, theirs = arrays(ours), arrays(theirs)
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    assert value.dtype == theirs[name].dtype
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def state_of(workdir):
  """The newest checkpoint's arrays."""
  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  return restore(newest / "state")


def variables_of(state, part):
  rest = state["collections"].get(part, {})
  return {"params": state["params"].get(part, {}), **rest}


def restore(path):
  """The arrays of a run's checkpoint, by Orbax alone."""
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(path).item_metadata.tree
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    return reader.restore(path, restore_args=arguments)


@pytest.fixture
def simkd(smoke_run):
  return smoke_run("simkd_cifar")


@pytest.fixture
def kd(smoke_run):
  return smoke_run("kd_cifar")


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (4, 16, 16, 3), np.uint8)


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


def test_simkd_student_is_complete_and_equal_to_the_run(
  simkd, tmp_path, images
):
  finished.export_run(simkd, tmp_path / "export", weights="last")
  state = state_of(simkd)
  teacher = store.load(workdir_lib.result(simkd)["teacher"]["checkpoint"])
  student, distiller = (
    variables_of(state, p) for p in ("student", "distiller")
  )
  expected = {
    "params": {
      "student": student["params"],
      "distiller": distiller["params"],
      "classifier": teacher.variables["params"]["fc"],
    },
    "batch_stats": {
      "student": student["batch_stats"],
      "distiller": distiller["batch_stats"],
    },
  }
  model = store.load(tmp_path / "export")
  assert_equal(model.variables, expected)
  # The projector has learnt and has statistics of its own.
  assert model.variables["batch_stats"]["distiller"]["projector"]
  # It is the projector and not the student's own classifier that predicts.
  logits = model.logits(images)
  assert logits.dtype == jnp.float32
  wanted = evaluation_logits(simkd, state, images)
  np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)
  params = model.variables["params"]
  moved = jax.tree.map(lambda x: x + 1, params["classifier"])
  shifted = model_lib.Model(
    model.card,
    {**model.variables, "params": {**params, "classifier": moved}},
  )
  assert np.abs(shifted.logits(images) - wanted).max() > 0.5


def test_kd_student_is_the_student_alone(kd, tmp_path, images):
  finished.export_run(kd, tmp_path / "export", weights="last")
  model = store.load(tmp_path / "export")
  state = state_of(kd)
  assert_equal(model.variables, variables_of(state, "student"))
  np.testing.assert_allclose(
    model.logits(images),
    evaluation_logits(kd, state, images),
    rtol=1e-6,
    atol=1e-6,
  )


def test_a_run_exports_its_best_weights(simkd):
  (best,) = (simkd / "best").iterdir()
  kept = restore(best / "state")
  model = store.load(simkd)  # a finished run's workdir names its export
  assert_equal(model.variables, kept)
  assert model.card["test"] == workdir_lib.result(simkd)["best"]


def test_card(simkd, kd):
  card = card_lib.read_card(simkd / "export")
  assert card["format"] == "kd_jax export 2"
  assert card["architecture"] == "resnet8"
  assert card["num_classes"] == 10
  assert card["class_names"] == [f"class {i}" for i in range(10)]
  assert card["image_shape"] == [16, 16, 3]
  assert card["method"] == "simkd"
  assert card["trained_on"] == "synthetic"
  assert card["data_options"] == {"image_size": 16, "num_examples": 64}
  assert card["head"]["distiller"] == {"name": "simkd", "factor": 2}
  assert card["head"]["teachers"] == ["resnet8x2"]
  assert card["normalization"]["mean"] == pytest.approx([127 / 255] * 3)
  result = workdir_lib.result(simkd)
  classifier = 128 * 10 + 10  # of resnet8x2
  assert card["parameters"] == (
    result["parameters"] + result["distiller_parameters"] + classifier
  )
  card = card_lib.read_card(kd / "export")
  assert card["head"] is None
  assert card["parameters"] == workdir_lib.result(kd)["parameters"]
  assert card["parameters"] == base.count_parameters(
    store.load(kd).variables["params"]
  )


@pytest.mark.parametrize(
  "checkpointer", [ocp.PyTreeCheckpointer, ocp.StandardCheckpointer]
)
def test_plain_orbax_reads_it(simkd, checkpointer):
  with checkpointer() as reader:
    read = reader.restore(simkd / "export" / "checkpoint")
  assert_equal(read, store.load(simkd).variables)


def test_existing_folders_are_not_overwritten(kd, simkd, tmp_path):
  to = tmp_path / "export"
  finished.export_run(kd, to)
  before = contents(to)
  finished.export_run(kd, to)  # the same again changes nothing
  assert contents(to) == before
  with pytest.raises(
    ValueError,
    match=r"expected a folder that is empty or not there, got one that holds"
    " something. Nothing was changed; give another --to",
  ):
    finished.export_run(simkd, to)
  assert contents(to) == before
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.txt").write_text("years")
  with pytest.raises(ValueError, match="Nothing was changed"):
    finished.export_run(kd, other)
  assert contents(other) == {other / "thesis.txt": b"years"}
  with pytest.raises(ValueError, match="Nothing was changed"):
    finished.export_run(kd, other / "thesis.txt")
  empty = tmp_path / "empty"
  empty.mkdir()
  finished.export_run(kd, empty)
  assert_equal(store.load(empty).variables, store.load(to).variables)


def test_a_failed_export_leaves_nothing(kd, tmp_path, monkeypatch):
  def fail(*_):
    raise OSError("No space left on device")

  monkeypatch.setattr(store.checkpoint, "write_json", fail)
  with pytest.raises(OSError, match="No space left"):
    finished.export_run(kd, tmp_path / "export")
  assert list(tmp_path.iterdir()) == []


def test_unfinished_run_can_be_exported_but_not_be_loaded(kd, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(kd, run, ignore=shutil.ignore_patterns("export", "result*"))
  before = contents(run)
  with pytest.raises(
    ValueError,
    match=r"holds a run that is not finished. Finish it with the command that"
    " began it, or export what it has with python -m kd_jax export --workdir",
  ):
    store.load(run)
  finished.export_run(run, tmp_path / "export")
  assert_equal(
    store.load(tmp_path / "export").variables, store.load(kd).variables
  )
  assert contents(run) == before  # another process may be writing it


@pytest.mark.parametrize(
  ("missing", "weights", "words"),
  [
    ("best", "best", "best holds no weights yet: .* come to the first evalu"),
    ("checkpoints", "last", "holds no weights yet: .* the first checkpoint"),
    ("config.json", "best", "expected the workdir of a run, got a folder with"),
  ],
)
def test_run_without_weights(kd, tmp_path, missing, weights, words):
  run = tmp_path / "run"
  shutil.copytree(kd, run, ignore=shutil.ignore_patterns(missing))
  with pytest.raises(ValueError, match=words):
    finished.export_run(run, tmp_path / "export", weights=weights)
  assert not (tmp_path / "export").exists()


def damage(folder, how):
  checkpoint = folder / "checkpoint"
  if how == "no metadata":
    (checkpoint / "_METADATA").unlink()
  elif how == "no arrays":
    shutil.rmtree(checkpoint)
  else:
    largest = max(checkpoint.rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    half = len(content) // 2
    if how == "cut short":
      content = content[:half]
    else:
      content[half] ^= 0x10
    largest.write_bytes(content)


@pytest.mark.parametrize(
  "how", ["no metadata", "no arrays", "cut short", "one bit"]
)
def test_damaged_arrays(kd, tmp_path, how):
  shutil.copytree(kd / "export", tmp_path / "export")
  damage(tmp_path / "export", how)
  with pytest.raises(
    ValueError,
    match=r"expected the files that model\.json was written for, got others"
    r" \(their sha256 differs\): .* Export or copy the model again",
  ):
    store.load(tmp_path / "export")


@pytest.mark.parametrize(
  ("card", "words"),
  [
    ('{"format": "kd_jax exp', "expected JSON, got a file that ends or breaks"),
    ('{"format": "kd_jax export 99"}', "expected an export, a folder with"),
    ("[1]", "expected an export, a folder with"),
  ],
)
def test_damaged_card(kd, tmp_path, card, words):
  shutil.copytree(kd / "export", tmp_path / "export")
  (tmp_path / "export" / "model.json").write_text(card)
  with pytest.raises(ValueError, match=words):
    store.load(tmp_path / "export")


def test_command_line(simkd, tmp_path, run_main, capsys):
  to = tmp_path / "a" / "b"
  arguments = ("--workdir", simkd, "--to", to)
  assert run_main(store, *arguments, "--weights", "last") == 0
  printed = capsys.readouterr().out
  parameters = json.loads((to / "model.json").read_text())["parameters"]
  assert printed == (
    f"{to}: resnet8 with the classifier of resnet8x2, 10 classes,"
    f" {parameters:,} parameters\n"
  )
  assert_equal(
    store.load(to).variables["params"]["student"],
    variables_of(state_of(simkd), "student")["params"],
  )
  assert card_lib.read_card(to)["test"] == workdir_lib.result(simkd)["final"]


def test_command_line_errors(tmp_path, run_main, capsys):
  to = tmp_path / "export"
  assert run_main(store, "--workdir", tmp_path / "x", "--to", to) == 2
  assert "expected the workdir of a run" in capsys.readouterr().err
  assert run_main(store, "--workdir", tmp_path) == 2
  assert "the following arguments are required: --to" in capsys.readouterr().err
  assert not to.exists()
