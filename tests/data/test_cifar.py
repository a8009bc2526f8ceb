"""CIFAR: small files in the publisher's layout, and every way they fail."""

import io
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from kd_jax import data
from kd_jax.data import cifar

ROWS = {"cifar10": 6, "cifar100": 9}  # of one file
KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}
NAMES_KEYS = {"cifar10": "label_names", "cifar100": "fine_label_names"}


def write(path: pathlib.Path, value) -> None:
  path.write_bytes(pickle.dumps(value, 3))  # images as raw bytes


def files_of(name):
  return [
    *cifar.LAYOUTS[name].files["train"],
    *cifar.LAYOUTS[name].files["test"],
  ]


def content(name: str, number: int) -> dict:
  """One data file: random rows, with the keys of the publisher."""
  rng = np.random.default_rng(number)
  rows, classes = ROWS[name], int(name.removeprefix("cifar"))
  labels = [int(label) for label in rng.integers(0, classes, rows)]
  return {
    b"data": rng.integers(0, 256, (rows, 3072), np.uint8),
    KEYS[name].encode(): labels,
    b"coarse_labels": [0] * rows,
    b"batch_label": b"a batch",
    b"filenames": [b"x.png"] * rows,
  }


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
  return request.param


@pytest.fixture
def folder(tmp_path, name):
  """A data folder that holds the publisher's folder."""
  layout = cifar.LAYOUTS[name]
  inner = tmp_path / layout.folder
  inner.mkdir()
  for number, file in enumerate(files_of(name)):
    write(inner / file, content(name, number))
  names = [b"class %d" % i for i in range(layout.num_classes)]
  write(inner / layout.meta, {NAMES_KEYS[name].encode(): names})
  return tmp_path


@pytest.fixture
def archive(folder, name):
  """The same as the publisher's .tar.gz, without the folder."""
  inner = folder / cifar.LAYOUTS[name].folder
  path = folder / cifar.LAYOUTS[name].archive
  with tarfile.open(path, "w:gz") as tar:
    tar.add(inner, arcname=inner.name)
  shutil.rmtree(inner)
  return path


