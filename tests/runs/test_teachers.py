"""Teachers: found, named, checked; files, students, chains and several."""

import copy
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import base
from kd_jax import data, models, storage
from kd_jax.interop import card as card_lib
from kd_jax.interop import model as model_lib
from kd_jax.interop import pytorch, store
from kd_jax.runs import config as config_lib
from kd_jax.runs import identity, teachers, workdir

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source():
  return data.load("synthetic", split="train", num_examples=64, image_size=16)


@pytest.fixture
def kd(smoke_run):
  return smoke_run("kd_cifar")


@pytest.fixture
def simkd(smoke_run):
  return smoke_run("simkd_cifar")


def update(config, fields):
  with config.unlocked():
    for name, value in fields.items():
      config.update_from_flattened_dict({name.replace("__", "."): value})
  return config


def make(**fields):
  config = base.distillation("kd", teacher="", weights={"kd": 1.0})
  return update(config, fields)


def find(source, **fields):
  config = teachers.resolve_teachers(make(**fields))
  return teachers.find(config, source)


def find_one(path, name, source):
  fields = {"teacher__checkpoint": str(path), "teacher__name": name}
  (teacher,) = find(source, **fields)
  return teacher


def assert_same_arrays(ours, theirs):
  ours, theirs = storage.flatten(ours), storage.flatten(theirs)
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


# What a config says.


def test_no_teacher_and_one_to_be_trained(source):
  assert find(source) == ()
  (teacher,) = find(source, teacher__name="resnet8x2")
  network = models.create("resnet8x2", 10)
  assert teacher == teachers.Teacher("resnet8x2", network, None)


def test_several_are_dicts_of_all_fields(kd, simkd, source):
  given = (str(kd), {"checkpoint": str(simkd), "weight": 3}, {"name": "vgg8"})
  config = teachers.resolve_teachers(
    make(teachers=given, teacher__name="resnet110")
  )
  assert config.teacher.name == ""
  assert [dict(entry) for entry in config.teachers] == [
    {"name": "resnet8", "checkpoint": str(kd), "weight": 1.0},
    {"name": "resnet8", "checkpoint": str(simkd), "weight": 3.0},
    {"name": "vgg8", "checkpoint": "", "weight": 1.0},
  ]
  # Resolved again, as a resumed run is, it stays what it is.
  assert teachers.resolve_teachers(config) == config
  found = teachers.find(config, source)
  assert [t.where for t in found] == [f"config.teachers[{i}]" for i in range(3)]
  assert [t.weight for t in found] == [1.0, 3.0, 1.0]
  assert [t.variables is None for t in found] == [False, False, True]
  assert len(identity.as_json(config)["teachers"]) == 3
  # Where a checkpoint lies may change, which network it is may not.
  names = identity.config_fingerprint(config)
  assert "teachers.1.weight" in names and "teachers.1.name" in names
  assert "teachers.1.checkpoint" not in names
  # A list of one is that one.
  config = teachers.resolve_teachers(
    make(teachers=(str(kd),), teacher__name="vgg8")
  )
  assert config.teachers == ()
  assert config.teacher.name == "resnet8"
  assert config.teacher.checkpoint == str(kd)


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (({"name": "vgg8", "weight": 0},), r"teachers\[0\]: expected a weight ab"),
    (({"name": "vgg8", "weight": "1"},), r"expected a weight above 0, got '1'"),
    (("/no", {"weight": 2}), r"teachers\[0\]\.checkpoint: /no does not exist"),
    (({"weight": 2},), r"the name of a network or a checkpoint, got neither"),
    (({"nam": "vgg8"},), r"a dict of name, checkpoint, weight, got {'nam'"),
    ((3,), r"teachers\[0\]: expected a checkpoint or a dict"),
  ],
)
def test_entries_that_make_no_sense(given, words):
  with pytest.raises(ValueError, match=words):
    teachers.resolve_teachers(make(teachers=given))
  with pytest.raises(ValueError, match="expected one of them, got both"):
    teachers.resolve_teachers(make(teachers=given, teacher__checkpoint="x"))


@pytest.mark.parametrize(
  "fields",
  [
    {"teacher__checkpoint": "a"},
    {"teacher__name": "a"},
    {"teachers": ("a", "b")},
  ],
)
def test_a_teacher_that_nobody_learns_from(fields):
  config = update(base.get_config(), fields)
  with pytest.raises(
    ValueError, match="learns from a teacher, got 'none' with"
  ):
    teachers.resolve_teachers(config)


# The run that trains one.


def small(**fields):
  weights = {"ce": 1.0, "kd": 1.0}
  config = base.finish(base.distillation("kd", weights=weights), "smoke")
  return update(config, fields)


def teacher_of(config):
  resolved = config_lib.resolve_defaults(config)
  return teachers.teacher_config(resolved, config.teacher.name)


