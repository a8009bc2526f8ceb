"""Every form of a model predicts what the model does, on real images."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from kd_jax import data
from kd_jax.interop import card as card_lib
from kd_jax.interop import files, formats, opening, simkd_parts, store
from kd_jax.interop import model as model_lib
from kd_jax.interop import program as program_lib


@pytest.fixture(scope="module")
def images():
  """64 handwritten digits."""
  return data.load("digits", split="test", image_size=16).images[:64]


def reused_head(**more):
  return card_lib.reused_head({"name": "simkd", "factor": 2}, **more)


HEADS = {
  "alone": None,
  "simkd": reused_head(names=["_tiny_wide"], weights=[1.0], maps=[[4, 4, 32]]),
  "several": reused_head(
    names=["_tiny_wide", "_tiny"],
    weights=[1.0, 2.0],
    maps=[[4, 4, 32], [2, 2, 8]],
  ),
}


def make_model(head, draw):
  known = data.constants("digits")
  card = card_lib.make(
    "_tiny",
    num_classes=10,
    image_shape=(16, 16, 3),
    class_names=known.class_names,
    mean=known.mean,
    std=known.std,
    trained_on="digits",
    data_options={"image_size": 16},
    head=head,
    method="simkd" if head else "none",
  )
  return model_lib.Model(card, draw(model_lib.build(card), 16))


@pytest.fixture(scope="module", params=HEADS)
def model(request, draw):
  """A model of each kind."""
  return make_model(HEADS[request.param], draw)


@pytest.fixture(scope="module")
def alone(draw):
  return make_model(None, draw)


@pytest.fixture(scope="module")
def simkd(draw):
  return make_model(HEADS["simkd"], draw)


@pytest.fixture(scope="module")
def expected(model, images):
  logits = np.asarray(model.logits(images))
  assert logits.std() > 0.1
  return logits


def error(logits, expected):
  logits = np.asarray(logits)
  assert logits.shape == expected.shape and logits.dtype == np.float32
  return np.abs(logits - expected).max() / np.abs(expected).max()


def assert_same_variables(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("ending", ["", ".pth", ".safetensors", ".npz"])
def test_to_a_file_and_back(ending, model, tmp_path):
  to = tmp_path / f"student{ending}"
  words = formats.save(model, to)
  assert "_tiny" in words and "10 classes" in words
  options = {}
  if model.card["head"] is None and ending in (".pth", ".npz"):
    # A bare state dict says nothing but its tensors.
    origin = opening.Origin("digits", image_size=16)
    options = {"model_name": "_tiny", "origin": origin}
  back = opening.open_model(to, **options)
  assert_same_variables(back.variables, model.variables)
  about = {k: v for k, v in back.card.items() if k != card_lib.SEAL}
  assert about == json.loads(json.dumps(model.card))


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
  assert sorted(tmp_path.iterdir()) == sorted([to, *weights])
  program = jax.export.deserialize(bytearray(to.read_bytes()))
  assert set(program.platforms) == {"cpu", "cuda"}
  if inside:  # any batch size
    assert error(program.call(images[:3]), expected[:3]) < 1e-5
  if model.card["head"] is None:
    assert error(run_program(to, images, *weights), expected) < 1e-5
  elif not inside:
    flat = safetensors.numpy.load_file(*weights)
    assert error(program.call(flat, images), expected) < 1e-5


def test_no_flipped_bit_of_a_program_goes_unseen(alone, tmp_path):
  to = tmp_path / "student.stablehlo"
  formats.save(alone, to)
  assert program_lib.read(to).platforms == program_lib.PLATFORMS
  raw = bytearray(to.read_bytes())
  for bit in range(3, 8 * (len(raw) - 100), len(raw) // 5):
    raw[bit // 8] ^= 1 << bit % 8
    to.write_bytes(raw)
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"stablehlo: .*its sha256 differs"):
      program_lib.read(to)
  to.write_bytes(raw[:100])
  with pytest.raises(ValueError, match="cut short or damaged"):
    program_lib.read(to)


def test_targets_that_are_refused(alone, tmp_path):
  for name in ("student.stablehlo", "student.safetensors"):
    folder = tmp_path / name.partition(".")[2]
    folder.mkdir()
    (folder / name).write_text("years")
    with pytest.raises(ValueError, match=rf"{name}: expected a file that does"):
      formats.save(alone, folder / "student.stablehlo", weights_inside=False)
    assert [p.name for p in folder.iterdir()] == [name]
  before = sorted(tmp_path.iterdir())
  with pytest.raises(ValueError, match=r"weights beside .* in \.stablehlo"):
    formats.save(alone, tmp_path / "folder", weights_inside=False)
  for name in ("x.onnx", "x.v2", "x.bin"):
    words = r"has no ending, or .* \.pth, .*\.npz, \.stablehlo, got '\.\w+'"
    with pytest.raises(ValueError, match=words):
      formats.save(alone, tmp_path / name)
  assert sorted(tmp_path.iterdir()) == before


def test_folded(model, expected, images, tmp_path):
  folded = formats.transform(model, fold_batch_norm=True)
  assert error(folded.logits(images), expected) < 1e-5
  formats.save(folded, tmp_path / "folded")
  loaded = store.load(tmp_path / "folded")
  assert loaded.card["batch_norm_folded"]
  assert_same_variables(loaded.variables, folded.variables)
  parts = simkd_parts.to_parts(loaded)
  names = [name for tensors in parts.values() for name in tensors]
  assert not [n for n in names if "running_" in n or ".bn" in n]
  formats.save(loaded, tmp_path / "folded.safetensors")
  with pytest.raises(ValueError, match="which a state dict cannot undo"):
    opening.open_model(tmp_path / "folded.safetensors")
  if model.card["head"] is None:
    content = safetensors.torch.load_file(tmp_path / "folded.safetensors")
    logits = torch_logits(content, images, None, folded=True)
    assert error(logits, expected) < 1e-5


def test_bfloat16(simkd, images, tmp_path):
  half = formats.transform(simkd, dtype="bfloat16")
  expected = np.asarray(simkd.logits(images))
  assert 1e-5 < error(half.logits(images), expected) < 2e-2
  for name in ("folder", "file.pth", "file.safetensors", "file.stablehlo"):
    formats.save(half, tmp_path / name)
  loaded = store.load(tmp_path / "folder")
  assert_same_variables(loaded.variables, half.variables)
  kernels = [x for x in jax.tree.leaves(loaded.variables) if x.ndim == 4]
  assert {x.dtype for x in kernels} == {jnp.dtype("bfloat16")}
  back = opening.open_model(tmp_path / "file.safetensors")
  assert np.array_equal(back.logits(images), half.logits(images))
  content = bytearray((tmp_path / "file.stablehlo").read_bytes())
  logits = jax.export.deserialize(content).call(images)
  assert error(logits, expected) < 2e-2
  tensors = torch.load(tmp_path / "file.pth", weights_only=True)["model"]
  assert tensors["conv1.weight"].dtype == torch.bfloat16
  assert tensors["bn1.weight"].dtype == torch.float32
  with pytest.raises(ValueError, match=r"bfloat16, which \.npz cannot hold"):
    formats.save(half, tmp_path / "file.npz")
  with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'int8'"):
    formats.transform(simkd, dtype="int8")


# By PyTorch: networks that are not ours.


def conv(inputs, outputs, kernel, stride=1, folded=False):
  """A convolution and its BatchNorm, which may be folded into it."""
  layer = torch.nn.Conv2d(
    inputs, outputs, kernel, stride, padding=kernel // 2, bias=folded
  )
  norm = torch.nn.BatchNorm2d(outputs)
  return layer, torch.nn.Identity() if folded else norm


class BasicBlock(torch.nn.Module):
  def __init__(self, inputs, width, stride, folded):
    super().__init__()
    self.conv1, self.bn1 = conv(inputs, width, 3, stride, folded)
    self.conv2, self.bn2 = conv(width, width, 3, 1, folded)
    self.downsample = torch.nn.Sequential()
    if stride != 1:
      self.downsample = torch.nn.Sequential(
        *conv(inputs, width, 1, stride, folded)
      )

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet8(torch.nn.Module):
  """The tests' tiny ResNet-8 as PyTorch's users write it."""

  def __init__(self, folded=False):
    super().__init__()
    self.conv1, self.bn1 = conv(3, 4, 3, 1, folded)
    sizes = ((4, 4, 1), (4, 8, 2), (8, 8, 2))
    for i, size in enumerate(sizes, start=1):
      block = torch.nn.Sequential(BasicBlock(*size, folded))
      self.add_module(f"layer{i}", block)
    self.fc = torch.nn.Linear(8, 10)

  def maps(self, x):
    x = torch.relu(self.bn1(self.conv1(x)))
    return self.layer3(self.layer2(self.layer1(x)))


def within(flat, part):
  """The tensors whose names begin with a part's."""
  return {
    name.removeprefix(f"{part}."): tensor
    for name, tensor in flat.items()
    if name.startswith(f"{part}.")
  }


