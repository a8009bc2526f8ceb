"""Files of weights, as other toolboxes write them and as attackers do."""

import argparse
import collections
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors

from kd_jax import models
from kd_jax.interop import files, pytorch

LEGACY = {"_use_new_zipfile_serialization": False}
ZIP: dict[str, bool] = {}


@pytest.fixture(scope="module")
def tensors():
  """The state dict of a tiny network."""
  rng = np.random.default_rng(0)
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  shapes = jax.eval_shape(
    models.create("_tiny", 5).init, jax.random.key(0), image
  )
  variables = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes
  )
  return pytorch.to_state_dict("_tiny", variables)


def as_torch(tensors):
  return collections.OrderedDict(
    (name, torch.tensor(array)) for name, array in tensors.items()
  )


def read_tensors(path):
  return files.network_alone(path, files.read(path))


def assert_same(got, expected):
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    assert got[name].dtype == array.dtype, name
    assert got[name].shape == array.shape, name
    np.testing.assert_array_equal(got[name], array, err_msg=name)


# What is read.


@pytest.mark.parametrize("layout", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", [None, *files.CONTAINERS])
def test_pytorchs_files(layout, container, tensors, tmp_path):
  content = as_torch(tensors)
  if container:
    content = {"epoch": 240, container: content, "optimizer": {"state": {}}}
  torch.save(content, tmp_path / "a.pth", **layout)
  assert_same(read_tensors(tmp_path / "a.pth"), tensors)


@pytest.mark.parametrize("suffix", [".pt", ".pth.tar", ".bin", ".PTH"])
def test_other_endings_of_pytorchs_files(suffix, tensors, tmp_path):
  path = tmp_path / f"a{suffix}"
  torch.save(as_torch(tensors), path)
  assert files.is_weights_file(path)
  assert_same(read_tensors(path), tensors)


def test_safetensors_and_npz(tensors, tmp_path):
  safetensors.save_file(tensors, tmp_path / "a.safetensors")
  np.savez(tmp_path / "a.npz", **tensors)
  np.savez_compressed(tmp_path / "b.npz", **tensors)
  for name in ("a.safetensors", "a.npz", "b.npz"):
    assert_same(read_tensors(tmp_path / name), tensors)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz"])
def test_written_and_read_again(suffix, tensors, tmp_path):
  path = tmp_path / "new folder" / f"a{suffix}"
  files.write(path, {"model": tensors})
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  assert_same(read_tensors(path), tensors)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r"does not exist yet.*give another"):
    files.write(path, {"model": {}})
  assert path.read_bytes() == before


def test_written_for_load_state_dict(tmp_path):
  linear = torch.nn.Linear(3, 2)
  weights = {"weight": np.ones((2, 3)).T.T, "bias": np.arange(2.0)}
  weights = {k: v.astype(np.float32) for k, v in weights.items()}
  files.write(tmp_path / "a.pth", {"model": weights})
  linear.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
  assert linear.bias.tolist() == [0, 1]


def test_unknown_format_to_write(tmp_path):
  with pytest.raises(ValueError, match=r"ends in \.pth, .*got '\.h5'"):
    files.write(tmp_path / "new" / "a.h5", {"model": {}})
  assert not list(tmp_path.iterdir())


def test_prefixes_of_wrappers_are_removed(tensors, tmp_path):
  wrapped = {f"module._orig_mod.{k}": v for k, v in tensors.items()}
  torch.save({"model": as_torch(wrapped)}, tmp_path / "a.pth")
  np.savez(tmp_path / "a.npz", **wrapped)
  for name in ("a.pth", "a.npz"):
    assert_same(read_tensors(tmp_path / name), tensors)
  torch.save({"fc.bias": torch.ones(2), "module.fc.bias": torch.ones(2)},
             tmp_path / "b.pth")  # fmt: skip
  with pytest.raises(ValueError, match=r"b\.pth: .*'fc\.bias' twice"):
    read_tensors(tmp_path / "b.pth")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(dtype, tmp_path):
  values = np.array([1.5, -2, 0.25], np.float32)
  cast = values.astype(getattr(ml_dtypes, dtype, dtype))
  torch.save(
    {"a": torch.tensor(values).to(getattr(torch, dtype))}, tmp_path / "a.pth"
  )
  safetensors.save_file({"a": cast}, tmp_path / "a.safetensors")
  if dtype != "bfloat16":  # which numpy's format does not know
    np.savez(tmp_path / "a.npz", a=cast)
  for path in tmp_path.iterdir():
    assert_same(read_tensors(path), {"a": values})