def test_teacher_config_is_plain_training_of_the_teacher():
  config = small(
    seed=3,
    label_smoothing=0.1,
    data__mixup=0.2,
    data__cutmix=1.0,
    teacher__seed=5,
    teacher__epochs=7,
    teacher__milestones=(4, 6),
    verify_export=True,
    teacher__checkpoint="elsewhere",
  )
  before = copy.deepcopy(config)
  teacher = teacher_of(config)
  assert config == before
  assert teacher.student.name == "resnet8x2"
  assert teacher.teacher.name == teacher.teacher.checkpoint == ""
  assert teacher.distiller.to_dict() == {"name": "none"}
  assert teacher.loss_weights.to_dict() == {"ce": 1.0}
  assert (teacher.seed, teacher.epochs) == (5, 7)
  assert teacher.optim.milestones == (4, 6)
  # The student's tricks are not the teacher's.
  assert teacher.label_smoothing == teacher.data.mixup == 0
  assert teacher.data == small().data
  assert not teacher.verify_export
  # It is a config like any other: same fields, nothing left open.
  assert config_lib.resolve_defaults(teacher) == teacher
  fixed = ("distiller.", "loss_weights.")
  assert {
    k for k in storage.flatten(teacher.to_dict()) if not k.startswith(fixed)
  } == {k for k in storage.flatten(config.to_dict()) if not k.startswith(fixed)}


def test_what_a_teachers_recipe_leaves_open():
  teacher = teacher_of(
    small(teacher__epochs=None, epochs=9, optim__milestones=(2, 3))
  )
  assert (teacher.epochs, teacher.optim.milestones) == (9, (2, 3))
  rates = [
    teacher_of(small(**fields)).optim.learning_rate
    for fields in (
      {"student__name": "MobileNetV2"},
      {"teacher__name": "MobileNetV2"},
      {"teacher__learning_rate": 0.2},
    )
  ]
  assert rates == [0.05, 0.01, 0.2]


def folder_of(config, source, root="/runs"):
  return teachers.teacher_workdir(
    pathlib.Path(root, "a"), teacher_of(config), source
  )


def test_a_teacher_lies_beside_its_runs(source, tmp_path):
  folder = folder_of(small(), source)
  assert folder.parent == pathlib.Path("/runs/teachers")
  assert re.fullmatch("resnet8x2_synthetic_[0-9a-f]{8}", folder.name)
  tfds = copy.copy(source)
  object.__setattr__(tfds, "name", "tfds:cifar10")
  assert ":" not in folder_of(small(), tfds).name
  # One of an older version, under another name, is found by its config.
  old = tmp_path / "teachers" / "resnet8x2_synthetic_0"
  workdir.create(old, teacher_of(small()))
  assert folder_of(small(), source, tmp_path) == old
  assert folder_of(small(teacher__seed=1), source, tmp_path) != old


@pytest.mark.parametrize(
  ("fields", "same"),
  [
    # Of the student and its method.
    ({"seed": 1, "data__seed": 1}, True),
    ({"student__name": "MobileNetV2"}, True),
    ({"distiller__temperature": 9.0}, True),
    ({"loss_weights__kd": 0.5, "loss_ramp_epochs__kd": 1.0}, True),
    ({"label_smoothing": 0.1, "data__mixup": 0.1, "data__cutmix": 0.1}, True),
    # Where things are and how often they are written.
    ({"data__dir": "/elsewhere", "parallel__num_devices": 2}, True),
    ({"checkpoint__keep": 3, "log__every_steps": 1}, True),
    ({"eval__batch_size": 3, "steps_per_dispatch": 1}, True),
    # Of its training.
    ({"teacher__name": "resnet14x2"}, False),
    ({"teacher__seed": 1}, False),
    ({"teacher__learning_rate": 0.1}, False),
    ({"batch_size": 32}, False),
    ({"optim__weight_decay": 0.0}, False),
    ({"data__flip": False}, False),
    ({"data__pipeline": "grain"}, False),
  ],
)
def test_which_runs_share_a_teacher(fields, same, source):
  found = folder_of(small(**fields), source)
  assert (found == folder_of(small(), source)) == same


# What they are.


def test_a_simkd_student_teaches_with_the_classifier_that_it_reuses(
  simkd, source
):
  teacher = find_one(simkd, "", source)
  model = store.load(simkd)
  assert isinstance(teacher.network, model_lib.ReusedClassifier)
  images = source.images[:4]
  x = jnp.asarray((images / 255 - source.mean) / source.std, jnp.float32)
  output = teacher.network.apply(teacher.variables, x, train=False)
  np.testing.assert_allclose(output.logits, model.logits(images), atol=1e-4)
  assert output.features["pooled"].shape == (4, 128)  # resnet8x2's
  assert output.features["stage3"].shape == (4, 4, 4, 64)  # resnet8's
  np.testing.assert_allclose(
    teacher.network.classify(
      teacher.variables["params"], output.features["pooled"]
    ),
    output.logits,
    atol=1e-5,
  )
  with pytest.raises(ValueError, match="cannot be trained as one network"):
    teacher.network.apply(teacher.variables, x, train=True)


