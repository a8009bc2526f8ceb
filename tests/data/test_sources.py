"""Sources: small files in the publishers' layouts, and every way they fail."""

import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from kd_jax.data import sources

ROWS = {"cifar10": 6, "cifar100": 9}  # of one file
FILES = {
  "cifar10": {
    "folder": "cifar-10-batches-py",
    "archive": "cifar-10-python.tar.gz",
    "train": [f"data_batch_{i}" for i in range(1, 6)],
    "test": ["test_batch"],
    "meta": "batches.meta",
  },
  "cifar100": {
    "folder": "cifar-100-python",
    "archive": "cifar-100-python.tar.gz",
    "train": ["train"],
    "test": ["test"],
    "meta": "meta",
  },
}


def write(path: pathlib.Path, value) -> None:
  path.write_bytes(pickle.dumps(value, 3))  # images as raw bytes


def content(name: str, number: int) -> dict:
  """One data file: random rows, with the keys of the publisher."""
  rng = np.random.default_rng(number)
  rows, classes = ROWS[name], int(name.removeprefix("cifar"))
  labels = [int(label) for label in rng.integers(0, classes, rows)]
  keys = {"cifar10": b"labels", "cifar100": b"fine_labels"}
  return {
    b"data": rng.integers(0, 256, (rows, 3072), np.uint8),
    keys[name]: labels,
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
  files = FILES[name]
  inner = tmp_path / files["folder"]
  inner.mkdir()
  for number, file in enumerate([*files["train"], *files["test"]]):
    write(inner / file, content(name, number))
  classes = int(name.removeprefix("cifar"))
  key = b"label_names" if name == "cifar10" else b"fine_label_names"
  names = [b"class %d" % i for i in range(classes)]
  write(inner / files["meta"], {key: names})
  return tmp_path


@pytest.fixture
def archive(folder, name):
  """The same as the publisher's .tar.gz, without the folder."""
  inner = folder / FILES[name]["folder"]
  path = folder / FILES[name]["archive"]
  with tarfile.open(path, "w:gz") as tar:
    tar.add(inner, arcname=inner.name)
  shutil.rmtree(inner)
  return path


def expected(name, split):
  files = FILES[name]
  first = 0 if split == "train" else len(files["train"])
  parts = [content(name, first + i) for i in range(len(files[split]))]
  key = b"labels" if name == "cifar10" else b"fine_labels"
  # Channel by channel, row by row: the publisher's description.
  images = np.zeros((len(parts) * ROWS[name], 32, 32, 3), np.uint8)
  for i, row in enumerate(np.concatenate([part[b"data"] for part in parts])):
    for channel in range(3):
      plane = row[1024 * channel : 1024 * (channel + 1)]
      images[i, :, :, channel] = plane.reshape(32, 32)
  return images, np.concatenate([part[key] for part in parts])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("place", ["data folder", "folder itself"])
def test_cifar_is_read_from_its_folder(folder, name, split, place):
  where = folder if place == "data folder" else folder / FILES[name]["folder"]
  source = sources.load(name, split=split, dir=where)
  images, labels = expected(name, split)
  np.testing.assert_array_equal(source.images, images)
  np.testing.assert_array_equal(source.labels, labels)
  assert source.labels.dtype == np.int32 and source.name == name
  assert source.images.flags.c_contiguous
  assert source.num_classes == len(source.class_names)
  assert source.class_names[:2] == ("class 0", "class 1")
  assert len(source) == len(images)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("place", ["data folder", "archive itself"])
def test_cifar_is_read_from_its_archive(archive, name, split, place):
  where = archive.parent if place == "data folder" else archive
  source = sources.load(name, split=split, dir=str(where))
  images, labels = expected(name, split)
  np.testing.assert_array_equal(source.images, images)
  np.testing.assert_array_equal(source.labels, labels)


def test_cifars_normalisation():
  cifar10, cifar100 = (sources._CIFAR[key] for key in ("cifar10", "cifar100"))
  assert cifar100.mean == (0.5071, 0.4867, 0.4408)
  assert cifar100.std == (0.2675, 0.2565, 0.2761)
  assert cifar10.mean == (0.49139968, 0.48215841, 0.44653091)
  assert cifar10.std == (0.24703223, 0.24348513, 0.26158784)


@pytest.mark.parametrize("place", ["no folder", "empty folder"])
def test_missing_data_names_every_way_to_get_it(tmp_path, name, place):
  where = tmp_path if place == "empty folder" else tmp_path / "none"
  reason = "holds neither" if place == "empty folder" else "does not exist"
  files = FILES[name]
  with pytest.raises(
    ValueError,
    match=rf"No {name} data: expected the folder {files['folder']} or the file"
    rf" {files['archive']} in .*, which {reason}.*download {files['archive']}"
    r" from the CIFAR page of the University of Toronto.*--config.data.dir="
    rf".*tfds:{name}",
  ):
    sources.load(name, split="train", dir=where)


def test_a_missing_file_is_named(folder, name):
  inner = folder / FILES[name]["folder"]
  missing = FILES[name]["train"][-1]
  (inner / missing).unlink()
  with pytest.raises(ValueError, match=rf"lacks the file {missing} .*Unpack"):
    sources.load(name, split="train", dir=folder)
  sources.load(name, split="test", dir=folder)


def test_a_file_cut_short_is_named(folder, name):
  path = folder / FILES[name]["folder"] / FILES[name]["train"][-1]
  path.write_bytes(path.read_bytes()[:-500])
  with pytest.raises(
    ValueError, match=rf"{path.name} is cut short or damaged: .*[Dd]ownload"
  ):
    sources.load(name, split="train", dir=folder)


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_an_archive_cut_short_is_reported(archive, name, share):
  whole = archive.read_bytes()
  archive.write_bytes(whole[: int(len(whole) * share)])
  with pytest.raises(
    ValueError, match=rf"{archive.name} is cut short .*[Dd]ownload it again"
  ):
    sources.load(name, split="test", dir=archive.parent)


def test_an_archive_with_a_flipped_bit_is_reported(archive, name):
  whole = bytearray(archive.read_bytes())
  whole[len(whole) // 2] ^= 1  # in an image: only the checksum can tell
  archive.write_bytes(whole)
  with pytest.raises(ValueError, match=rf"{archive.name} is cut short or dam"):
    sources.load(name, split="test", dir=archive.parent)


def test_an_archive_of_something_else_is_reported(tmp_path, name):
  path = tmp_path / FILES[name]["archive"]
  with tarfile.open(path, "w:gz") as tar:
    info = tarfile.TarInfo("README")
    info.size = 2
    tar.addfile(info, io.BytesIO(b"hi"))
  with pytest.raises(ValueError, match=r"lacks .* another archive. Download"):
    sources.load(name, split="test", dir=tmp_path)


def change(folder, name, **changes):
  """Rewrites the test file with other values (None: without the key)."""
  number = len(FILES[name]["train"])
  value = content(name, number)
  key = "labels" if name == "cifar10" else "fine_labels"
  for field, new in changes.items():
    field = (key if field == "labels" else field).encode()
    value[field] = new(value[field]) if new else None
    if new is None:
      del value[field]
  path = folder / FILES[name]["folder"] / FILES[name]["test"][0]
  write(path, value)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_wrong_row_count_is_reported(folder, name, extra):
  rows = ROWS[name]
  change(folder, name, labels=lambda old: [*old, 0][: rows + extra])
  with pytest.raises(
    ValueError,
    match=rf"Wrong row count .*{rows} images and {rows + extra} labels",
  ):
    sources.load(name, split="test", dir=folder)


@pytest.mark.parametrize("label", [-1, 100, 2**40])
def test_a_label_out_of_range_is_reported(folder, name, label):
  top = int(name.removeprefix("cifar")) - 1
  change(folder, name, labels=lambda old: [*old[:4], label, *old[5:]])
  with pytest.raises(
    ValueError,
    match=rf"labels of {name} .*must be in 0\.\.{top} \({top + 1} classes\),"
    rf" got {label} at position 4 \(1 of {ROWS[name]} ",
  ):
    sources.load(name, split="test", dir=folder)


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
  ],
  ids=[
    "short rows",
    "wide type",
    "no array",
    "no data",
    "no labels",
    "text labels",
    "no list",
  ],
)
def test_a_file_of_another_form_is_reported(folder, name, changes, words):
  change(folder, name, **changes)
  with pytest.raises(ValueError, match=words):
    sources.load(name, split="test", dir=folder)


