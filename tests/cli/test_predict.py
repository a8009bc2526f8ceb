"""Classifying image files: names, sizes, formats, and what is no image."""

import types

import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.cli import predict
from kd_jax.interop import store


@pytest.fixture
def model(smoke_run):
  return smoke_run("kd_cifar")


@pytest.fixture
def source():
  return data.load("synthetic", split="test", image_size=16, num_examples=64)


def test_command_line_prints_five_names_for_each_image(
  model, source, tmp_path, run_main, capsys
):
  paths = [tmp_path / f"{i}.png" for i in range(3)]
  for path, image in zip(paths, source.images, strict=False):
    Image.fromarray(image).save(path)
  assert run_main(predict, "--model", model, *paths) == 0
  lines = capsys.readouterr().out.splitlines()
  logits = np.asarray(store.load(model).logits(source.images[:3]))
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  expected = []
  for path, row in zip(paths, p, strict=True):
    best = sorted(range(10), key=lambda i: -row[i])[:5]
    shown = ", ".join(f"class {i} {100 * row[i]:.1f} %" for i in best)
    expected.append(f"{path}: {shown}")
  assert lines == expected


def test_top_classes_of_few_classes():
  model = types.SimpleNamespace(
    card={"class_names": ["cat", "dog"]},
    logits=lambda images: np.log([[0.25, 0.75]] * len(images)),
  )
  (best,) = predict.top_classes(model, np.zeros((1, 4, 4, 3), np.uint8))
  assert [name for name, _ in best] == ["dog", "cat"]
  assert [p for _, p in best] == pytest.approx([0.75, 0.25])


def test_png_arrives_unchanged(tmp_path, source):
  Image.fromarray(source.images[0]).save(tmp_path / "x.png")
  got = predict.read_image(tmp_path / "x.png", height=16, width=16)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, source.images[0])


def test_other_sizes_are_resized(tmp_path):
  # Red above, blue below, twice as high as the model's images.
  image = np.zeros((32, 20, 3), np.uint8)
  image[:16, :, 0] = image[16:, :, 2] = 200
  Image.fromarray(image).save(tmp_path / "x.png")
  got = predict.read_image(tmp_path / "x.png", height=16, width=10)
  assert got.shape == (16, 10, 3)
  np.testing.assert_array_equal(
    got[:7], np.broadcast_to([200, 0, 0], (7, 10, 3))
  )
  np.testing.assert_array_equal(
    got[9:], np.broadcast_to([0, 0, 200], (7, 10, 3))
  )
  assert got[7, 0, 0] > got[8, 0, 0]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_other_modes_become_rgb(tmp_path, mode):
  grey = np.array([[0, 255], [255, 0]], np.uint8)
  image = Image.fromarray(grey)
  if mode == "I;16":
    image = Image.fromarray(grey.astype(np.uint16) * 257)
  else:
    image = image.convert("RGB").convert(mode)
  path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
  image.save(path)
  got = predict.read_image(path, height=2, width=2)
  np.testing.assert_array_equal(got, np.repeat(grey[..., None], 3, axis=2))


def test_16_bit_grey_keeps_its_shades(tmp_path):
  shades = np.array([[0, 64 * 257, 128 * 257, 65535]], np.uint16)
  Image.fromarray(shades).save(tmp_path / "x.png")
  got = predict.read_image(tmp_path / "x.png", height=1, width=4)
  assert got[0, :, 0].tolist() == [0, 64, 128, 255]


def test_orientation_of_photographs(tmp_path):
  image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter
  image.save(tmp_path / "x.png", exif=exif)
  got = predict.read_image(tmp_path / "x.png", height=4, width=3)
  np.testing.assert_array_equal(got[..., 0], np.rot90(np.asarray(image), -1))


def broken(path, how):
  Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(path)
  content = bytearray(path.read_bytes())
  if how == "text":
    content = b"not an image"
  elif how == "empty":
    content = b""
  elif how == "cut short":
    content = content[: len(content) // 2]
  elif how == "damaged":
    at = content.index(b"IDAT")
    content[at + 6 : at + 12] = b"\xff" * 6
  elif how == "damaged chunk":
    at = content.index(b"IDAT")
    content[at : at + 4] = b"\x00\x01\x02\x03"
  path.write_bytes(content)


@pytest.mark.parametrize(
  "how", ["text", "empty", "cut short", "damaged", "damaged chunk"]
)
def test_what_is_no_image_is_refused(model, tmp_path, how, run_main, capsys):
  path = tmp_path / "x.png"
  broken(path, how)
  assert run_main(predict, "--model", model, path) == 2
  output = capsys.readouterr()
  assert output.err.startswith(
    f"{path}: expected an image file, got one that cannot be decoded ("
  )
  assert output.out == ""


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("none.png", "does not exist: expected an image file"),
    ("", "expected an image file, got one that cannot be read (Is a dir"),
  ],
)
def test_no_file_and_a_folder(model, tmp_path, name, words, run_main, capsys):
  assert run_main(predict, "--model", model, tmp_path / name) == 2
  assert words in capsys.readouterr().err


def test_no_model(tmp_path, run_main, capsys):
  assert run_main(predict, "--model", tmp_path, "x.png") == 2
  error = capsys.readouterr().err
  assert "got a folder with neither" in error
