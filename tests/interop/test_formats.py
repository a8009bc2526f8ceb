"""Every form of a model predicts what the model does, on real images."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kd_jax import data
from kd_jax.interop import card as card_lib
from kd_jax.interop import files, formats, opening, simkd_parts, store
from kd_jax.interop import model as model_lib

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images():
  """64 handwritten digits."""
  source = data.load("digits", split="test", image_size=16)
  return source.images[:64]


def card(**more):
  known = data.constants("digits")
  return card_lib.make(
    "_tiny",
    num_classes=10,
    image_shape=(16, 16, 3),
    class_names=known.class_names,
    mean=known.mean,
    std=known.std,
    trained_on="digits",
    data_options={"image_size": 16},
    **more,
  )


HEADS = {
  "alone": None,
  "simkd": card_lib.reused_head(
    {"name": "simkd", "factor": 2},
    names=["_tiny_wide"],
    weights=[1.0],
    maps=[[4, 4, 32]],
  ),
  "several": card_lib.reused_head(
    {"name": "simkd", "factor": 2},
    names=["_tiny_wide", "_tiny"],
    weights=[1.0, 2.0],
    maps=[[4, 4, 32], [2, 2, 8]],
  ),
}


@pytest.fixture(scope="module", params=HEADS)
def model(request, images):
  """A model whose BatchNorm has seen the images, of each kind."""
  head = HEADS[request.param]
  written = card(head=head, method="simkd" if head else "none")
  network = model_lib.build(written)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    value = rng.standard_normal(leaf.shape, np.float32)
    if path[-1].key in ("var", "scale"):
      return np.abs(value) / 5 + np.float32(0.8)
    if path[-1].key == "kernel":
      return value * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
    return value / 8

  shapes = jax.eval_shape(
    lambda key, x: network.init(key, x, train=False),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32),
  )
  return model_lib.Model(
    written, jax.tree_util.tree_map_with_path(draw, shapes)
  )


@pytest.fixture(scope="module")
def expected(model, images):
  logits = np.asarray(model.logits(images))
  assert logits.std() > 0.1
  return logits


def error(logits, expected):
  assert logits.shape == expected.shape and logits.dtype == np.float32
  return np.abs(logits - expected).max() / np.abs(expected).max()


def assert_same_variables(ours, theirs):
  flat = [jax.tree_util.tree_leaves_with_path(t) for t in (ours, theirs)]
  assert [p for p, _ in flat[0]] == [p for p, _ in flat[1]]
  for (path, a), (_, b) in zip(*flat, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("ending", ["", ".pth", ".safetensors", ".npz"])
def test_to_a_file_and_back(ending, model, expected, images, tmp_path):
  to = tmp_path / f"student{ending}"
  words = formats.save(model, to)
  assert "_tiny" in words and "10 classes" in words
  if model.card["head"] is None and ending in (".pth", ".npz"):
    # A bare state dict says nothing but its tensors.
    options = {
      "model_name": "_tiny",
      "origin": opening.Origin("digits", image_size=16),
    }
  else:
    options = {}
  back = opening.open_model(to, **options)
  assert_same_variables(back.variables, model.variables)
  if not options:
    assert back.card == json.loads(json.dumps(model.card))
  assert np.array_equal(back.logits(images), expected) or (
    # another data set's constants, from its training images
    error(np.asarray(back.logits(images)), expected) < 0.2
  )


def run_program(program, images, *weights):
  """The logits of a program in a process without this package."""
  folder = program.parent
  np.save(folder / "images.npy", images)
  code = """
