"""Teachers: found, named, checked; files, students, chains and several."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import base
from kd_jax import data, models, storage
from kd_jax.interop import card as card_lib
from kd_jax.interop import files, pytorch, store
from kd_jax.interop import model as model_lib
from kd_jax.runs import identity, teachers, workdir

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def source():
  return data.load("synthetic", split="train", num_examples=64, image_size=16)


@pytest.fixture
def kd(smoke_run):
  return smoke_run("kd_cifar")


@pytest.fixture
def simkd(smoke_run):
  return smoke_run("simkd_cifar")


def make(**fields):
  config = base.get_config()
  with config.unlocked():
    for name, value in fields.items():
      config.update_from_flattened_dict({name.replace("__", "."): value})
  return config


def load(path, name, source, **fields):
  spec = teachers.Spec("config.teacher", name, str(path), **fields)
  return teachers.load(spec, source, dtype="float32")


def assert_same_arrays(ours, theirs):
  ours, theirs = storage.flatten(ours), storage.flatten(theirs)
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


# What a config says.


def test_no_teacher():
  config = teachers.resolve_teachers(make())
  assert teachers.specs(config) == ()


def test_a_teacher_to_be_trained():
  config = teachers.resolve_teachers(make(teacher__name="resnet8x2"))
  (spec,) = teachers.specs(config)
  assert spec == teachers.Spec("config.teacher", "resnet8x2", "", 1.0)
  teacher = teachers.create(spec, num_classes=10, dtype=jnp.float32)
  assert teacher.network == models.create("resnet8x2", 10)
  assert teacher.variables is None


def test_a_checkpoint_names_its_network(simkd, tmp_path):
  config = teachers.resolve_teachers(make(teacher__checkpoint=str(simkd)))
  assert config.teacher.name == "resnet8"
  variables = jax.eval_shape(
    models.create("vgg8", 10).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
  )
  arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
  path = tmp_path / "teacher.npz"
  files.write(path, {"model": pytorch.to_state_dict("vgg8", arrays)})
  config = teachers.resolve_teachers(make(teacher__checkpoint=str(path)))
  assert config.teacher.name == "vgg8"


def test_several_are_dicts_of_all_fields(kd, simkd):
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
  # Settled again, as a resumed run is, it stays what it is.
  assert teachers.resolve_teachers(config) == config
  specs = teachers.specs(config)
  assert [s.where for s in specs] == [f"config.teachers[{i}]" for i in range(3)]
  assert [s.weight for s in specs] == [1.0, 3.0, 1.0]
  assert len(identity.as_json(config)["teachers"]) == 3
  # Where a checkpoint lies may change, which network it is may not.
  names = identity.config_fingerprint(config)
  assert "teachers.1.weight" in names and "teachers.1.name" in names
  assert "teachers.1.checkpoint" not in names


def test_a_list_of_one_is_that_one(kd):
  config = teachers.resolve_teachers(
    make(teachers=(str(kd),), teacher__name="vgg8")
  )
  assert config.teachers == ()
  assert config.teacher.name == "resnet8"
  assert config.teacher.checkpoint == str(kd)


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (
      ({"name": "vgg8", "weight": 0},),
      r"teachers\[0\]: expected a weight ab",
    ),
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


def test_one_teacher_or_several():
  with pytest.raises(ValueError, match="expected one of them, got both"):
    teachers.resolve_teachers(
      make(teachers=({"name": "vgg8"},), teacher__checkpoint="runs/x")
    )


# What they are.


def test_a_student_teaches(kd, source):
  teacher = load(kd, "resnet8", source, weight=2.0)
  assert teacher.weight == 2.0
  assert_same_arrays(teacher.variables, store.load(kd).variables)


def test_a_simkd_student_teaches_with_the_classifier_that_it_reuses(
  simkd, source
):
  teacher = load(simkd, "resnet8", source)
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


@pytest.mark.parametrize(
  ("name", "classes", "words"),
  [
    ("resnet8", 5, "expected a teacher of 5 classes, as the data has, got 10"),
    (
      "vgg8",
      10,
      r"weights of vgg8 .*, got resnet8 in .* Set --config\.teacher\.name=re",
    ),
  ],
)
def test_a_teacher_that_does_not_fit(kd, name, classes, words):
  source = data.load(
    "synthetic", split="train", num_examples=8, num_classes=classes
  )
  with pytest.raises(ValueError, match=words):
    load(kd, name, source)


def test_another_normalisation_is_told(kd, source, caplog):
  load(kd, "resnet8", source)
  assert not caplog.text
  other = data.load("digits", split="train", image_size=16)
  load(kd, "resnet8", other)
  assert "was trained on images of mean" in caplog.text
  assert "those of digits, normalised with mean" in caplog.text


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
  assert_same_arrays(load(path, "_tiny_wide", source).variables, variables)
  other = data.load("synthetic", split="train", num_examples=8, num_classes=100)
  with pytest.raises(
    ValueError, match=r"config\.teacher\.checkpoint: .*100 classes\)"
  ) as e:
    load(path, "_tiny_wide", other)
  assert "fc.bias (expected [100], got [10])" in str(e.value)
  with pytest.raises(ValueError, match=r"teacher\.checkpoint: .*not exist"):
    load(path.with_suffix(".npz"), "_tiny_wide", source)


def test_a_run_with_a_file_as_teacher(
  teacher_file, launch, tmp_path, capsys, fast_compile
):
  path, _ = teacher_file
  flags = [
    *("--config", f"{REPO}/configs/kd_cifar.py:smoke"),
    *("--workdir", str(tmp_path / "run")),
    *("--config.student.name=_tiny", "--config.parallel.num_devices=1"),
    f"--config.teacher.checkpoint={path}",
    "--config.epochs=1",
  ]
  # Of another network: nothing begins.
  assert launch(*flags, "--config.teacher.name=resnet8") == 2
  error = capsys.readouterr().err
  assert "do not fit resnet8 with 10 classes" in error
  assert not (tmp_path / "run").exists()
  assert launch(*flags, "--config.teacher.name=_tiny_wide") == 0
  about = storage.read_json(tmp_path / "run" / "teacher.json")
  assert about["checkpoint"] == str(path)
  assert not (tmp_path / "teachers").exists()


# From the command line, on digits.


def test_a_chain_and_two_teachers(launch, tmp_path, capsys, fast_compile):
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