def test_views_and_parameters(tmp_path):
  base = torch.arange(12.0)
  linear = torch.nn.Linear(2, 2)
  content = {
    "view": base.view(3, 4).t(),
    "parameter": linear.weight,
    "number": torch.tensor(7),
  }
  for layout in (ZIP, LEGACY):
    torch.save(content, tmp_path / "a.pth", **layout)
    got = read_tensors(tmp_path / "a.pth")
    np.testing.assert_array_equal(got["view"], np.arange(12.0).reshape(3, 4).T)
    np.testing.assert_array_equal(
      got["parameter"], linear.weight.detach().numpy()
    )
    assert got["number"] == 7


def test_what_toolboxes_put_beside_the_weights(tensors, tmp_path):
  state_dict = as_torch(tensors)
  optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], momentum=0.9)
  contents = {
    "simkd": {"epoch": 3, "model": state_dict, "best_acc": torch.tensor(71.5)},
    "repdistiller_last": {
      "opt": argparse.Namespace(model="resnet8", milestones=[150, 180], lr=0.1),
      "model": state_dict,
      "optimizer": optimizer.state_dict(),
    },
    "mdistiller": {
      "epoch": 240,
      "model": state_dict,
      "best_acc": np.float64(72.5),
      "array": np.float32(1.0),
    },
  }
  facts, allowed = {}, torch.serialization.get_safe_globals()
  for layout in (ZIP, LEGACY):
    for name, content in contents.items():
      torch.save(content, tmp_path / "a.pth", **layout)
      weights = files.read(tmp_path / "a.pth")
      assert_same(weights.tensors, tensors)
      assert weights.projector is None
      facts[name] = weights.facts
  assert facts == {
    "simkd": {"epoch": 3, "best_acc": 71.5},
    "repdistiller_last": {},
    "mdistiller": {"epoch": 240},
  }
  # What was let in for one file is not for the rest of the process.
  assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_a_simkd_student(tensors, tmp_path):
  path = tmp_path / "student.pth"
  projector = {"module.transfer.0.weight": torch.ones(4, 8, 1, 1)}
  torch.save({"model": as_torch(tensors), "proj": projector}, path)
  weights = files.read(path)
  assert_same(weights.tensors, tensors)
  assert weights.projector["transfer.0.weight"].shape == (4, 8, 1, 1)
  with pytest.raises(ValueError, match=r"SimKD student.*--simkd_student .*pth"):
    files.load_variables(path, model_name="_tiny", num_classes=5)


# What is refused.


class Call:
  """Pickles as a call, which unpickling makes."""

  def __init__(self, function, *arguments):
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


ATTACKS = {
  "posix.mkdir": lambda victim: Call(os.mkdir, victim),
  "shutil.copyfile": lambda victim: Call(shutil.copyfile, __file__, victim),
  "exec": lambda victim: Call(exec, f"import os; os.mkdir({victim!r})"),
}


@pytest.mark.parametrize("wanted", ATTACKS)
@pytest.mark.parametrize("layout", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["beside", "as a tensor", "in the options"])
def test_files_that_run_code(wanted, layout, where, tensors, tmp_path):
  victim = tmp_path / "created"
  attack = ATTACKS[wanted](str(victim))
  state_dict = as_torch(tensors)
  content = {"model": state_dict, "opt": attack}
  if where == "as a tensor":
    state_dict["fc.bias"] = attack
    content = state_dict
  elif where == "in the options":
    content["opt"] = argparse.Namespace(model=attack)
  path = tmp_path / "a.pth"
  torch.save(content, path, **layout)
  with pytest.raises(ValueError, match=r"a\.pth is refused.*executed") as e:
    files.read(path)
  assert f"asks for the global {wanted}," in str(e.value)
  assert not victim.exists()
  # It would have worked.
  torch.load(path, weights_only=False)
  assert victim.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_bare_pickles_that_run_code(protocol, tmp_path):
  victim, path = tmp_path / "created", tmp_path / "a.pth"
  content = pickle.dumps(Call(os.mkdir, str(victim)), protocol)
  path.write_bytes(content)
  words = "is no checkpoint" if protocol == 0 else r"global posix\.mkdir"
  with pytest.raises(ValueError, match=words):
    files.read(path)
  assert not victim.exists()
  pickle.loads(content)
  assert victim.exists()


def test_code_behind_a_newer_protocol(tensors, tmp_path):
  victim, path = tmp_path / "created", tmp_path / "a.pth"
  content = {"model": as_torch(tensors), "x": Call(os.mkdir, str(victim))}
  for layout in (ZIP, LEGACY):
    torch.save(content, path, pickle_protocol=4, **layout)
    with pytest.raises(ValueError, match=r"the global posix\.mkdir"):
      files.read(path)
    torch.save(content["model"], path, pickle_protocol=4, **layout)
    with pytest.raises(ValueError, match=r"another protocol .*Save it again"):
      files.read(path)
  assert not victim.exists()


