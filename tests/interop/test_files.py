"""Files of weights, as other toolboxes write them and as attackers do."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors

from kd_jax.interop import files, naming

ZIP: dict[str, bool] = {}
LEGACY = {"_use_new_zipfile_serialization": False}
LAYOUTS = pytest.mark.parametrize("save", [ZIP, LEGACY], ids=["zip", "legacy"])


def as_torch(tensors):
  return {name: torch.tensor(array) for name, array in tensors.items()}


def read(path):
  return files.read(path).tensors


@LAYOUTS
@pytest.mark.parametrize("container", [None, *naming.CONTAINERS])
def test_files_of_pytorch(save, container, tensors, assert_same, tmp_path):
  content = as_torch(tensors)
  if container:
    content = {"epoch": 240, container: content, "optimizer": {"state": {}}}
  torch.save(content, tmp_path / "a.pth", **save)
  assert_same(read(tmp_path / "a.pth"), tensors)


@pytest.mark.parametrize("suffix", [".pt", ".pth.tar", ".ckpt", ".th", ""])
@LAYOUTS
def test_other_endings(suffix, save, tensors, assert_same, tmp_path):
  path = tmp_path / f"best{suffix}"
  torch.save(as_torch(tensors), path, **save)
  safetensors.save_file(tensors, tmp_path / f"s{suffix}")
  with (tmp_path / f"n{suffix}").open("wb") as file:
    np.savez(file, **tensors)
  for name in ("best", "s", "n"):
    path = tmp_path / f"{name}{suffix}"
    assert files.is_weights_file(path)
    assert_same(read(path), tensors)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz"])
def test_written_and_read_again(suffix, tensors, assert_same, tmp_path):
  path = tmp_path / "new folder" / f"a{suffix}"
  turned = {k: np.asarray(v, order="F") for k, v in tensors.items()}
  files.write(path, {"model": turned})
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  assert_same(read(path), tensors)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r"does not exist yet.*give another"):
    files.write(path, {"model": {}})
  assert path.read_bytes() == before
  if suffix == ".pth":  # as torch's own users read it
    assert_same(torch.load(path, weights_only=True), as_torch(tensors))
  with pytest.raises(ValueError, match=r"ends in \.pth, .*got '\.h5'"):
    files.write(tmp_path / "b.h5", {"model": {}})


def test_prefixes_of_wrappers(tensors, assert_same, tmp_path):
  wrapped = {f"module._orig_mod.{k}": v for k, v in tensors.items()}
  np.savez_compressed(tmp_path / "a.npz", **wrapped)
  assert_same(read(tmp_path / "a.npz"), tensors)
  np.savez(tmp_path / "b.npz", **tensors, **{"module.fc.bias": np.ones(5)})
  with pytest.raises(ValueError, match=r"b\.npz: .*'fc\.bias' twice"):
    read(tmp_path / "b.npz")


@pytest.mark.parametrize(
  "prefix", ["model.", "backbone.", "net.", "a.b.module.", "module.student."]
)
def test_prefixes_that_all_names_share(prefix, tensors, assert_same, tmp_path):
  wrapped = {prefix + k: v for k, v in as_torch(tensors).items()}
  torch.save({"state_dict": wrapped, "n": 1}, tmp_path / "a")
  assert_same(read(tmp_path / "a"), tensors)
  other = {f"teacher.{k}": v + 1 for k, v in wrapped.items()}
  both = {f"student.{k}": v for k, v in wrapped.items()} | other
  torch.save({"model": both}, tmp_path / "b")
  got = files.read(tmp_path / "b", naming.Names("student")).tensors
  assert_same(got, tensors)
  with pytest.raises(ValueError, match=r"with student\., teacher\."):
    files.read(tmp_path / "b", naming.Names("pupil"))


def test_storages_of_a_gpu(tensors, assert_same, tmp_path):
  file = io.BytesIO()
  torch.save(as_torch(tensors), file, **LEGACY)
  place, gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
  assert place in file.getvalue()
  (tmp_path / "a.pth").write_bytes(file.getvalue().replace(place, gpu))
  assert_same(read(tmp_path / "a.pth"), tensors)


def test_averaged_weights_are_preferred(tensors, assert_same, tmp_path, caplog):
  raw = {k: v + 1 for k, v in as_torch(tensors).items()}
  averaged = {f"module.{k}": v for k, v in as_torch(tensors).items()}
  averaged["n_averaged"] = torch.tensor(7)
  path = tmp_path / "a.pth"
  for key in ("state_dict_ema", "model_ema", "ema", "swa_state"):
    torch.save({"state_dict": raw, key: averaged}, path)
    with caplog.at_level("INFO"):
      assert_same(read(path), tensors)
    assert f"the training ({key}); the average is taken" in caplog.text
    got = files.read(path, naming.Names("state_dict")).tensors
    assert_same(got, {k: v.numpy() for k, v in raw.items()})
  torch.save({"a": raw, "b": raw}, path)
  with pytest.raises(ValueError, match=r"got 2: a and b.*--prefix a"):
    read(path)


@LAYOUTS
def test_harmless_objects_beside_the_weights(
  save, tensors, assert_same, tmp_path
):
  counts = collections.defaultdict(list, a=[1])
  content = {
    **{"model": as_torch(tensors), "history": np.arange(4.0), "n": counts},
    "args": argparse.Namespace(
      out=pathlib.Path("x"), when=datetime.timedelta(1)
    ),
    "at": datetime.datetime(2024, 1, 1),
    "more": types.SimpleNamespace(a=np.float32(1), b=collections.Counter("ab")),
  }
  torch.save(content, tmp_path / "a.pth", **save)
  assert_same(read(tmp_path / "a.pth"), tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(dtype, assert_same, tmp_path):
  values = np.array([1.5, -2, 0.25], np.float32)
  cast = values.astype(getattr(ml_dtypes, dtype, dtype))
  tensor = torch.tensor(values).to(getattr(torch, dtype))
  torch.save({"a": tensor}, tmp_path / "a.pth")
  safetensors.save_file({"a": cast}, tmp_path / "a.safetensors")
  if dtype != "bfloat16":  # which numpy's format does not know
    np.savez(tmp_path / "a.npz", a=cast)
  for path in tmp_path.iterdir():
    assert_same(read(path), {"a": values})


@LAYOUTS
def test_views_parameters_and_what_stands_beside(save, assert_same, tmp_path):
  """RepDistiller saves its options, others a numpy accuracy."""
  linear = torch.nn.Linear(2, 2)
  model = {
    "view": torch.arange(12.0).view(3, 4).t(),
    "parameter": linear.weight,
    "number": torch.tensor(7),
  }
  optimizer = torch.optim.SGD(linear.parameters(), momentum=0.9)
  content = {
    **{"epoch": 3, "best_acc": torch.tensor(71.5), "acc": np.float64(72.5)},
    "opt": argparse.Namespace(model="resnet8", milestones=[150, 180], lr=0.1),
    **{"model": model, "optimizer": optimizer.state_dict()},
  }
  torch.save(content, tmp_path / "a.pth", **save)
  allowed = set(torch.serialization.get_safe_globals())
  weights = files.read(tmp_path / "a.pth")
  expected = {name: value.detach().numpy() for name, value in model.items()}
  assert_same(weights.tensors, expected)
  assert weights.metadata == {"epoch": 3, "best_acc": 71.5}
  assert weights.projector is None
  # What was let in for one file is not for the rest of the process.
  assert set(torch.serialization.get_safe_globals()) == allowed


# Files that are refused.


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
@LAYOUTS
@pytest.mark.parametrize("where", ["beside", "as a tensor", "in the options"])
def test_files_that_run_code(wanted, save, where, tensors, tmp_path):
  victim, path = tmp_path / "created", tmp_path / "a.pth"
  attack = ATTACKS[wanted](str(victim))
  content = {"model": as_torch(tensors), "opt": attack}
  if where == "as a tensor":
    content = {**content["model"], "fc.bias": attack}
  elif where == "in the options":
    content["opt"] = argparse.Namespace(model=attack)
  torch.save(content, path, **save)
  words = rf"a\.pth is refused.*the global \S*{wanted},.*executed"
  with pytest.raises(ValueError, match=words):
    files.read(path)
  assert not victim.exists()
  torch.load(path, weights_only=False)  # it would have worked
  assert victim.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_bare_pickles_that_run_code(protocol, tmp_path):
  victim, path = tmp_path / "created", tmp_path / "a.pth"
  content = pickle.dumps(Call(os.mkdir, str(victim)), protocol)
  path.write_bytes(content)
  words = {0: "no checkpoint", 2: r"posix\.mkdir", 4: r"posix\.mkdir"}
  with pytest.raises(ValueError, match=words[protocol]):
    files.read(path)
  assert not victim.exists()
  pickle.loads(content)
  assert victim.exists()


@LAYOUTS
def test_a_newer_protocol(save, tensors, tmp_path):
  victim, path = tmp_path / "created", tmp_path / "a.pth"
  for content, words in (
    (as_torch(tensors), "another protocol .*save it again"),
    ({"x": Call(os.mkdir, str(victim))}, r"the global posix\.mkdir,"),
  ):
    torch.save(content, path, pickle_protocol=4, **save)
    with pytest.raises(ValueError, match=words):
      files.read(path)
  assert not victim.exists()


class Chain:
  """Pickles as `levels` tuples, each in the other."""

  def __init__(self, levels):
    self.levels = levels

  def __reduce__(self):
    value = ()
    for _ in range(self.levels):
      value = (value,)
    return collections.OrderedDict, (), {"x": value}


@LAYOUTS
def test_pickles_that_would_choke_the_unpickler(save, tensors, tmp_path):
  """tests/data/test_safe_pickle.py has more of them."""
  path = tmp_path / "a.pth"
  torch.save({"model": as_torch(tensors), "x": Chain(100)}, path, **save)
  with pytest.raises(ValueError, match=r"a\.pth: .*more than 64 levels"):
    files.read(path)


def legacy(keys, count=4):
  """A file of PyTorch before 1.6 whose one tensor has `count` floats."""
  file = io.BytesIO()
  torch.save({"a": torch.ones(count)}, file, **LEGACY)
  raw = file.getvalue()
  start = raw.rindex(b"\x80\x02]")
  end = len(raw) - 4 * count - 8
  return raw[:start] + pickle.dumps(keys, 2) + raw[end:]


def test_storages_that_are_not_in_the_file(tmp_path):
  path = tmp_path / "a.pth"
  path.write_bytes(legacy([]))
  with pytest.raises(ValueError, match="storages that it does not hold"):
    files.read(path)
  path.write_bytes(legacy([], 1)[:-8])
  with pytest.raises(ValueError, match="storages that it does not hold"):
    files.read(path)
  file = io.BytesIO()
  torch.save({"a": torch.ones(4)}, file)
  with (
    zipfile.ZipFile(file) as old,
    zipfile.ZipFile(path, "w") as new,
  ):
    for name in old.namelist():
      content = old.read(name)
      new.writestr(name, content[:8] if name.endswith("data/0") else content)
  with pytest.raises(ValueError, match="storage 0 has less than its 16 bytes"):
    files.read(path)


def test_archives_that_unpack_to_too_much(tmp_path):
  path = tmp_path / "a.npz"
  np.savez_compressed(path, a=np.zeros(2**25, np.float32))
  with pytest.raises(ValueError, match=r"it unpacks to 134,\d+,\d+ bytes"):
    files.read(path)
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    header, {"descr": "<f4", "fortran_order": False, "shape": (2**33,)}
  )
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.npy", header.getvalue())
  with pytest.raises(ValueError, match=r"shape \[8589934592\] in \d+ bytes"):
    files.read(path)


def test_pickled_objects_in_npz(tmp_path):
  victim, path = tmp_path / "created", tmp_path / "a.npz"
  attack = np.array([Call(os.mkdir, str(victim))], object)
  np.savez(path, **{"conv1.weight": np.ones(3), "fc.bias": attack})
  with pytest.raises(ValueError, match=r"a\.npz is refused: .* pickled object"):
    files.read(path)
  assert not victim.exists()
  np.load(path, allow_pickle=True)["fc.bias"]
  assert victim.exists()


def write_all(folder, tensors):
  torch.save(as_torch(tensors), folder / "zip.pth")
  torch.save(as_torch(tensors), folder / "legacy.pth", **LEGACY)
  safetensors.save_file(tensors, folder / "a.safetensors")
  np.savez(folder / "a.npz", **tensors)
  return sorted(folder.iterdir())


def test_files_cut_short(tensors, tmp_path):
  (tmp_path / "whole").mkdir()
  for whole in write_all(tmp_path / "whole", tensors):
    raw, path = whole.read_bytes(), tmp_path / whole.name
    for length in (9, 60, len(raw) // 3, len(raw) // 2, len(raw) - 1):
      path.write_bytes(raw[:length])
      with pytest.raises(ValueError, match=r"cut short|no checkpoint") as e:
        files.read(path)
      assert str(path) in str(e.value)


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".pth"])
def test_no_flipped_bit_goes_unseen(ending, tensors, assert_same, tmp_path):
  path, refused = tmp_path / f"a{ending}", 0
  files.write(path, {"model": tensors})
  raw = bytearray(path.read_bytes())
  for bit in range(5, 8 * len(raw), len(raw) // 5):
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    raw[bit // 8] ^= 1 << bit % 8
    try:
      assert_same(read(path), tensors)
    except ValueError:
      refused += 1
  assert refused > 20


def test_a_value_that_changed_on_the_way(tmp_path):
  values = torch.arange(1000.0)
  torch.save({"a": values}, tmp_path / "a.pth")
  raw = bytearray((tmp_path / "a.pth").read_bytes())
  raw[raw.index(values.numpy().tobytes()) + 50] ^= 1
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
  with tarfile.open(tmp_path / "d.pth", "w") as tar:
    tar.add(tmp_path / "a.pth", "storages")
  for name, words in (
    ("a.pth", r"no checkpoint.*zip archive of x/a\.txt"),
    ("b.npz", "no checkpoint|damaged|expected"),
    ("c.pth", r"TorchScript.*state_dict\(\)"),
    ("d.pth", r"tar archive.*before 2017.*save it again"),
  ):
    with pytest.raises(ValueError, match=words):
      files.read(tmp_path / name)


def test_paths_that_are_no_file_of_weights(tmp_path):
  (tmp_path / "b.pth").mkdir()
  (tmp_path / "c.h5").write_text("x")
  (tmp_path / "model-00001-of-00003.safetensors").write_text("x")
  os.mkfifo(tmp_path / "d")
  assert not files.is_weights_file(tmp_path / "b.pth")
  assert not files.is_weights_file(tmp_path / "run")
  assert files.is_weights_file(tmp_path / "c.h5")
  for name, words in (
    ("a.pth", r"a\.pth does not exist"),
    ("b.pth", "got a folder"),
    ("c.h5", "begins with b'x'"),
    ("d", "a pipe or a device"),
    ("model-00001-of-00003.safetensors", "one of several"),
  ):
    with pytest.raises(ValueError, match=words):
      files.read(tmp_path / name)


ONE = torch.ones(1, dtype=torch.float16)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (torch.ones(3), "expected a dict of tensors, got ndarray"),
    ([1, 2], "expected a dict of tensors, got list"),
    ({}, "expected tensors.*got nothing"),
    ({"epoch": 3, "weights": {"a": torch.ones(())}}, r"got epoch, weights\."),
    (
      {"model": {"a": torch.ones(2)}, "net": {"a": torch.ones(2)}},
      "got 2: model and net",
    ),
    ({"a": torch.ones(2).to_sparse()}, r"a: expected a dense.*sparse_coo"),
    ({"a": ONE.expand(10**6, 10**6)}, r"a: .*\[1000000, 1000000\].* eight"),
    ({i: ONE.expand(2**24) for i in range(4)}, r"\[16777216\].* eight times"),
    (torch.nn.Linear(2, 2), r"global torch\.nn\.\S+\.Linear.*state_"),
    ({"a": torch.tensor([1e300]).double() * 1e300}, r"1 NaN or inf.* in a\."),
  ],
)
def test_contents_that_are_no_state_dict(content, words, tmp_path):
  torch.save(content, tmp_path / "a.pth")
  with pytest.raises(ValueError, match=rf"a\.pth.*{words}"):
    files.read(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_values_that_are_not_finite(value, tensors, tmp_path):
  wrong = {**tensors, "bn1.bias": tensors["bn1.bias"].astype(float)}
  wrong["bn1.bias"][1] = value
  for path in write_all(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"1 NaN or inf.*bn1\.bias"):
      files.read(path)


def test_without_pytorch(tensors, assert_same, tmp_path, monkeypatch):
  paths = write_all(tmp_path, tensors)
  from kd_jax import interop

  monkeypatch.delitem(sys.modules, "kd_jax.interop.torch_files", raising=False)
  monkeypatch.delattr(interop, "torch_files", raising=False)
  monkeypatch.setitem(sys.modules, "torch", None)
  words = r'takes PyTorch.*"kd_jax\[torch\]"'
  for path in paths:
    if path.suffix != ".pth":
      assert_same(read(path), tensors)
      continue
    with pytest.raises(ImportError, match=words):
      files.read(path)
  with pytest.raises(ImportError, match=rf"new\.pth: .*{words}"):
    files.write(pathlib.Path(tmp_path / "new.pth"), {"model": tensors})
  assert sorted(tmp_path.iterdir()) == paths


def test_a_pytorch_that_is_not_safe(tmp_path, monkeypatch):
  torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
  monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
  with pytest.raises(ImportError, match=r"2\.9\.1\+cpu can .*2\.10 or newer"):
    files.read(tmp_path / "a.pth")


@pytest.mark.parametrize("several", [False, True])
def test_a_file_of_pytorch_has_a_digest(
  several, tensors, assert_same, tmp_path
):
  path = tmp_path / "a.pth"
  parts = {"model": tensors}
  if several:
    parts["proj"] = {"weight": np.ones((2, 3), ml_dtypes.bfloat16)}
  files.write(path, parts)
  for mmap in (False, True):  # PyTorch reads it like any other
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    loaded = loaded["model"] if several else loaded
    assert_same({k: v.numpy() for k, v in loaded.items()}, tensors)
  assert_same(read(path), tensors)
  # A tensor changes, and the archive's own checksums are right.
  with zipfile.ZipFile(path) as archive:
    names = {name: archive.read(name) for name in archive.namelist()}
    comment = archive.comment
  data = next(n for n in names if n.endswith("data/0"))
  names[data] = bytes([names[data][0] ^ 1]) + names[data][1:]
  with zipfile.ZipFile(path, "w") as archive:
    archive.comment = comment
    for name, content in names.items():
      archive.writestr(name, content)
  with pytest.raises(ValueError, match=r"a\.pth: .*sha256 differs"):
    files.read(path)
