"""Weights of other toolboxes: in, out, and as teachers."""

import collections
import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional

from kd_jax import data, distillers, models
from kd_jax.cli import convert
from kd_jax.interop import card as card_lib
from kd_jax.interop import conversion, files, opening, pytorch, store
from kd_jax.models.layers import ModelOutputs

REPO = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(os.environ.get("KD_JAX_GOLDEN") or REPO / "tests/golden")
LEGACY = {"_use_new_zipfile_serialization": False}


def _cases():
  """Each distinct checkpoint layout of the reference toolboxes, once."""
  cases = {}
  for path in sorted((FOLDER / "models").glob("*.json")):
    for name, spec in json.loads(path.read_text()).items():
      if spec["image_size"] == 32 and f"{name}_cifar" in models.names():
        name = f"{name}_cifar"
      cases[name, json.dumps(spec["state_dict"])] = spec
  return [
    pytest.param(name, spec, id=name) for (name, _), spec in cases.items()
  ]


def _pooled(state_dict):
  """Tensors of random values which share one storage: the file stays small."""
  largest = max(math.prod(shape) for _, shape in state_dict)
  rng = np.random.default_rng(0)
  pool = rng.random(largest + len(state_dict), np.float32)
  pool = torch.from_numpy(pool)
  return collections.OrderedDict(
    (name, torch.tensor(0))
    if name.endswith("num_batches_tracked")
    else (name, pool[i : i + math.prod(shape)].view(tuple(shape)))
    for i, (name, shape) in enumerate(state_dict)
  )


def read_tensors(path):
  return files.read(path).tensors


def assert_same_tensors(got, expected):
  assert got.keys() == expected.keys()
  for name, tensor in expected.items():
    assert got[name].dtype == tensor.dtype, name
    assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("name", "spec"), _cases())
def test_from_pytorch_and_back(name, spec, tmp_path):
  tensors = _pooled(spec["state_dict"])
  zipped, legacy = tmp_path / "zip.pth", tmp_path / "legacy.pth"
  torch.save({"model": tensors, "epoch": 240}, zipped)
  torch.save(tensors, legacy, **LEGACY)
  back = tmp_path / "back.pth"
  for path in (zipped, legacy):
    words = conversion.convert(path, back, model_name=name)
    assert words == f"{name}, {spec['num_classes']} classes, a state dict"
    assert_same_tensors(torch.load(back, weights_only=True, mmap=True), tensors)
    for used in (path, back):  # up to 350 MB
      used.unlink()


def _filled(rebuild, spec):
  """The state dict that a golden file's values are of."""
  filled = collections.OrderedDict()
  for name, shape in spec["state_dict"]:
    if name.endswith("num_batches_tracked"):
      filled[name] = torch.tensor(0)
    else:
      value = rebuild.fill(
        name, shape, seed=spec["seed"], bn_gain=spec["bn_gain"]
      )
      filled[name] = torch.from_numpy(value)
  return filled


@pytest.fixture(scope="module")
def golden_file(golden, rebuild, tmp_path_factory):
  """golden_file("simkd", "resnet8x4") -> (its .pth file, its spec)."""
  folder, made = tmp_path_factory.mktemp("golden"), {}

  def make(toolbox, name, **layout):
    key = (toolbox, name, *layout)
    if key not in made:
      path = golden / "models" / f"{toolbox}.json"
      spec = json.loads(path.read_text())[name]
      file = folder / f"{'_'.join(key)}.pth"
      content = {"epoch": 240, "model": _filled(rebuild, spec)}
      torch.save(content, file, **layout)
      made[key] = (file, spec)
    return made[key]

  return make


@pytest.mark.parametrize(
  ("toolbox", "name", "layout"),
  [("simkd", "resnet8x4", {}), ("repdistiller", "wrn_16_1", LEGACY)],
)
def test_predicts_what_pytorch_does(
  toolbox, name, layout, golden_file, golden, rebuild, tmp_path, fast_compile
):
  file, spec = golden_file(toolbox, name, **layout)
  conversion.convert(file, tmp_path / "out")
  loaded = store.load(tmp_path / "out")
  assert loaded.card["architecture"] == name
  size = spec["image_size"]
  images = rebuild.normal("image", (2, 3, size, size), seed=spec["seed"])
  output = jax.jit(models.create(name, spec["num_classes"]).apply)(
    loaded.variables, jnp.asarray(images.transpose(0, 2, 3, 1))
  )
  expected = np.load(golden / "models" / toolbox / f"{name}.npz")["logits"]
  np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-4)