def test_pickled_objects_in_npz(tmp_path):
  victim, path = tmp_path / "created", tmp_path / "a.npz"
  attack = np.array([Call(os.mkdir, str(victim))], object)
  np.savez(path, **{"conv1.weight": np.ones(3), "fc.bias": attack})
  with pytest.raises(
    ValueError, match=r"a\.npz is refused: fc\.bias is a pick"
  ):
    files.read(path)
  assert not victim.exists()
  np.load(path, allow_pickle=True)["fc.bias"]
  assert victim.exists()


def test_a_whole_network_is_named(tmp_path):
  torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
  with pytest.raises(
    ValueError, match=r"global torch\.nn\.\S+\.Linear.*state_"
  ):
    files.read(tmp_path / "a.pth")


def _write_all(folder, tensors):
  content = as_torch(tensors)
  torch.save(content, folder / "zip.pth")
  torch.save(content, folder / "legacy.pth", **LEGACY)
  safetensors.save_file(tensors, folder / "a.safetensors")
  np.savez(folder / "a.npz", **tensors)
  return sorted(folder.iterdir())


def test_files_cut_short(tensors, tmp_path):
  (tmp_path / "whole").mkdir()
  paths = _write_all(tmp_path / "whole", tensors)
  for whole in paths:
    raw = whole.read_bytes()
    assert_same(read_tensors(whole), tensors)
    path = tmp_path / whole.name
    for length in (9, 60, len(raw) // 3, len(raw) // 2, len(raw) - 1):
      path.write_bytes(raw[:length])
      with pytest.raises(ValueError, match=r"cut short|no checkpoint") as e:
        files.read(path)
      assert str(path) in str(e.value)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"cut short or damaged .*it again"):
      files.read(path)


def test_a_value_that_changed_on_the_way(tmp_path):
  values = torch.arange(1000.0)
  torch.save({"a": values}, tmp_path / "a.pth")
  raw = bytearray((tmp_path / "a.pth").read_bytes())
  place = raw.index(values.numpy().tobytes())
  raw[place + 50] ^= 1
  (tmp_path / "a.pth").write_bytes(bytes(raw))
  with pytest.raises(ValueError, match=r"damaged .*checksum of a/data/0 is"):
    files.read(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "is empty"),
    (b"epoch,loss\n1,0.5\n", r"no checkpoint.*begins with b'epoch,loss"),
    (b"<!DOCTYPE html><html>", "web page: download"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "no checkpoint"),
    (bytes(range(256)), "no checkpoint"),
  ],
)
def test_files_that_are_no_checkpoint(suffix, content, words, tmp_path):
  path = tmp_path / f"a{suffix}"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=words) as e:
    files.read(path)
  assert str(path) in str(e.value)


def test_archives_that_are_no_checkpoint(tmp_path):
  for name in ("a.pth", "b.npz", "c.pth"):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
      archive.writestr("x/constants.pkl" if name[0] == "c" else "x/a.txt", "?")
  with tarfile.open(tmp_path / "d.tar", "w") as tar:
    tar.add(tmp_path / "a.pth", "photo.jpg")
  for name, words in (
    ("a.pth", r"no checkpoint.*zip archive of x/a\.txt"),
    ("b.npz", "no checkpoint|damaged|expected"),
    ("c.pth", r"TorchScript.*state_dict\(\)"),
    ("d.tar", r"tar archive.*before 2017.*save it again"),
  ):
    with pytest.raises(ValueError, match=words):
      files.read(tmp_path / name)


