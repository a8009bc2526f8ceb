"""TensorFlow Datasets: prepared here as TFDS prepares them, read without TF."""

import io
import json
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.data import cifar, images
from kd_jax.data import tfds as tfds_lib


@pytest.fixture
def tfds(monkeypatch, tmp_path):
  """TFDS whose own default folder is empty, whatever this machine holds."""
  import tensorflow_datasets as tfds

  real = tfds.builder

  def builder(name, *, data_dir=None, **options):
    return real(name, data_dir=data_dir or tmp_path / "default", **options)

  monkeypatch.setattr(tfds, "builder", builder)
  return tfds


def encode(pixels, format):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format)
  return file.getvalue()


def prepare(folder, dataset, split, encoded, labels, format="array_record"):
  """Writes what TFDS's `download_and_prepare` writes; returns its file."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  builder = tfds.builder(dataset, data_dir=folder)
  features = builder.info.features
  out = folder / dataset / str(builder.version)
  out.mkdir(parents=True)
  path = out / f"{dataset}-{split}.{format}-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for image, label in zip(encoded, labels, strict=True):
    example = tf_example_pb2.Example()
    for key in features:
      feature = example.features.feature[key]
      if key in ("label", "coarse_label"):
        feature.int64_list.value.append(label if key == "label" else 0)
      else:
        feature.bytes_list.value.append(image if key == "image" else b"x")
    writer.write(example.SerializeToString())
  writer.close()
  if dataset != "imagenet2012":
    classes = range(features["label"].num_classes)
    features["label"].names = [f"class {i}" for i in classes]
  features.save_metadata(out)
  features.save_config(out)
  info = {
    "name": dataset,
    "version": str(builder.version),
    "fileFormat": format,
    "splits": [
      {
        "name": split,
        "shardLengths": [str(len(labels))],
        "numBytes": str(sum(map(len, encoded))),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
    ],
  }
  (out / "dataset_info.json").write_text(json.dumps(info))
  return path


def prepare_cifar(folder, dataset, split, count, **options):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
  labels = rng.integers(0, cifar.LAYOUTS[dataset].num_classes, count)
  encoded = [encode(image, "PNG") for image in pixels]
  path = prepare(folder, dataset, split, encoded, labels, **options)
  return pixels, labels, path


@pytest.mark.parametrize(
  ("name", "place"), [("cifar10", "data"), ("cifar100", "default")]
)
def test_cifar_is_read_without_tensorflow(tfds, tmp_path, name, place):
  # In the folder that `dir` names, or in TFDS's own.
  pixels, labels, _ = prepare_cifar(tmp_path / place, name, "train", 11)
  source = data.load(f"tfds:{name}", split="train", dir=tmp_path / "data")
  np.testing.assert_array_equal(source.images, pixels)
  np.testing.assert_array_equal(source.labels, labels)
  assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
  assert source.name == f"tfds:{name}"
  assert source.num_classes == int(name.removeprefix("cifar"))
  assert source.class_names[-1] == f"class {source.num_classes - 1}"
  layout = cifar.LAYOUTS[name]
  assert (source.mean, source.std) == (layout.mean, layout.std)
  assert "tensorflow" not in sys.modules


def test_damaged_or_foreign_records_are_reported(tfds, tmp_path):
  _, _, path = prepare_cifar(tmp_path, "cifar10", "test", 11)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(
    ValueError, match=r"test records of tfds:cifar10 are cut short.*prepare it"
  ):
    data.load("tfds:cifar10", split="test", dir=tmp_path)
  prepare_cifar(tmp_path / "tf", "cifar10", "test", 2, format="tfrecord")
  with pytest.raises(
    ValueError, match=r"is prepared in .*cifar10.* expected array_record"
  ):
    data.load("tfds:cifar10", split="test", dir=tmp_path / "tf")


@pytest.fixture
def tensorflow(monkeypatch):
  """Makes TensorFlow look installed or not; it is never imported."""
  real = tfds_lib.importlib.util.find_spec

  def install(installed):
    monkeypatch.setattr(
      tfds_lib.importlib.util,
      "find_spec",
      lambda name: installed if name == "tensorflow" else real(name),
    )

  return install


def test_unprepared_without_tensorflow_says_what_to_do(
  tfds, tensorflow, tmp_path
):
  tensorflow(None)
  with pytest.raises(
    ValueError, match="tfds:cifar100 is not prepared"
  ) as error:
    data.load("tfds:cifar100", split="train", dir=tmp_path / "data")
  for remedy in ("pip install tensorflow", "array_record", "--config.data.dir"):
    assert remedy in str(error.value)


def test_sets_are_prepared_once_where_tensorflow_is_installed(
  tfds, tensorflow, tmp_path, monkeypatch
):
  tensorflow("installed")
  written, formats = [], []

  def download_and_prepare(builder):
    formats.append(builder.info.file_format.value)
    written.append(prepare_cifar(tmp_path / "made", "cifar10", "test", 3))
    shutil.copytree(
      tmp_path / "made" / "cifar10" / "3.0.2",
      builder.data_dir,
      dirs_exist_ok=True,
    )
    builder.info.read_from_directory(builder.data_dir)

  monkeypatch.setattr(
    tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare
  )
  for _ in range(2):
    source = data.load("tfds:cifar10", split="test", dir=tmp_path / "data")
    np.testing.assert_array_equal(source.images, written[0][0])
  assert formats == ["array_record"] and len(written) == 1


LABELS = [999, 0, 3, 5, 3, 1, 2]


@pytest.fixture
def imagenet(tfds, tmp_path):
  """Seven encoded images, and their file."""
  rng = np.random.default_rng(0)
  sizes = [(9 + i % 3, 12, 3) for i in range(7)]
  encoded = [
    encode(rng.integers(0, 256, size, np.uint8), "JPEG") for size in sizes
  ]
  path = prepare(tmp_path, "imagenet2012", "validation", encoded, LABELS)
  return encoded, path


def load_imagenet(folder, **options):
  return data.load(
    "tfds:imagenet2012", split="test", dir=folder, image_size=4, **options
  )


def test_imagenet_is_read_without_decoding(imagenet, tmp_path):
  encoded, path = imagenet
  source = load_imagenet(tmp_path, on_bad_image="skip")
  assert len(source) == 7 and source.labels.tolist() == LABELS
  assert source.labels.dtype == np.int32 and source.num_classes == 1000
  assert source.class_names[:2] == ("n01440764", "n01443537")
  assert source.image_shape == (4, 4, 3) and source.resize == 5
  assert source.on_bad_image == "skip"
  for copy in (source, pickle.loads(pickle.dumps(source))):
    assert [copy.read_bytes(i) for i in range(7)] == encoded
  assert source.describe(3) == "record 3 of tfds:imagenet2012 (validation)"
  assert "tensorflow" not in sys.modules
  # The labels are listed once.
  (listed,) = path.parent.glob("kd_jax_labels_validation.npy")
  np.testing.assert_array_equal(np.load(listed), LABELS)
  np.save(listed, np.array(LABELS[::-1], np.int32))
  assert load_imagenet(tmp_path).labels.tolist() == LABELS[::-1]


def test_imagenet_streams_and_trains(imagenet, tmp_path):
  encoded, _ = imagenet
  source = load_imagenet(tmp_path)
  (got,) = data.eval_stream(source, 8)
  assert got["label"].tolist() == [*LABELS, 0]
  decoded = images.decode(encoded[2], "x")
  expected = images.evaluate_crop(decoded, size=4, resize=5)
  np.testing.assert_array_equal(got["image"][2], expected)
  chunk = data.create("grain", source, batch_size=7, seed=0).next_chunk(1)
  index = chunk["index"][0]
  assert sorted(index.tolist()) == list(range(7))
  np.testing.assert_array_equal(chunk["label"][0], source.labels[index])


def test_labels_of_other_records_are_noticed(imagenet, tmp_path):
  listed = imagenet[-1].parent / "kd_jax_labels_validation.npy"
  for content, words in (
    (np.zeros(6, np.int32), r"expected the int32 labels of 7 records.*\(6,\)"),
    (np.zeros(7), "got float64"),
  ):
    np.save(listed, content)
    with pytest.raises(ValueError, match=rf"\.npy: .*{words}.* Delete it"):
      load_imagenet(tmp_path)
  listed.write_bytes(b"nonsense")
  with pytest.raises(ValueError, match=r"\.npy: expected a list of labels"):
    load_imagenet(tmp_path)
  np.save(listed, np.array(LABELS[::-1], np.int32))
  with pytest.raises(
    ValueError, match=r"record 0 of .* label 999, expected 2 .*npy beside them"
  ):
    load_imagenet(tmp_path).read_bytes(0)


def test_a_read_only_folder_takes_no_list_of_labels(
  imagenet, tmp_path, monkeypatch, caplog
):
  def refuse(*_):
    raise OSError("read-only")

  monkeypatch.setattr(pathlib.Path, "open", refuse)
  assert load_imagenet(tmp_path).labels.tolist() == LABELS
  assert "labels" in caplog.text and "read-only" in caplog.text


def test_damaged_imagenet_records_are_reported(imagenet, tmp_path):
  path = imagenet[-1]
  load_imagenet(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  source = load_imagenet(tmp_path)
  with pytest.raises(
    data.BadImageError, match=r"record 6 of tfds:imagenet2012 \(validation\)"
  ):
    source.read_bytes(6)
  (path.parent / "kd_jax_labels_validation.npy").unlink()
  with pytest.raises(ValueError, match=r"test records of .* cut short or dama"):
    load_imagenet(tmp_path)