def test_the_card_of_an_export(golden_file, tmp_path):
  file, spec = golden_file("simkd", "resnet8x4")
  to = tmp_path / "new" / "out"
  words = conversion.convert(file, to, model_name="resnet8x4", num_classes=100)
  assert words == (
    f"resnet8x4, 100 classes, {spec['num_params']:,} parameters, for images"
    " like those of cifar100"
  )
  card = card_lib.read_card(to)
  assert card["num_classes"] == 100
  assert card["image_shape"] == [32, 32, 3]
  assert card["trained_on"] == "cifar100"
  assert card["normalization"]["mean"] == [0.5071, 0.4867, 0.4408]
  assert card["class_names"][:2] == ["apple", "aquarium_fish"]
  assert card["parameters"] == spec["num_params"]
  # The same command changes nothing; another may not.
  before = {p: p.read_bytes() for p in to.rglob("*") if p.is_file()}
  conversion.convert(file, to)
  with pytest.raises(ValueError, match="Nothing was changed"):
    conversion.convert(file, to, origin=opening.Origin(image_size=64))
  after = {p: p.read_bytes() for p in to.rglob("*") if p.is_file()}
  assert after == before


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_an_export_to_a_file(suffix, golden_file, tmp_path):
  file, _ = golden_file("repdistiller", "wrn_16_1", **LEGACY)
  conversion.convert(file, tmp_path / "export")
  to = tmp_path / f"out{suffix}"
  conversion.convert(tmp_path / "export", to, model_name="wrn_16_1")
  expected, got = read_tensors(file), read_tensors(to)
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_data_that_is_named(golden_file, tmp_path):
  file, _ = golden_file("simkd", "resnet8x4")
  with pytest.raises(
    ValueError, match=r"expected data of 100 classes.* got synthetic w"
  ):
    conversion.convert(
      file, tmp_path / "out", origin=opening.Origin("synthetic")
    )
  with pytest.raises(ValueError, match=r"'cifar10O'.*cifar100.*imagenet"):
    conversion.convert(
      file, tmp_path / "out", origin=opening.Origin("cifar10O")
    )
  with pytest.raises(ValueError, match=r"--image_size: expected 1 pixel"):
    conversion.convert(
      file, tmp_path / "out", origin=opening.Origin(image_size=0)
    )
  assert list(tmp_path.iterdir()) == []
  origin = opening.Origin("tfds:cifar100", 64)
  conversion.convert(file, tmp_path / "out", origin=origin)
  card = card_lib.read_card(tmp_path / "out")
  assert card["trained_on"] == "tfds:cifar100"
  assert card["image_shape"] == [64, 64, 3]
  assert card["data_options"] == {"image_size": 64}


def test_data_that_the_network_suggests():
  likely = opening._likely_data
  assert likely("resnet8", 10) == "cifar10"
  assert likely("MobileNetV2", 100) == "cifar100"
  assert likely("ResNet10x2", 1000) == "imagenet"
  for name, num_classes in (("resnet8", 7), ("ResNet10x2", 100)):
    with pytest.raises(
      ValueError, match=rf"--data: .*{name} with {num_classes}"
    ):
      likely(name, num_classes)
  assert likely("resnet8", 100) in data.load.__doc__


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (
      {"model_name": "resnet8"},
      "fit resnet8 with 100.*like resnet8x4 with 100",
    ),
    ({"num_classes": 10}, "fit resnet8x4 with 10 .*like resnet8x4 with 100"),
    ({"model_name": "resnet8x5"}, r"unknown model 'resnet8x5'.*resnet8x4"),
  ],
)
def test_misfits(options, words, golden_file, tmp_path):
  file, _ = golden_file("simkd", "resnet8x4")
  for to in (tmp_path / "a" / "out", tmp_path / "b" / "out.safetensors"):
    with pytest.raises(ValueError, match=words):
      conversion.convert(file, to, **options)
  assert list(tmp_path.iterdir()) == []


def test_sources_and_targets_that_make_no_sense(golden_file, tmp_path):
  file, _ = golden_file("simkd", "resnet8x4")
  np.savez(tmp_path / "a.npz", a=np.ones(3), b=np.ones(2))
  with pytest.raises(ValueError, match=r"2 tensors begin with a, b.*--model"):
    conversion.convert(tmp_path / "a.npz", tmp_path / "out")
  before = (tmp_path / "a.npz").read_bytes()
  with pytest.raises(ValueError, match="does not exist yet"):
    conversion.convert(file, tmp_path / "a.npz")
  assert (tmp_path / "a.npz").read_bytes() == before
  conversion.convert(file, tmp_path / "export")
  with pytest.raises(ValueError, match=r"expected the model .*got resnet8x4"):
    conversion.convert(
      tmp_path / "export", tmp_path / "o.npz", model_name="resnet8"
    )
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "export"]


# A student of SimKD's own training loop.