def torch_logits(content, images, head, projector=None, folded=False):
  known = data.constants("digits")
  x = (images / 255 - known.mean) / known.std
  x = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))
  network = ResNet8(folded)
  with torch.no_grad():
    network.load_state_dict(content if head is None else content["model"])
    maps = network.eval().maps(x)
    if head is None:
      return network.fc(maps.mean((2, 3))).numpy()
    pooled = []
    for i, (height, _, channels) in enumerate(head["teacher_maps"]):
      module = projector(8, channels, 2)
      tensors = content["proj"]
      if len(head["teacher_maps"]) > 1:
        tensors = within(tensors, str(i))
      module.load_state_dict(tensors)
      small = torch.nn.functional.adaptive_avg_pool2d(maps, height)
      pooled.append(module.eval().transfer(small).mean((2, 3)))
    classifier = content["classifier"]
    return torch.nn.functional.linear(
      torch.cat(pooled, 1), classifier["weight"], classifier["bias"]
    ).numpy()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_pytorch_predicts_the_same(
  ending, model, expected, images, tmp_path, torch_projector
):
  head, to = model.card["head"], tmp_path / f"student{ending}"
  formats.save(model, to)
  if ending == ".pth":
    content = torch.load(to, weights_only=True)
  else:
    content = safetensors.torch.load_file(to)
    if head is not None:
      parts = ("model", "proj", "classifier")
      content = {part: within(content, part) for part in parts}
  logits = torch_logits(content, images, head, torch_projector)
  assert error(logits, expected) < 1e-5


