"""Weights of other toolboxes: in, out, and as teachers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kd_jax import data, distillers, models
from kd_jax.interop import card as card_lib
from kd_jax.interop import conversion, files, opening, pytorch, store
from kd_jax.models import ModelOutputs

LEGACY = {"_use_new_zipfile_serialization": False}


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def golden_file(golden, rebuild, layouts, tmp_path_factory):
  """golden_file("resnet8x4") -> its .pth file, of the golden weights."""
  folder = tmp_path_factory.mktemp("golden")

  def make(name, **save):
    path, spec = folder / f"{name}.pth", layouts[name]
    if not path.exists():
      fill = {"seed": spec["seed"], "bn_gain": spec["bn_gain"]}
      filled = {
        key: torch.tensor(0)
        if key.endswith("num_batches_tracked")
        else torch.from_numpy(rebuild.fill(key, shape, **fill))
        for key, shape in spec["state_dict"]
      }
      torch.save({"epoch": 240, "model": filled}, path, **save)
    return path

  return make


@pytest.mark.parametrize(
  ("toolbox", "name", "save"),
  [("simkd", "resnet8x4", {}), ("repdistiller", "wrn_16_1", LEGACY)],
)
def test_pytorch_to_an_export_and_back(
  toolbox, name, save, golden_file, golden, rebuild, layouts, tmp_path
):
  spec, file = layouts[name], golden_file(name, **save)
  conversion.convert(file, tmp_path / "out")
  model = store.load(tmp_path / "out")
  assert model.card["architecture"] == name
  size = spec["image_size"]
  images = rebuild.normal("image", (2, 3, size, size), seed=spec["seed"])
  output = jax.jit(model.network.apply)(
    model.variables, jnp.asarray(images.transpose(0, 2, 3, 1))
  )
  expected = np.load(golden / "models" / toolbox / f"{name}.npz")["logits"]
  np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-4)
  given = torch.load(file, weights_only=True)["model"]
  for source, to in ((file, "a.pth"), (tmp_path / "out", "b.pth")):
    words = conversion.convert(source, tmp_path / to, model_name=name)
    assert f"{name}, {spec['num_classes']} classes, a state dict" in words
    written = torch.load(tmp_path / to, weights_only=True)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], given[key]) for key in given)


def test_the_card_of_an_export(golden_file, layouts, tmp_path):
  file, parameters = golden_file("resnet8x4"), layouts["resnet8x4"]
  to = tmp_path / "new" / "out"
  words = conversion.convert(file, to, model_name="resnet8x4", num_classes=100)
  assert words == (
    f"resnet8x4, 100 classes, {parameters['num_params']:,} parameters, for"
    " images like those of cifar100"
  )
  card = card_lib.read_card(to)
  assert card["image_shape"] == [32, 32, 3]
  assert card["normalization"]["mean"] == [0.5071, 0.4867, 0.4408]
  assert card["class_names"][:2] == ["apple", "aquarium_fish"]
  # The same command changes nothing; another may not.
  before = contents(to)
  conversion.convert(file, to)
  with pytest.raises(ValueError, match="Nothing was changed"):
    conversion.convert(file, to, origin=opening.Origin(image_size=64))
  assert contents(to) == before


@pytest.mark.parametrize(
  ("origin", "expected"),
  [
    (("tfds:cifar100", 64), ([64, 64, 3], {"image_size": 64}, None)),
    (("tiny-imagenet", None), ([64, 64, 3], {}, 64)),
    (("imagenet", None), ([224, 224, 3], {}, 256)),
    (("imagenet", 112), ([112, 112, 3], {"image_size": 112}, 128)),
  ],
)
def test_data_that_is_named(origin, expected):
  classes = data.constants(origin[0]).num_classes
  card = opening.make_card("resnet8", classes, opening.Origin(*origin))
  assert card["trained_on"] == origin[0]
  got = (card["image_shape"], card["data_options"], card["resize"])
  assert got == expected


def test_data_that_the_network_suggests():
  likely = opening.likely_data
  assert likely("resnet8", 10) == "cifar10"
  assert likely("MobileNetV2", 100) == "cifar100"
  assert likely("ResNet10x2", 1000) == "imagenet"
  for name, num_classes in (("resnet8", 7), ("ResNet10x2", 100)):
    with pytest.raises(ValueError, match=f"{name} with {num_classes} .*Name"):
      likely(name, num_classes)


def test_sources_and_targets_that_do_not_fit(golden_file, tmp_path):
  file = golden_file("resnet8x4")
  np.savez(tmp_path / "a.npz", a=np.ones(3), b=np.ones(2))
  conversion.convert(file, tmp_path / "export")
  before = contents(tmp_path)
  new, other = tmp_path / "new" / "out", tmp_path / "new" / "out.npz"
  for source, to, options, words in (
    (file, new, {"model_name": "resnet8"}, "fit resnet8 with 100.*like resnet"),
    (file, other, {"num_classes": 10}, "with 10 .*like resnet8x4 with 100"),
    (file, other, {"model_name": "resnet8x5"}, "resnet8x5.*resnet8x4"),
    (file, new, {"origin": ("synthetic",)}, "data of 100 classes.*synthetic"),
    (file, new, {"origin": ("cifar10O",)}, "'cifar10O'.*cifar100.*imagenet"),
    (file, new, {"origin": (None, 0)}, "image size: expected 1 pixel"),
    (tmp_path / "a.npz", new, {}, "nearest networks are .*--model_name"),
    (file, tmp_path / "a.npz", {}, "does not exist yet"),
    (file, tmp_path / "new" / "x.onnx", {}, r"ends in \.pth, .*got '\.onnx'"),
    (
      tmp_path / "export",
      other,
      {"model_name": "resnet8"},
      "expected the model .*got resnet8x4",
    ),
  ):
    if "origin" in options:
      options = {"origin": opening.Origin(*options["origin"])}
    with pytest.raises(ValueError, match=words):
      conversion.convert(source, to, **options)
  assert contents(tmp_path) == before
  assert not new.parent.exists()


# A student of SimKD's own training loop.


@pytest.fixture(scope="module")
def simkd_files(tmp_path_factory, draw, torch_projector):
  """A student's file and its teacher's, with what is in them."""

  def make(student, channels, factor):
    folder = tmp_path_factory.mktemp("simkd")
    made = {"projector": torch_projector(channels, 32, factor)}
    networks = {"student": student, "teacher": "_tiny_wide"}
    for seed, (part, name) in enumerate(networks.items()):
      variables = draw(models.create(name, 10), seed=seed)
      state_dict = pytorch.to_state_dict(name, variables)
      content = {
        "epoch": 239,
        "model": {k: torch.tensor(v) for k, v in state_dict.items()},
        "best_acc": torch.tensor(75.0),
      }
      if part == "student":
        content["proj"] = {
          f"module.{k}": v for k, v in made["projector"].state_dict().items()
        }
      made[f"{part}_variables"] = variables
      made[part] = folder / f"{part}.pth"
      torch.save(content, made[part])
    return made

  return make


@pytest.fixture(scope="module")
def tiny_files(simkd_files):
  return simkd_files("_tiny", 8, 2)


def torch_logits(made, feature):
  """Projector, pooling and the teacher's classifier, by PyTorch."""
  x = torch.from_numpy(np.array(feature)).permute(0, 3, 1, 2)
  with torch.no_grad():
    pooled = made["projector"].transfer(x).mean((2, 3))
  head = made["teacher_variables"]["params"]["fc"]
  return pooled.numpy() @ head["kernel"] + head["bias"]