import sys
import jax.export
import numpy as np
from safetensors.numpy import load_file
assert not any(name.startswith("kd_jax") for name in sys.modules)
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
weights = [load_file(name) for name in sys.argv[2:]]
np.save("logits.npy", program.call(*weights, np.load("images.npy")))
"""
  subprocess.run(
    [sys.executable, "-I", "-c", code, str(program), *map(str, weights)],
    cwd=folder,
    check=True,
  )
  return np.load(folder / "logits.npy")


@pytest.mark.parametrize("inside", [True, False])
def test_program(inside, model, expected, images, tmp_path):
  to = tmp_path / "student.stablehlo"
  words = formats.save(model, to, weights_inside=inside)
  weights = [] if inside else [tmp_path / "student.safetensors"]
  where = "inside" if inside else "in student.safetensors"
  assert words.endswith(f"a StableHLO program with its weights {where}")
  assert sorted(p for p in tmp_path.iterdir()) == sorted([to, *weights])
  program = jax.export.deserialize(bytearray(to.read_bytes()))
  assert set(program.platforms) == {"cpu", "cuda"}
  logits = run_program(to, images, *weights)
  assert error(logits, expected) < 1e-5
  if inside:  # any batch size
    few = np.asarray(program.call(images[:3]))
    assert error(few, expected[:3]) < 1e-5


def test_programs_and_their_weights_are_not_overwritten(model, tmp_path):
  for name in ("student.stablehlo", "student.safetensors"):
    folder = tmp_path / name.partition(".")[2]
    folder.mkdir()
    (folder / name).write_text("years")
    with pytest.raises(ValueError, match=rf"{name}: expected a file that does"):
      formats.save(model, folder / "student.stablehlo", weights_inside=False)
    assert [p.name for p in folder.iterdir()] == [name]
  with pytest.raises(ValueError, match=r"--weights_beside: expected a --to th"):
    formats.save(model, tmp_path / "folder", weights_inside=False)


def test_folded(model, expected, images, tmp_path):
  folded = formats.transform(model, fold_batch_norm=True)
  assert error(np.asarray(folded.logits(images)), expected) < 1e-5
  formats.save(folded, tmp_path / "folded")
  loaded = store.load(tmp_path / "folded")
  assert loaded.card["batch_norm_folded"]
  assert_same_variables(loaded.variables, folded.variables)
  parts = simkd_parts.to_parts(loaded)
  names = [name for tensors in parts.values() for name in tensors]
  assert not [n for n in names if "running_" in n or ".bn" in n]
  formats.save(loaded, tmp_path / "folded.safetensors")
  with pytest.raises(ValueError, match="which this file cannot give back"):
    opening.open_model(tmp_path / "folded.safetensors")


def test_bfloat16(model, expected, images, tmp_path):
  half = formats.transform(model, dtype="bfloat16")
  assert 1e-5 < error(np.asarray(half.logits(images)), expected) < 2e-2
  for name in ("folder", "file.pth", "file.safetensors", "file.stablehlo"):
    formats.save(half, tmp_path / name)
  loaded = store.load(tmp_path / "folder")
  assert_same_variables(loaded.variables, half.variables)
  kernels = [x for x in jax.tree.leaves(loaded.variables) if x.ndim == 4]
  assert {x.dtype for x in kernels} == {jnp.dtype("bfloat16")}
  back = opening.open_model(tmp_path / "file.safetensors")
  assert np.array_equal(back.logits(images), half.logits(images))
  logits = run_program(tmp_path / "file.stablehlo", images)
  assert error(logits, expected) < 2e-2
  content = torch.load(tmp_path / "file.pth", weights_only=True)
  tensors = content if model.card["head"] is None else content["model"]
  assert tensors["conv1.weight"].dtype == torch.bfloat16
  assert tensors["bn1.weight"].dtype == torch.float32
  with pytest.raises(ValueError, match=r"bfloat16, which \.npz cannot hold"):
    formats.save(half, tmp_path / "file.npz")
  with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'int8'"):
    formats.transform(model, dtype="int8")


# By PyTorch: networks that are not ours.


class BasicBlock(torch.nn.Module):
  def __init__(self, inputs, width, stride, folded):
    super().__init__()
    self.conv1 = torch.nn.Conv2d(
      inputs, width, 3, stride, padding=1, bias=folded
    )
    self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=folded)
    self.downsample = None
    norm = torch.nn.BatchNorm2d
    if folded:
      self.bn1, self.bn2 = torch.nn.Identity(), torch.nn.Identity()
    else:
      self.bn1, self.bn2 = norm(width), norm(width)
    if stride != 1 or inputs != width:
      conv = torch.nn.Conv2d(inputs, width, 1, stride, bias=folded)
      after = torch.nn.Identity() if folded else norm(width)
      self.downsample = torch.nn.Sequential(conv, after)

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    if self.downsample is not None:
      x = self.downsample(x)
    return torch.relu(y + x)


class ResNet8(torch.nn.Module):
  """The tests' tiny ResNet-8 as PyTorch's users write it."""

  def __init__(self, folded=False):
    super().__init__()
    self.conv1 = torch.nn.Conv2d(3, 4, 3, padding=1, bias=folded)
    self.bn1 = torch.nn.Identity() if folded else torch.nn.BatchNorm2d(4)
    sizes = ((4, 4, 1), (4, 8, 2), (8, 8, 2))
    for i, size in enumerate(sizes, start=1):
      block = torch.nn.Sequential(BasicBlock(*size, folded))
      self.add_module(f"layer{i}", block)
    self.fc = torch.nn.Linear(8, 10)

  def maps(self, x):
    x = torch.relu(self.bn1(self.conv1(x)))
    return self.layer3(self.layer2(self.layer1(x)))

  def forward(self, x):
    return self.fc(self.maps(x).mean((2, 3)))


class Projector(torch.nn.Module):
  def __init__(self, inputs, channels):
    super().__init__()
    middle = channels // 2
    layers = []
    for a, b, kernel in (
      (inputs, middle, 1),
      (middle, middle, 3),
      (middle, channels, 1),
    ):
      layers += [
        torch.nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False),
        torch.nn.BatchNorm2d(b),
        torch.nn.ReLU(),
      ]
    self.transfer = torch.nn.Sequential(*layers)

  def forward(self, x):
    return self.transfer(x)


def normalized(images):
  known = data.constants("digits")
  x = (images / 255 - known.mean) / known.std
  return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))


def torch_logits(content, images, head, folded=False):
  network = ResNet8(folded)
  x = normalized(images)
  with torch.no_grad():
    if head is None:
      network.load_state_dict(content)
      return network.eval()(x).numpy()
    network.load_state_dict(content["model"])
    maps = network.eval().maps(x)
    pooled = []
    for i, (height, _, channels) in enumerate(head["teacher_maps"]):
      projector = Projector(8, channels)
      tensors = content["proj"]
      if len(head["teacher_maps"]) > 1:
        tensors = {
          k.removeprefix(f"{i}."): v
          for k, v in tensors.items()
          if k.startswith(f"{i}.")
        }
      projector.load_state_dict(tensors)
      small = torch.nn.functional.adaptive_avg_pool2d(maps, height)
      pooled.append(projector.eval()(small).mean((2, 3)))
    classifier = content["classifier"]
    linear = torch.nn.functional.linear
    logits = linear(
      torch.cat(pooled, 1), classifier["weight"], classifier["bias"]
    )
    return logits.numpy()


def test_pytorch_predicts_the_same(model, expected, images, tmp_path):
  head = model.card["head"]
  formats.save(model, tmp_path / "student.pth")
  content = torch.load(tmp_path / "student.pth", weights_only=True)
  assert error(torch_logits(content, images, head), expected) < 1e-5
  from safetensors.torch import load_file

  formats.save(model, tmp_path / "student.safetensors")
  flat = load_file(tmp_path / "student.safetensors")
  if head is not None:
    parts = ("model", "proj", "classifier")
    flat = {
      part: {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in flat.items()
        if name.startswith(f"{part}.")
      }
      for part in parts
    }
  assert error(torch_logits(flat, images, head), expected) < 1e-5


def test_pytorch_predicts_the_same_from_folded_weights(
  model, expected, images, tmp_path
):
  if model.card["head"] is not None:  # the network alone says it
    return
  folded = formats.transform(model, fold_batch_norm=True)
  formats.save(folded, tmp_path / "folded.pth")
  content = torch.load(tmp_path / "folded.pth", weights_only=True)
  assert error(torch_logits(content, images, None, folded=True), expected) < (
    1e-5
  )


def test_files_of_parts_that_are_damaged(model, tmp_path):
  if model.card["head"] is None:
    return
  parts, written = simkd_parts.to_parts(model), model.card
  first = next(iter(parts["proj"]))
  for change, words in (
    (lambda p: p["proj"].pop(first), r"the projector from .* Missing \(1\)"),
    (lambda p: p["classifier"].pop("bias"), "fit the teacher's classifier"),
    (lambda p: p["model"].pop("fc.bias"), r"fit _tiny with 10 classes"),
    (lambda p: p.pop("classifier"), "fit the teacher's classifier"),
  ):
    changed = {part: dict(tensors) for part, tensors in parts.items()}
    change(changed)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
    files.write(path, changed, card=written)
    with pytest.raises(ValueError, match=rf"{path.name}: .*{words}"):
      opening.open_model(path)
  files.write(tmp_path / "old.npz", parts, card={**written, "format": "x"})
  with pytest.raises(ValueError, match=r"model card of format 'kd_jax export"):
    opening.open_model(tmp_path / "old.npz")
  files.write(tmp_path / "none.npz", parts)
  with pytest.raises(ValueError, match="Make one model of both with python"):
    opening.open_model(tmp_path / "none.npz")