def test_damaged_files_of_parts(simkd, tmp_path):
  parts, written = simkd_parts.to_parts(simkd), simkd.card
  first = next(iter(parts["proj"]))
  path = tmp_path / "a.npz"
  for change, card, words in (
    (lambda p: p["proj"].pop(first), written, r"projector from .*Missing \(1"),
    (lambda p: p["classifier"].pop("bias"), written, "teacher's classifier"),
    (lambda p: p["model"].pop("fc.bias"), written, "fit _tiny with 10 classes"),
    (lambda p: p.pop("classifier"), written, "fit the teacher's classifier"),
    (len, {**written, "format": "x"}, "model card of format 'kd_jax export"),
    (len, None, "Make one model of both with python"),
  ):
    changed = {part: dict(tensors) for part, tensors in parts.items()}
    change(changed)
    files.write(path, changed, card=card)
    with pytest.raises(ValueError, match=rf"a\.npz: .*{words}"):
      opening.open_model(path)
    path.unlink()


@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_a_card_imports_no_code(ending, alone, tmp_path, monkeypatch):
  """A stranger's file must not run a module that its reader never named."""
  (tmp_path / "stranger.py").write_text(
    "from kd_jax.models import MODELS\nnet = MODELS['_tiny']\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "stranger", raising=False)
  name, to = "stranger:net", tmp_path / f"model{ending}"
  card = {**alone.card, "architecture": name}
  if ending:
    files.write(to, simkd_parts.to_parts(alone), card=card)
  else:
    store.write(model_lib.Model(card, alone.variables), to)
  with pytest.raises(ValueError, match=rf"asks for {name}.*give {name} as"):
    opening.open_model(to)
  with pytest.raises(ValueError, match=f"asks for {name}"):
    opening.name_of(to)
  assert "stranger" not in sys.modules
  model = opening.open_model(to, model_name=name)
  assert type(model.network) is type(alone.network)