def test_a_simkd_student_and_its_teacher(tiny_files, tmp_path):
  words = conversion.convert_simkd(
    tiny_files["student"],
    tiny_files["teacher"],
    tmp_path / "out",
    model_name="_tiny",
    teacher_name="_tiny_wide",
  )
  assert words.startswith("_tiny with the classifier of _tiny_wide, 10 classes")
  model = store.load(tmp_path / "out")
  assert model.card["trained_on"] == "cifar10"
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  known = data.constants("cifar10")
  x = jnp.asarray((images / 255 - known.mean) / known.std, jnp.float32)
  output = jax.jit(models.create("_tiny", 10).apply)(
    tiny_files["student_variables"], x
  )
  np.testing.assert_allclose(
    model.logits(images),
    torch_logits(tiny_files, output.features["last"]),
    rtol=1e-4,
    atol=1e-4,
  )


def test_a_student_whose_last_stage_is_not_its_last_map(simkd_files, tmp_path):
  made = simkd_files("MobileNetV2", 160, 4)
  conversion.convert_simkd(
    made["student"],
    made["teacher"],
    tmp_path / "out",
    teacher_name="_tiny_wide",
  )
  model = store.load(tmp_path / "out")
  assert model.card["architecture"] == "MobileNetV2"
  fields = model.card["head"]["distiller"]
  assert fields == {"name": "simkd", "factor": 4, "student_map": "stage4"}
  distiller = distillers.create("simkd", factor=4, student_map="stage4")
  stage4 = np.random.default_rng(0).standard_normal((3, 2, 2, 160), np.float32)
  teacher_map = jax.ShapeDtypeStruct((3, 2, 2, 32), jnp.float32)
  last = distiller.apply(
    {kind: tree["distiller"] for kind, tree in model.variables.items()},
    ModelOutputs(None, {"stage4": stage4, "last": None}),
    (ModelOutputs(None, {"last": teacher_map}),),
    method="last_map",
  )
  head = model.variables["params"]["classifier"]
  logits = jnp.mean(last, (1, 2)) @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(
    logits, torch_logits(made, stage4), rtol=1e-4, atol=1e-4
  )