def _projector(s_n, t_n, factor, seed=0):
  """The projector as that loop builds it: the published layers, in order."""
  torch.manual_seed(seed)
  middle = t_n // factor
  layers = []
  for channels, outputs, kernel in (
    (s_n, middle, 1),
    (middle, middle, 3),
    (middle, t_n, 1),
  ):
    layers += [
      torch.nn.Conv2d(
        channels, outputs, kernel, padding=kernel // 2, bias=False
      ),
      torch.nn.BatchNorm2d(outputs),
      torch.nn.ReLU(),
    ]
    with torch.no_grad():
      layers[-2].running_mean.uniform_(-0.1, 0.1)
      layers[-2].running_var.uniform_(0.8, 1.2)
      layers[-2].weight.uniform_(0.8, 1.2)
      layers[-2].bias.uniform_(-0.1, 0.1)
  module = torch.nn.Module()
  module.transfer = torch.nn.Sequential(*layers)
  return module.eval()


def _network(name, num_classes, seed):
  """Variables of a network and the state dict that they are."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    value = rng.standard_normal(leaf.shape, np.float32) / 8
    return np.abs(value) + 0.5 if path[-1].key in ("var", "scale") else value

  shapes = jax.eval_shape(
    models.create(name, num_classes).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
  )
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def simkd_files(tmp_path_factory):
  """A student's file and its teacher's, with what is in them."""

  def make(student, channels, teacher, teacher_channels, factor):
    folder = tmp_path_factory.mktemp("simkd")
    made = {"projector": _projector(channels, teacher_channels, factor)}
    for seed, (part, name) in enumerate(
      (("student", student), ("teacher", teacher))
    ):
      made[f"{part}_variables"] = _network(name, 10, seed)
      state_dict = pytorch.to_state_dict(name, made[f"{part}_variables"])
      content = {
        "epoch": 239,
        "model": {k: torch.tensor(v) for k, v in state_dict.items()},
        "best_acc": torch.tensor(75.0),
      }
      if part == "student":
        content["proj"] = {
          f"module.{k}": v for k, v in made["projector"].state_dict().items()
        }
      made[part] = folder / f"{part}.pth"
      torch.save(content, made[part])
    return made

  return make


def _pytorch_logits(made, feature, size):
  """Projector, pooling and the teacher's classifier, by PyTorch."""
  x = torch.from_numpy(np.array(feature)).permute(0, 3, 1, 2)
  if x.shape[2] > size:
    x = torch.nn.functional.adaptive_avg_pool2d(x, size)
  with torch.no_grad():
    pooled = made["projector"].transfer(x).mean((2, 3))
  head = made["teacher_variables"]["params"]["fc"]
  return pooled.numpy() @ head["kernel"] + head["bias"]


def test_a_simkd_student_and_its_teacher(simkd_files, tmp_path, fast_compile):
  made = simkd_files("_tiny", 8, "_tiny_wide", 32, 2)
  words = conversion.convert_simkd(
    made["student"],
    made["teacher"],
    tmp_path / "out",
    student_model="_tiny",
    teacher_model="_tiny_wide",
  )
  assert words.startswith("_tiny with the classifier of _tiny_wide, 10 classes")
  model = store.load(tmp_path / "out")
  assert model.card["trained_on"] == "cifar10"
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  known = data.constants("cifar10")
  x = jnp.asarray((images / 255 - known.mean) / known.std, jnp.float32)
  output = jax.jit(models.create("_tiny", 10).apply)(
    made["student_variables"], x
  )
  expected = _pytorch_logits(made, output.features["last"], 8)
  np.testing.assert_allclose(
    model.logits(images), expected, rtol=1e-4, atol=1e-4
  )


def test_a_simkd_student_whose_last_stage_is_not_its_last_map(
  simkd_files, tmp_path, fast_compile
):
  made = simkd_files("MobileNetV2", 160, "_tiny_wide", 32, 4)
  conversion.convert_simkd(
    made["student"],
    made["teacher"],
    tmp_path / "out",
    teacher_model="_tiny_wide",
  )
  model = store.load(tmp_path / "out")
  assert model.card["architecture"] == "MobileNetV2"
  fields = model.card["head"]["distiller"]
  assert fields == {"name": "simkd", "factor": 4, "student_map": "stage4"}
  distiller = distillers.create("simkd", factor=4, student_map="stage4")
  rng = np.random.default_rng(0)
  stage4 = rng.standard_normal((3, 2, 2, 160), np.float32)
  teacher_map = jax.ShapeDtypeStruct((3, 8, 8, 32), jnp.float32)
  part = {kind: tree["distiller"] for kind, tree in model.variables.items()}
  last = distiller.apply(
    part,
    ModelOutputs(None, {"stage4": stage4, "last": None}),
    (ModelOutputs(None, {"last": teacher_map}),),
    method="last_map",
  )
  head = model.variables["params"]["classifier"]
  logits = jnp.mean(last, (1, 2)) @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(
    logits, _pytorch_logits(made, stage4, 8), rtol=1e-4, atol=1e-4
  )