def test_paths_that_are_no_file(tmp_path):
  with pytest.raises(ValueError, match=r"a\.pth does not exist"):
    files.read(tmp_path / "a.pth")
  (tmp_path / "b.pth").mkdir()
  with pytest.raises(ValueError, match="got a folder"):
    files.read(tmp_path / "b.pth")
  assert not files.is_weights_file(tmp_path / "b.pth")
  assert not files.is_weights_file(tmp_path / "run")
  (tmp_path / "c.h5").write_text("x")
  assert files.is_weights_file(tmp_path / "c.h5")
  with pytest.raises(ValueError, match=r"ends in .*\.npz, got '\.h5'.*Rename"):
    files.read(tmp_path / "c.h5")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (torch.ones(3), "expected a dict of tensors, got ndarray"),
    ([1, 2], "expected a dict of tensors, got list"),
    ({}, "expected tensors.*got nothing"),
    ({"epoch": 3, "weights": {"a": torch.ones(2)}}, r"got epoch, weights\."),
    (
      {"model": {"a": torch.ones(2)}, "net": {"a": torch.ones(2)}},
      "got 2: model and net",
    ),
    ({"a": torch.ones(2).to_sparse()}, r"a: expected a dense.*sparse_coo"),
  ],
)
def test_contents_that_are_no_state_dict(content, words, tmp_path):
  torch.save(content, tmp_path / "a.pth")
  with pytest.raises(ValueError, match=rf"a\.pth: .*{words}"):
    files.read(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value, tensors, tmp_path):
  wrong = {
    **tensors,
    "layer1.0.bn1.weight": tensors["layer1.0.bn1.weight"].copy(),
  }
  wrong["layer1.0.bn1.weight"][1] = value
  for path in _write_all(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"1 NaN or inf.*layer1\.0\.bn1\.weig"):
      files.read(path)
  # Also where float32 cannot hold it.
  np.savez(tmp_path / "large.npz", a=np.array([1e300]))
  with pytest.raises(ValueError, match=r"large\.npz: .* in a\."):
    files.read(tmp_path / "large.npz")


def test_few_values_that_pretend_to_be_many(tmp_path):
  content = {"a": torch.ones(1, dtype=torch.float16).expand(10**6, 10**6)}
  torch.save(content, tmp_path / "a.pth")
  with pytest.raises(ValueError, match=r"1000000.*which no network has"):
    files.read(tmp_path / "a.pth")


def test_without_pytorch(tensors, tmp_path, monkeypatch):
  paths = _write_all(tmp_path, tensors)
  monkeypatch.delitem(sys.modules, "kd_jax.interop.torch_files", raising=False)
  from kd_jax import interop

  monkeypatch.delattr(interop, "torch_files", raising=False)
  monkeypatch.setitem(sys.modules, "torch", None)
  for path in paths:
    if path.name in ("zip.pth", "legacy.pth"):
      with pytest.raises(
        ImportError, match=r'takes PyTorch.*"kd_jax\[torch\]"'
      ):
        files.read(path)
    else:
      assert_same(read_tensors(path), tensors)
  with pytest.raises(ImportError, match=r"new\.pth: .*takes PyTorch"):
    files.write(tmp_path / "new.pth", {"model": tensors})
  assert sorted(tmp_path.iterdir()) == paths


def test_a_pytorch_that_is_not_safe(tensors, tmp_path, monkeypatch):
  torch.save(as_torch(tensors), tmp_path / "a.pth")
  monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
  with pytest.raises(
    ImportError, match=r"2\.9\.1\+cpu can be .*2\.10 or newer"
  ):
    files.read(tmp_path / "a.pth")


# What fits.


def test_variables_of_a_file(tensors, tmp_path):
  torch.save(as_torch(tensors), tmp_path / "a.pth")
  variables = files.load_variables(
    tmp_path / "a.pth", model_name="_tiny", num_classes=5
  )
  assert_same(pytorch.to_state_dict("_tiny", variables), tensors)


def _state_dict_of(name, num_classes):
  variables = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32),
    jax.eval_shape(
      models.create(name, num_classes).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    ),
  )
  return pytorch.to_state_dict(name, variables)


def test_misfits_list_the_tensors_and_say_what_the_file_is(tmp_path):
  path = pathlib.Path(tmp_path / "a.npz")
  np.savez(path, **_state_dict_of("resnet8x2", 7))
  with pytest.raises(ValueError, match="do not fit resnet8 with 7") as e:
    files.load_variables(path, model_name="resnet8", num_classes=7)
  message = str(e.value)
  assert message.startswith(f"{path}: ")
  assert "Misshapen (41): " in message
  assert "bn1.bias (expected [16], got [32])" in message
  assert "Unexpected (6): layer1.0.downsample.0.weight" in message
  assert message.endswith("It looks like resnet8x2 with 7 classes.")
  with pytest.raises(ValueError, match="fit resnet8x2 with 100") as e:
    files.load_variables(path, model_name="resnet8x2", num_classes=100)
  message = str(e.value)
  assert "fc.bias (expected [100], got [7])" in message
  assert message.endswith("It looks like resnet8x2 with 7 classes.")
  with pytest.raises(ValueError, match=r"unknown model 'resnet8x3'.* like"):
    files.load_variables(path, model_name="resnet8x3", num_classes=7)


def test_a_misfit_of_an_unknown_network(tensors, tmp_path):
  np.savez(tmp_path / "a.npz", **tensors)
  with pytest.raises(ValueError, match="fit resnet8 with 5") as e:
    files.load_variables(
      tmp_path / "a.npz", model_name="resnet8", num_classes=5
    )
  assert "looks like" not in str(e.value)
