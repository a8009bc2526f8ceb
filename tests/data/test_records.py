"""ImageNet in records: random access without decoding, labels listed once."""

import io
import json
import pathlib
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.data import images as images_lib


def prepare_imagenet(tfds, folder, images, labels, split="validation"):
  """Writes what TFDS's `download_and_prepare` writes, with JPEGs."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  builder = tfds.builder("imagenet2012", data_dir=folder)
  out = folder / "imagenet2012" / str(builder.version)
  out.mkdir(parents=True, exist_ok=True)
  path = out / f"imagenet2012-{split}.array_record-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for i, (image, label) in enumerate(zip(images, labels)):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(image)
    feature["file_name"].bytes_list.value.append(f"{i}.JPEG".encode())
    feature["label"].int64_list.value.append(label)
    writer.write(example.SerializeToString())
  writer.close()
  builder.info.features.save_metadata(out)
  builder.info.features.save_config(out)
  info = {
    "name": "imagenet2012",
    "version": str(builder.version),
    "fileFormat": "array_record",
    "splits": [
      {
        "name": split,
        "shardLengths": [str(len(labels))],
        "numBytes": str(sum(map(len, images))),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
    ],
  }
  (out / "dataset_info.json").write_text(json.dumps(info))
  return path


def encoded(count):
  rng = np.random.default_rng(0)
  for i in range(count):
    file = io.BytesIO()
    image = rng.integers(0, 256, (9 + i % 3, 12, 3), np.uint8)
    Image.fromarray(image).save(file, "JPEG")
    yield file.getvalue()


@pytest.fixture
def imagenet(tfds, tmp_path):
  images, labels = list(encoded(7)), [999, 0, 3, 5, 3, 1, 2]
  path = prepare_imagenet(tfds, tmp_path, images, labels)
  return images, labels, path


def load_imagenet(folder, **options):
  return data.load(
    "tfds:imagenet2012", split="test", dir=folder, image_size=4, **options
  )


def test_tfds_imagenet_is_read_without_decoding(imagenet, tmp_path):
  images, labels, path = imagenet
  source = load_imagenet(tmp_path)
  assert len(source) == 7 and source.labels.tolist() == labels
  assert source.labels.dtype == np.int32
  assert source.num_classes == 1000
  assert source.class_names[:2] == ("n01440764", "n01443537")
  assert source.image_shape == (4, 4, 3) and source.resize == 5
  for copy in (source, pickle.loads(pickle.dumps(source))):
    assert [copy.read_bytes(i) for i in range(7)] == images
  assert source.describe(3) == "record 3 of tfds:imagenet2012 (validation)"
  assert "tensorflow" not in sys.modules
  # Listed once.
  (listed,) = path.parent.glob("kd_jax_labels_validation.npy")
  np.testing.assert_array_equal(np.load(listed), labels)
  np.save(listed, np.array(labels[::-1], np.int32))
  assert load_imagenet(tmp_path).labels.tolist() == labels[::-1]


def test_tfds_imagenet_streams_and_trains(imagenet, tmp_path):
  images, labels, _ = imagenet
  source = load_imagenet(tmp_path, on_bad_image="error")
  (got,) = data.eval_stream(source, 8)
  assert got["label"].tolist() == [*labels, 0]
  expected = images_lib.evaluate_crop(
    images_lib.decode(images[2], "x"), size=4, resize=5
  )
  np.testing.assert_array_equal(got["image"][2], expected)
  pipeline = data.create("grain", source, batch_size=7, seed=0)
  chunk = pipeline.next_chunk(1)
  index = chunk["index"][0]
  assert sorted(index.tolist()) == list(range(7))
  np.testing.assert_array_equal(chunk["label"][0], source.labels[index])


def test_labels_of_other_records_are_noticed(imagenet, tmp_path):
  _, labels, path = imagenet
  listed = path.parent / "kd_jax_labels_validation.npy"
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
  np.save(listed, np.array(labels[::-1], np.int32))
  source = load_imagenet(tmp_path)
  with pytest.raises(
    ValueError, match=r"record 0 of .* label 999, expected 2, .*npy beside them"
  ):
    source.read_bytes(0)


def test_a_folder_that_takes_no_list_of_labels(
  imagenet, tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(
    pathlib.Path, "open", lambda *_: (_ for _ in ()).throw(OSError("read-only"))
  )
  assert load_imagenet(tmp_path).labels.tolist() == imagenet[1]
  assert "Could not keep the labels" in caplog.text


def test_damaged_imagenet_records_are_reported(imagenet, tmp_path):
  path = imagenet[-1]
  load_imagenet(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  source = load_imagenet(tmp_path)
  with pytest.raises(
    images_lib.BadImageError,
    match=r"record 6 of tfds:imagenet2012 \(validation\): .*cannot be read",
  ):
    source.read_bytes(6)
  (path.parent / "kd_jax_labels_validation.npy").unlink()
  with pytest.raises(ValueError, match=r"test records of .* cut short or dama"):
    load_imagenet(tmp_path)