def test_simkd_files_that_do_not_fit(tiny_files, draw, tmp_path):
  seven = draw(models.create("_tiny_wide", 7))
  state_dict = pytorch.to_state_dict("_tiny_wide", seven)
  files.write(tmp_path / "seven.npz", {"model": state_dict})
  given = {
    "student": tiny_files["student"],
    "teacher": tiny_files["teacher"],
    "to": tmp_path / "new" / "out",
    "model_name": "_tiny",
    "teacher_name": "_tiny_wide",
  }
  for changed, words in (
    ({"factor": 4}, r"the teacher's channels over --factor.* 16 of 32 .*4\."),
    ({"factor": 0}, "and the factor 0"),
    ({"model_name": "resnet8"}, "fit resnet8 with 10"),
    ({"teacher_name": "resnet8"}, r"teacher\.pth: .*fit resnet8 with 10"),
    ({"num_classes": 9}, "fit _tiny_wide with 9"),
    ({"student": given["teacher"]}, "'model' and 'proj', got a file without"),
    ({"teacher": given["student"]}, "got a SimKD student, which predicts"),
    ({"teacher": tmp_path / "seven.npz"}, r"student\.pth: .*fit _tiny with 7"),
    ({"to": tmp_path / "seven.npz"}, r"seven\.npz: expected a file that does"),
  ):
    with pytest.raises(ValueError, match=words):
      conversion.convert_simkd(**{**given, **changed})
  with pytest.raises(ValueError, match=r"SimKD student.*--simkd_student .*pth"):
    conversion.convert(given["student"], given["to"], model_name="_tiny")
  assert [p.name for p in tmp_path.iterdir()] == ["seven.npz"]


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
def test_projectors_that_do_not_fit(change, words, tiny_files, tmp_path):
  content = torch.load(tiny_files["student"], weights_only=True)
  content["proj"] = {
    name.removeprefix("module."): tensor
    for name, tensor in content["proj"].items()
  }
  change(content["proj"])
  torch.save(content, tmp_path / "changed.pth")
  with pytest.raises(ValueError, match=rf"changed\.pth: .*{words}"):
    conversion.convert_simkd(
      tmp_path / "changed.pth",
      tiny_files["teacher"],
      tmp_path / "out",
      model_name="_tiny",
      teacher_name="_tiny_wide",
    )
  assert [p.name for p in tmp_path.iterdir()] == ["changed.pth"]