def test_simkd_files_that_do_not_fit(simkd_files, tmp_path):
  made = simkd_files("_tiny", 8, "_tiny_wide", 32, 2)
  network = _network("_tiny_wide", 7, 0)
  files.write(
    tmp_path / "seven.npz",
    {"model": pytorch.to_state_dict("_tiny_wide", network)},
  )
  for changed, words in (
    ({"factor": 4}, r"the teacher's channels over --factor.* 16 of 32 .*4\."),
    ({"factor": 0}, "and the factor 0"),
    ({"student_model": "resnet8"}, "fit resnet8 with 10"),
    ({"teacher_model": "resnet8"}, r"teacher\.pth: .*fit resnet8 with 10"),
    ({"num_classes": 9}, "fit _tiny_wide with 9"),
    ({"student": made["teacher"]}, "'model' and 'proj', got a file without"),
    ({"teacher": made["student"]}, "got a SimKD student, which predicts"),
    ({"teacher": tmp_path / "seven.npz"}, r"student\.pth: .*fit _tiny with 7"),
    ({"to": tmp_path / "seven.npz"}, r"seven\.npz: expected a file that does"),
  ):
    arguments = {
      "student": made["student"],
      "teacher": made["teacher"],
      "to": tmp_path / "new" / "out",
      "student_model": "_tiny",
      "teacher_model": "_tiny_wide",
      **changed,
    }
    with pytest.raises(ValueError, match=words):
      conversion.convert_simkd(**arguments)
  assert [p.name for p in tmp_path.iterdir()] == ["seven.npz"]
  with pytest.raises(ValueError, match="--simkd_student"):
    conversion.convert(made["student"], tmp_path / "out", model_name="_tiny")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda t: t.pop("transfer.6.weight"), "expected the projector of SimKD"),
    (lambda t: t.pop("transfer.4.bias"), r"Missing \(1\): transfer\.4\.bias"),
    (
      lambda t: t.update({"transfer.0.weight": torch.ones(16, 9, 1, 1)}),
      r"stage3 of the student.*transfer\.0\.weight \(expected \[16, 8, 1, 1\]",
    ),
    (lambda t: t["transfer.7.weight"].fill_(math.nan), "NaN .*transfer.7.weig"),
  ],
)
def test_projectors_that_do_not_fit(change, words, simkd_files, tmp_path):
  made = simkd_files("_tiny", 8, "_tiny_wide", 32, 2)
  content = torch.load(made["student"], weights_only=True)
  content["proj"] = {
    name.removeprefix("module."): tensor
    for name, tensor in content["proj"].items()
  }
  change(content["proj"])
  torch.save(content, tmp_path / "changed.pth")
  with pytest.raises(ValueError, match=rf"changed\.pth: .*{words}"):
    conversion.convert_simkd(
      tmp_path / "changed.pth",
      made["teacher"],
      tmp_path / "out",
      student_model="_tiny",
      teacher_model="_tiny_wide",
    )
  assert [p.name for p in tmp_path.iterdir()] == ["changed.pth"]


# The command line.


def command(monkeypatch, *arguments):
  """The exit code of the command."""
  monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
  try:
    convert.main()
  except SystemExit as stop:
    return stop.code
  return 0


def test_command(golden_file, simkd_files, tmp_path, monkeypatch, capsys):
  file, spec = golden_file("simkd", "resnet8x4")
  run = functools.partial(command, monkeypatch)
  to = tmp_path / "out"
  assert run("--from", file, "--to", to, "--data", "cifar100") == 0
  assert capsys.readouterr().out == (
    f"{to}: resnet8x4, 100 classes, {spec['num_params']:,} parameters, for"
    " images like those of cifar100\n"
  )
  made = simkd_files("_tiny", 8, "_tiny_wide", 32, 2)
  simkd = ("--simkd_student", made["student"], "--model", "_tiny")
  teacher = ("--teacher", made["teacher"], "--teacher_model", "_tiny_wide")
  assert run(*simkd, *teacher, "--to", tmp_path / "simkd") == 0
  assert "_tiny with the classifier of _tiny_wide" in capsys.readouterr().out
  new = tmp_path / "new"
  for arguments, words in (
    (
      ("--from", file, "--to", new, "--num_classes", "10"),
      "looks like resnet8x4",
    ),
    (("--from", tmp_path / "none.pth", "--to", new), "none.pth does not exist"),
    (
      ("--from", file, "--to", new, "--factor", "2"),
      "--factor goes with --simkd",
    ),
    ((*simkd, "--to", new), "--simkd_student needs --teacher"),
  ):
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
  assert not new.exists()