def test_a_student_teaches(kd, source, caplog):
  teacher = find_one(kd, "", source)
  assert teacher.name == "resnet8"
  assert_same_arrays(teacher.variables, store.load(kd).variables)
  with pytest.raises(ValueError, match=r"weights of vgg8 .*, got resnet8 in"):
    find_one(kd, "vgg8", source)
  other = data.load("synthetic", split="train", num_examples=8, num_classes=5)
  with pytest.raises(ValueError, match=r"a teacher of 5 classes, .* got 10"):
    find_one(kd, "", other)
  assert not caplog.text
  find_one(kd, "", data.load("digits", split="train", image_size=16))
  assert "was trained on images of mean" in caplog.text


# Files.


@pytest.fixture
def teacher_file(tmp_path):
  """A PyTorch file of a teacher of 10 classes, and its variables."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    models.create("_tiny_wide", 10).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32),
  )
  variables = jax.tree.map(
    lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), shapes
  )
  state_dict = pytorch.to_state_dict("_tiny_wide", variables)
  (tmp_path / "weights").mkdir()
  path = tmp_path / "weights" / "teacher.pth"
  torch.save(
    {"model": {k: torch.tensor(v) for k, v in state_dict.items()}}, path
  )
  return path, variables


def test_a_file_is_a_teacher(teacher_file, source):
  path, variables = teacher_file
  assert_same_arrays(find_one(path, "_tiny_wide", source).variables, variables)
  other = data.load("synthetic", split="train", num_examples=8, num_classes=100)
  with pytest.raises(
    ValueError, match=r"config\.teacher\.checkpoint: .*100 classes\)"
  ) as e:
    find_one(path, "_tiny_wide", other)
  assert "fc.bias (expected [100], got [10])" in str(e.value)
  with pytest.raises(ValueError, match=r"teacher\.checkpoint: .*not exist"):
    find_one(path.with_suffix(".npz"), "_tiny_wide", source)
  with pytest.raises(ValueError, match="do not fit resnet8 with 10 classes"):
    find_one(path, "resnet8", source)


# From the command line, on digits.


def test_a_chain_and_two_teachers(launch, tmp_path, capsys):
  def run(name, *flags):
    code = launch(
      *("--config", f"{REPO}/configs/simkd_digits.py"),
      *("--workdir", str(tmp_path / name), *flags),
      *("--config.epochs=1", "--config.teacher.epochs=1"),
      *("--config.data.image_size=8", "--config.parallel.num_devices=1"),
    )
    return code, capsys.readouterr().err

  first = run(
    "first", "--config.teacher.name=_tiny_wide", "--config.student.name=resnet8"
  )
  assert first[0] == 0, first[1]
  chain = ("--config.teacher.name=", "--config.student.name=_tiny")
  named = f"--config.teacher.checkpoint={tmp_path / 'first'}"
  second = run("second", *chain, named)
  assert second[0] == 0, second[1]
  card = card_lib.read_card(tmp_path / "second" / "export")
  assert card["head"]["teachers"] == ["resnet8"]
  assert card["head"]["teacher_maps"] == [[2, 2, 32]]  # _tiny_wide's
  result = workdir.result(tmp_path / "second")
  assert result["teacher"]["name"] == "resnet8"
  first_scores = workdir.result(tmp_path / "first")["best"]
  assert result["teacher"]["top1"] == pytest.approx(first_scores["top1"])

  entries = (
    f"({str(tmp_path / 'first')!r}, "
    f"{{'checkpoint': {str(tmp_path / 'second')!r}, 'weight': 0.5}})"
  )
  both = (f"--config.teachers={entries}", "--config.student.name=_tiny")
  code, error = run("both", *both)
  assert code == 0, error
  result = workdir.result(tmp_path / "both")
  assert [t["name"] for t in result["teacher"]] == ["resnet8", "_tiny"]
  model = store.load(tmp_path / "both")
  assert model.card["head"]["weights"] == [1.0, 0.5]
  # What is exported predicts what the run's evaluation did.
  test = data.load("digits", split="test", image_size=8)
  hits = np.asarray(model.logits(test.images)).argmax(1) == test.labels
  assert 100 * hits.mean() == pytest.approx(result["best"]["top1"])

  refused = run("refused", *both, "--config.distiller.name=at")
  assert refused[0] == 2 and "no field 'factor'" in refused[1]
  code = launch(
    *("--config", f"{REPO}/configs/at_cifar.py:smoke"),
    *("--workdir", str(tmp_path / "refused"), f"--config.teachers={entries}"),
    "--config.data.image_size=8",
  )
  assert code == 2
  assert "at learns from one teacher, got 2" in capsys.readouterr().err
  assert not (tmp_path / "refused").exists()