def check(name, split, where):
  source = data.load(name, split=split, dir=where)
  train = len(cifar.LAYOUTS[name].files["train"])
  numbers = range(train) if split == "train" else [train]
  parts = [content(name, number) for number in numbers]
  # Channel by channel, row by row: the publisher's description.
  rows = np.concatenate([part[b"data"] for part in parts])
  for image, row in zip(source.images, rows, strict=True):
    for channel in range(3):
      plane = row[1024 * channel : 1024 * (channel + 1)]
      np.testing.assert_array_equal(image[:, :, channel], plane.reshape(32, 32))
  labels = np.concatenate([part[KEYS[name].encode()] for part in parts])
  np.testing.assert_array_equal(source.labels, labels)
  assert source.labels.dtype == np.int32 and source.name == name
  assert source.images.flags.c_contiguous
  assert source.num_classes == len(source.class_names)
  assert source.class_names[:2] == ("class 0", "class 1")


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_read_from_its_folder(folder, name, split):
  check(name, split, folder)
  check(name, split, folder / cifar.LAYOUTS[name].folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_read_from_its_archive(archive, name, split):
  check(name, split, archive.parent)
  check(name, split, str(archive))


def test_constants():
  for name, classes, mean, std in (
    (
      *("cifar10", 10, (0.49139968, 0.48215841, 0.44653091)),
      (0.24703223, 0.24348513, 0.26158784),
    ),
    ("cifar100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
  ):
    known = data.constants(name)
    assert (known.mean, known.std) == (mean, std)
    assert known.num_classes == len(known.class_names) == classes
    assert list(known.class_names) == sorted(set(known.class_names))
    assert known.image_shape == (32, 32, 3)
    assert data.constants(f"tfds:{name}") == known
  assert data.constants("cifar10").class_names[3] == "cat"
  assert data.constants("cifar100").class_names[53] == "orange"


@pytest.mark.parametrize("place", ["no folder", "empty folder"])
def test_missing_data_names_every_way_to_get_it(tmp_path, name, place):
  where = tmp_path if place == "empty folder" else tmp_path / "none"
  reason = "holds neither" if place == "empty folder" else "does not exist"
  layout = cifar.LAYOUTS[name]
  with pytest.raises(ValueError, match=reason) as error:
    data.load(name, split="train", dir=where)
  for fact in (layout.folder, layout.archive, "University of Toronto"):
    assert fact in str(error.value)
  for remedy in ("--config.data.dir=", f"tfds:{name}"):
    assert remedy in str(error.value)


def test_a_missing_or_cut_file_is_named(folder, name):
  layout = cifar.LAYOUTS[name]
  path = folder / layout.folder / layout.files["train"][-1]
  path.write_bytes(path.read_bytes()[:-500])
  with pytest.raises(ValueError, match=rf"{path.name} is cut short or damaged"):
    data.load(name, split="train", dir=folder)
  path.unlink()
  with pytest.raises(ValueError, match=rf"lacks the file {path.name} .*Unpack"):
    data.load(name, split="train", dir=folder)
  data.load(name, split="test", dir=folder)


def test_a_damaged_archive_is_reported(archive, name):
  whole = archive.read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1  # in an image: only the checksum can tell
  cuts = [whole[: int(len(whole) * share)] for share in (0, 0.3, 0.9)]
  for damaged in (*cuts, bytes(flipped)):
    archive.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{archive.name} is cut short or d"):
      data.load(name, split="test", dir=archive.parent)
  with tarfile.open(archive, "w:gz") as tar:
    info = tarfile.TarInfo("README")
    info.size = 2
    tar.addfile(info, io.BytesIO(b"hi"))
  with pytest.raises(ValueError, match=r"lacks .* another archive"):
    data.load(name, split="test", dir=archive.parent)


def test_an_archive_is_bounded_and_holds_plain_files(
  archive, name, monkeypatch
):
  layout = cifar.LAYOUTS[name]
  monkeypatch.setattr(cifar, "_MAX_ARCHIVE", 1000)
  with pytest.raises(ValueError, match=r"more than 1,000 bytes"):
    data.load(name, split="test", dir=archive)
  monkeypatch.undo()
  with tarfile.open(archive, "w:gz") as tar:
    info = tarfile.TarInfo(f"{layout.folder}/{layout.meta}")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(info)
  with pytest.raises(ValueError, match=rf"lacks {layout.meta}"):
    data.load(name, split="test", dir=archive)


@pytest.mark.parametrize(
  ("value", "words"),
  [
    (b"]" * 100_000 + b"a" * 99_999 + b".", "more than 64 levels"),
    (b"]r\x00\x00\x00\x10.", "puts to place 268,435,456"),
  ],
)
def test_a_hostile_pickle_is_refused(folder, name, value, words, monkeypatch):
  layout = cifar.LAYOUTS[name]
  path = folder / layout.folder / layout.meta
  path.write_bytes(value)
  with pytest.raises(ValueError, match=rf"{path.name} is .*{words}"):
    data.load(name, split="test", dir=folder)
  monkeypatch.setattr(cifar, "_MAX_FILE", 100)
  with pytest.raises(ValueError, match="at most 100 bytes, got more"):
    data.load(name, split="test", dir=folder)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"data": lambda old: old[:, :3071]}, "rows of 3072 values .* got"),
    ({"data": lambda old: old.astype(np.int32)}, "must be uint8 rows"),
    ({"data": lambda old: old.tolist()}, "must be uint8 rows .* got list"),
    ({"data": None}, "has no 'data'"),
    ({"labels": None}, "has no '(fine_)?labels', got .*another data set"),
    ({"labels": lambda old: ["x"] * len(old)}, "must be a list of integers"),
    ({"labels": lambda old: 5}, "must be a list of integers, got int"),
    ({"labels": lambda old: old[:-1]}, r"(6|9) images and (5|8) labels"),
    ({"labels": lambda old: [*old, 0]}, r"(6|9) images and (7|10) labels"),
    ({"labels": lambda old: [*old[:4], -1, *old[5:]]}, "got -1 at position 4"),
    ({"labels": lambda old: [100, *old[1:]]}, r"in 0\.\.99? .* got 100 at"),
    ({"labels": lambda old: [2**80, *old[1:]]}, "must be a list of integers"),
    ({"labels": lambda old: [2**40, *old[1:]]}, f"got {2**40} at position 0"),
  ],
)
def test_a_file_of_another_form_is_reported(folder, name, changes, words):
  layout = cifar.LAYOUTS[name]
  value = content(name, len(layout.files["train"]))
  for field, new in changes.items():
    key = (KEYS[name] if field == "labels" else field).encode()
    value[key] = new(value[key]) if new else None
    if new is None:
      del value[key]
  write(folder / layout.folder / layout.files["test"][0], value)
  with pytest.raises(ValueError, match=words):
    data.load(name, split="test", dir=folder)


def test_wrong_class_names_are_reported(folder, name):
  layout = cifar.LAYOUTS[name]
  key = NAMES_KEYS[name]
  for value, got in (({key.encode(): [b"one"]}, "1"), ({}, "none")):
    write(folder / layout.folder / layout.meta, value)
    with pytest.raises(
      ValueError, match=f"must list {layout.num_classes} {key}, got {got}"
    ):
      data.load(name, split="test", dir=folder)


class Attack:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("packed", [False, True])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, packed):
  target = tmp_path / "made"
  inner = tmp_path / "cifar-100-python"
  inner.mkdir()
  write(inner / "meta", {b"fine_label_names": [b"x"] * 100})
  write(inner / "test", {b"data": Attack(target)})
  if packed:
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
      tar.add(inner, arcname=inner.name)
    shutil.rmtree(inner)
  with pytest.raises(
    ValueError, match=r"cifar-100-python/test is refused: .* \w+\.mkdir,"
  ):
    data.load("cifar100", split="test", dir=tmp_path)
  assert not target.exists()