def test_wrong_class_names_are_reported(folder, name):
  files = FILES[name]
  classes = int(name.removeprefix("cifar"))
  key = "label_names" if name == "cifar10" else "fine_label_names"
  path = folder / files["folder"] / files["meta"]
  write(path, {key.encode(): [b"one"]})
  with pytest.raises(ValueError, match=f"must list {classes} {key}, got 1"):
    sources.load(name, split="test", dir=folder)
  write(path, {})
  with pytest.raises(ValueError, match=f"must list {classes} {key}, got none"):
    sources.load(name, split="test", dir=folder)


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
    ValueError,
    match=r"cifar-100-python/test is refused: .*the global \w+\.mkdir,",
  ):
    sources.load("cifar100", split="test", dir=tmp_path)
  assert not target.exists()


# TensorFlow Datasets, prepared without TensorFlow.


def prepare(folder, dataset, split, count, file_format="array_record"):
  """Writes what TFDS's `download_and_prepare` writes; returns the content."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  rng = np.random.default_rng(0)
  classes = int(dataset.removeprefix("cifar"))
  images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
  labels = rng.integers(0, classes, count)
  out = folder / dataset / "3.0.2"
  out.mkdir(parents=True)
  path = out / f"{dataset}-{split}.{file_format}-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  size = 0
  for image, label in zip(images, labels):
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(png.getvalue())
    feature["id"].bytes_list.value.append(b"an id")
    feature["label"].int64_list.value.append(label)
    if dataset == "cifar100":
      feature["coarse_label"].int64_list.value.append(0)
    record = example.SerializeToString()
    size += len(record)
    writer.write(record)
  writer.close()
  features = tfds.builder(dataset, data_dir=folder).info.features
  features["label"].names = [f"class {i}" for i in range(classes)]
  features.save_metadata(out)
  features.save_config(out)
  info = {
    "name": dataset,
    "version": "3.0.2",
    "fileFormat": file_format,
    "splits": [
      {
        "name": split,
        "shardLengths": [str(count)],
        "numBytes": str(size),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
    ],
  }
  (out / "dataset_info.json").write_text(json.dumps(info))
  return images, labels, path


@pytest.mark.parametrize("place", ["data", "default"])
def test_tfds_is_read_without_tensorflow(tfds, tmp_path, name, place):
  # In the folder that `dir` names, or in TFDS's own.
  images, labels, _ = prepare(tmp_path / place, name, "train", 11)
  source = sources.load(f"tfds:{name}", split="train", dir=tmp_path / "data")
  np.testing.assert_array_equal(source.images, images)
  np.testing.assert_array_equal(source.labels, labels)
  assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
  assert source.name == f"tfds:{name}"
  assert source.num_classes == int(name.removeprefix("cifar"))
  assert source.class_names[-1] == f"class {source.num_classes - 1}"
  assert source.mean == sources._CIFAR[name].mean
  assert source.std == sources._CIFAR[name].std
  assert "tensorflow" not in sys.modules


def test_tfds_records_cut_short_are_reported(tfds, tmp_path):
  _, _, path = prepare(tmp_path, "cifar10", "test", 11)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(
    ValueError, match=r"test records of tfds:cifar10 are cut short.*prepare it"
  ):
    sources.load("tfds:cifar10", split="test", dir=tmp_path)


def test_tfds_in_a_format_that_needs_tensorflow_is_reported(tfds, tmp_path):
  prepare(tmp_path, "cifar10", "test", 2, file_format="tfrecord")
  with pytest.raises(
    ValueError, match=r"is prepared in .*cifar10.* expected array_record"
  ):
    sources.load("tfds:cifar10", split="test", dir=tmp_path)


@pytest.fixture
def tensorflow(monkeypatch):
  """Makes TensorFlow look installed or not; it is never imported."""
  real = sources.importlib.util.find_spec

  def install(installed):
    monkeypatch.setattr(
      sources.importlib.util,
      "find_spec",
      lambda name: installed if name == "tensorflow" else real(name),
    )

  return install


def test_tfds_unprepared_without_tensorflow_says_what_to_do(
  tfds, tensorflow, tmp_path
):
  tensorflow(None)
  with pytest.raises(
    ValueError,
    match=r"tfds:cifar100 is not prepared \(looked in .*cifar100.* and .*"
    r"cifar100.*pip install tensorflow.*array_record.*--config.data.dir=.*"
    r"the source cifar100",
  ):
    sources.load("tfds:cifar100", split="train", dir=tmp_path / "data")


def test_tfds_is_prepared_where_tensorflow_is_installed(
  tfds, tensorflow, tmp_path, monkeypatch
):
  tensorflow("installed")
  written, formats = [], []

  def download_and_prepare(builder):
    formats.append(builder.info.file_format.value)
    written.append(prepare(tmp_path / "made", "cifar10", "test", 3))
    shutil.copytree(
      tmp_path / "made" / "cifar10" / "3.0.2",
      builder.data_dir,
      dirs_exist_ok=True,
    )
    builder.info.read_from_directory(builder.data_dir)

  monkeypatch.setattr(
    tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare
  )
  source = sources.load("tfds:cifar10", split="test", dir=tmp_path / "data")
  assert formats == ["array_record"]
  np.testing.assert_array_equal(source.images, written[0][0])
  assert (tmp_path / "data" / "cifar10" / "3.0.2").is_dir()
  sources.load("tfds:cifar10", split="test", dir=tmp_path / "data")
  assert len(written) == 1  # prepared once


@pytest.mark.parametrize(
  ("name", "module", "words"),
  [
    (
      "tfds:cifar10",
      "tensorflow_datasets",
      "pip install tensorflow-datasets.* or use the source cifar10",
    ),
    ("digits", "sklearn.datasets", "pip install scikit-learn.*synthetic"),
  ],
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, name, module, words):
  monkeypatch.setitem(sys.modules, module, None)  # as if not installed
  with pytest.raises(ImportError, match=words):
    sources.load(name, split="test", dir=tmp_path)


# Sets without files.


def test_digits_are_split_by_class_without_overlap():
  from sklearn.datasets import load_digits

  digits = load_digits()
  train = sources.load("digits", split="train", image_size=8)
  test = sources.load("digits", split="test", image_size=8)
  assert train.images.shape == (1437, 8, 8, 3)
  assert test.images.shape == (360, 8, 8, 3)
  counts = np.bincount(digits.target)
  test_counts = np.bincount(test.labels)
  assert np.abs(test_counts - counts * 360 / 1797).max() <= 1
  np.testing.assert_array_equal(np.bincount(train.labels) + test_counts, counts)

  # At their own size, train and test are scikit-learn's images, each once.
  def rows(images, labels):
    return sorted(
      (label, *image.ravel()) for image, label in zip(images, labels)
    )

  grey = np.rint(digits.images * 255 / 16).astype(np.uint8)
  both = np.concatenate([train.images, test.images])
  labels = np.concatenate([train.labels, test.labels])
  assert rows(both[..., 0], labels) == rows(grey, digits.target)
  assert (both == both[..., :1]).all()


def test_digits_are_enlarged_bilinearly():
  small = sources.load("digits", split="test", image_size=8)
  large = sources.load("digits", split="test")
  assert large.images.shape == (360, 32, 32, 3)
  for i in range(0, 360, 40):
    reference = Image.fromarray(small.images[i]).resize(
      (32, 32), Image.Resampling.BILINEAR
    )
    difference = np.asarray(reference, int) - large.images[i]
    assert np.abs(difference).max() <= 1


def test_digits_statistics_are_the_training_splits():
  train = sources.load("digits", split="train")
  test = sources.load("digits", split="test")
  assert train.mean == test.mean and train.std == test.std
  x = train.images / 255
  np.testing.assert_allclose(train.mean, x.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(train.std, x.std((0, 1, 2)), rtol=1e-6)
  assert train.class_names == tuple("0123456789")


def test_synthetic_images_are_deterministic_and_learnable():
  options = {"num_examples": 210, "num_classes": 20, "image_size": 18}
  train = sources.load("synthetic", split="train", **options)
  again = sources.load("synthetic", split="train", **options)
  test = sources.load("synthetic", split="test", **options)
  assert train.images.shape == (210, 18, 18, 3)
  assert train.num_classes == 20 and len(train.class_names) == 20
  np.testing.assert_array_equal(train.images, again.images)
  assert (train.images != test.images).mean() > 0.9
  assert np.bincount(train.labels, minlength=20).min() == 10
  means = np.stack([train.images[train.labels == k].mean(0) for k in range(20)])
  distance = ((test.images[:, None] - means) ** 2).sum((2, 3, 4))
  assert (distance.argmin(1) == test.labels).mean() > 0.95
  x = train.images / 255
  np.testing.assert_allclose(x.mean((0, 1, 2)), train.mean, atol=0.02)
  np.testing.assert_allclose(x.std((0, 1, 2)), train.std, atol=0.02)


def test_an_unknown_name_lists_the_nearest():
  with pytest.raises(
    ValueError,
    match=r"Unknown data source 'cifar-100'. Did you mean cifar100.*"
    "Known: cifar10, cifar100, digits, folder, imagenet,",
  ):
    sources.load("cifar-100", split="train")
  with pytest.raises(ValueError, match=r"Unknown split 'tran'.*mean train"):
    sources.load("synthetic", split="tran")
  assert sources.names() == sorted(sources.names())


def test_options_of_another_source_are_refused():
  with pytest.raises(
    ValueError, match="cifar10 has no option image_size, got 64"
  ):
    sources.load("cifar10", split="train", image_size=64)
  with pytest.raises(
    ValueError, match=r"digits has no option num_classes.*expected image_size"
  ):
    sources.load("digits", split="train", num_classes=3)
  with pytest.raises(ValueError, match="num_examples must be at least 1"):
    sources.load("synthetic", split="train", num_examples=0)


def make(**changes):
  fields = {
    "images": np.zeros((4, 8, 8, 3), np.uint8),
    "labels": np.arange(4, dtype=np.int32),
    "num_classes": 4,
    "class_names": ("a", "b", "c", "d"),
    "mean": (0.5,) * 3,
    "std": (0.2,) * 3,
    "name": "mine",
  }
  return sources.Source(**{**fields, **changes})


@pytest.mark.parametrize("kind", ["given", "synthetic", "digits"])
def test_images_are_contiguous_whatever_they_came_as(kind):
  # Of any other layout, gathering a batch copies the whole set.
  if kind == "given":
    images = np.random.default_rng(0).integers(0, 9, (3, 8, 8, 4), np.uint8).T
    assert not images.flags.c_contiguous
    source = make(images=images)
    np.testing.assert_array_equal(source.images, images)
  else:
    source = sources.load(kind, split="test", image_size=8)
  assert source.images.flags.c_contiguous
  assert source.labels.flags.c_contiguous


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"images": np.zeros((4, 8, 8, 3))}, "mine must be uint8 .* got float64"),
    ({"images": np.zeros((4, 8, 8), np.uint8)}, r"got uint8 \(4, 8, 8\)"),
    ({"labels": np.arange(3, dtype=np.int32)}, r"int32 \[4\], one per image"),
    ({"labels": np.arange(4)}, "int32 .* got int64"),
    ({"class_names": ("a",)}, "4 classes but 1 class names"),
    (
      {"labels": np.array([0, 1, 4, -1], np.int32)},
      r"labels of mine must be in 0\.\.3 .* got 4 at position 2 \(2 of 4",
    ),
  ],
)
def test_a_source_checks_itself(changes, words):
  make()
  with pytest.raises(ValueError, match=words):
    make(**changes)


def test_constants_are_those_of_the_sets():
  for name in ("cifar10", "cifar100"):
    known = sources.constants(name)
    layout = sources._CIFAR[name]
    assert known.num_classes == layout.num_classes == len(known.class_names)
    assert list(known.class_names) == sorted(set(known.class_names))
    assert (known.mean, known.std) == (layout.mean, layout.std)
    assert known.image_shape == (32, 32, 3)
    assert sources.constants(f"tfds:{name}") == known
  assert sources.constants("cifar10").class_names[3] == "cat"
  assert sources.constants("cifar100").class_names[53] == "orange"
  imagenet = sources.constants("imagenet")
  assert len(imagenet.class_names) == imagenet.num_classes == 1000
  assert imagenet.image_shape == (224, 224, 3)
  assert imagenet.mean == (0.485, 0.456, 0.406)
  digits, source = (
    sources.constants("digits"),
    sources.load("digits", split="test"),
  )
  assert digits.class_names == source.class_names
  assert digits.mean == source.mean and digits.std == source.std
  assert sources.constants("tfds:imagenet2012") == imagenet
  tiny = sources.constants("tiny-imagenet")
  assert (tiny.num_classes, tiny.image_shape) == (200, (64, 64, 3))
  with pytest.raises(ValueError, match=r"'folder' without its files.*imagenet"):
    sources.constants("folder")
  with pytest.raises(ValueError, match=r"'cifar'.*Did you mean.*imagenet"):
    sources.constants("cifar")
