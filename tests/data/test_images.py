"""Decoding whatever a file holds, and the crops against float64 arithmetic."""

import io
import math
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

from kd_jax.data import images


def picture(height=48, width=64):
  """Smooth colours and a sharp edge; no two corners alike."""
  y, x = np.mgrid[:height, :width]
  red = 255 * x / (width - 1)
  green = 255 * y / (height - 1)
  blue = np.where(x + 2 * y < width, 30, 220)
  return np.rint(np.stack([red, green, blue], -1)).astype(np.uint8)


def encode(array, format, mode=None, **options):
  image = Image.fromarray(array)
  if mode is not None:
    image = image.convert(mode)
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def close(got, expected, levels):
  assert got.dtype == np.uint8 and got.shape == expected.shape
  difference = np.abs(got.astype(int) - expected.astype(int))
  assert difference.mean() < levels, difference.mean()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_arrive_unchanged(format):
  got = images.decode(encode(picture(), format), "x.JPEG")
  np.testing.assert_array_equal(got, picture())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_colour_space(mode):
  content = encode(picture(), "JPEG", mode, quality=95, subsampling=0)
  expected = np.asarray(Image.fromarray(picture()).convert(mode).convert("RGB"))
  close(images.decode(content, "x.JPEG"), expected, 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_mode_becomes_rgb(mode):
  grey = np.array([[0, 255], [255, 0]], np.uint8)
  rgb = np.repeat(grey[..., None], 3, 2)
  np.testing.assert_array_equal(
    images.decode(encode(rgb, "PNG", mode), "x"), rgb
  )


def test_transparency_is_dropped():
  content = encode(np.full((2, 2, 4), [10, 20, 30, 0], np.uint8), "PNG")
  assert images.decode(content, "x")[1, 1].tolist() == [10, 20, 30]
  palette = Image.fromarray(np.zeros((2, 2), np.uint8), "L").convert("P")
  palette.putpalette([10, 20, 30, 40, 50, 60])
  file = io.BytesIO()
  palette.save(file, "PNG", transparency=b"\x80\x00")
  assert images.decode(file.getvalue(), "x")[0, 0].tolist() == [10, 20, 30]


def test_16_bit_grey_is_rounded_to_8():
  shades = np.array([[0, 128, 129, 64 * 257, 128 * 257 + 128, 65535]], "u2")
  got = images.decode(encode(shades, "PNG"), "x")
  assert got[0, :, 2].tolist() == [0, 0, 1, 64, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
  upright = picture()
  # How a camera stores it so that the orientation undoes it.
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.transpose(1, 0, 2),
    6: np.rot90(upright),
    7: upright[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(upright, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = np.ascontiguousarray(stored)
  np.testing.assert_array_equal(
    images.decode(encode(stored, "PNG", exif=exif), "x"), upright
  )
  content = encode(stored, "JPEG", exif=exif, quality=95, subsampling=0)
  close(images.decode(content, "x"), upright, 2)
  # The crop is drawn from the upright picture.
  crops = [
    images.load_random_resized_crop(
      content, "x", np.random.default_rng(seed), size=12
    )
    for seed in range(4)
  ]
  for seed, crop in enumerate(crops):
    rng = np.random.default_rng(seed)
    close(crop, images.random_resized_crop(upright, rng, size=12), 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_not_matter():
  unknown = Image.Exif()
  unknown[0x0112] = 9
  for exif in (unknown, b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0bad"):
    content = encode(picture(), "JPEG", exif=exif, quality=95)
    close(images.decode(content, "x"), picture(), 4)
    rng = np.random.default_rng(0)
    crop = images.load_random_resized_crop(content, "x", rng, size=12)
    assert crop.shape == (12, 12, 3)


def make_png(width, height, raw, colour=2, interlaced=0):
  """A PNG of 8 bits whose checksums hold, whatever its header says."""

  def part(kind, content):
    checksum = zlib.crc32(kind + content).to_bytes(4)
    return len(content).to_bytes(4) + kind + content + checksum

  size = width.to_bytes(4) + height.to_bytes(4)
  return b"".join(
    [
      b"\x89PNG\r\n\x1a\n",
      part(b"IHDR", size + bytes([8, colour, 0, 0, interlaced])),
      part(b"IDAT", zlib.compress(raw)),
      part(b"IEND", b""),
    ]
  )


def png_of_rows(image, rows):
  raw = b"".join(b"\0" + row.tobytes() for row in image[:rows])
  return make_png(image.shape[1], image.shape[0], raw)


# An interlaced grey 3 x 3 has passes of 2, 0, 0, 2, 3, 4 and 4 bytes.
BLACK = [
  (png_of_rows(np.zeros((5, 4, 3), np.uint8), 5), (5, 4, 3)),
  (make_png(3, 3, bytes(15), 0, 1), (3, 3, 3)),
]


@pytest.mark.parametrize(("content", "shape"), BLACK)
def test_a_black_png_is_read(content, shape):
  np.testing.assert_array_equal(images.decode(content, "x"), np.zeros(shape))


def bad_files():
  jpeg = encode(picture(), "JPEG", quality=95)
  png = encode(picture(), "PNG")
  yield "empty", b"", "it is empty: 0 bytes"
  yield "text", b"not an image", r"of no known format; known: .*JPEG"
  for share in (0.02, 0.5, 0.9):
    for name, whole in (("JPEG", jpeg), ("PNG", png)):
      yield f"{name} cut to {share}", whole[: int(len(whole) * share)], ""
  flipped = bytearray(png)
  flipped[png.index(b"IDAT") + 20] ^= 255
  yield "PNG with a flipped byte", bytes(flipped), ""
  flipped = bytearray(png)
  flipped[png.index(b"IDAT") + 60] ^= 1
  yield "PNG with a flipped bit", bytes(flipped), "damaged at byte"
  yield "PNG without its last row", png_of_rows(picture(), 47), "rows are miss"
  yield "interlaced", make_png(3, 3, bytes(11), 0, 1), "rows are missing"
  yield (
    "PNG of 182 megapixels",
    make_png(14000, 13000, b"", 0),
    r"than 179 megapixels; scale it",
  )
  start = jpeg.index(b"\xff\xda")
  scans = jpeg[:start] + b"\xff\xda" * 800_000 + jpeg[start:]
  yield "JPEG of many scans", scans, "scans are far too many"
  yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known"
  floats = encode(np.zeros((2, 2), np.float32), "TIFF")
  yield "float TIFF", floats, "8 or 16 bits, got floating point"
  integers = encode(np.array([[0, 70_000]], np.int32), "TIFF")
  yield "32-bit TIFF", integers, "got integers from 0 to 70000"


def test_no_flipped_bit_of_a_png_changes_its_pixels():
  image = picture(9, 12)
  content = encode(image, "PNG")
  for bit in range(8 * len(content)):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
      got = images.decode(bytes(flipped), "x")
    except images.BadImageError:
      continue
    np.testing.assert_array_equal(got, image)


BAD = [pytest.param(*rest, id=name) for name, *rest in bad_files()]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_what_cannot_be_decoded_is_named(content, words):
  expected = (
    r"^the/file\.JPEG: expected an image file, got one that cannot be"
    rf" decoded \(.*{words}"
  )
  with pytest.raises(images.BadImageError, match=expected):
    images.decode(content, "the/file.JPEG")
  with pytest.raises(images.BadImageError, match=expected):
    images.load_random_resized_crop(
      content, "the/file.JPEG", np.random.default_rng(0), size=8
    )


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(images.UnreadableError, match=r"none\.png does not exist"):
    images.read_file(tmp_path / "none.png")
  with pytest.raises(
    images.UnreadableError, match=r"cannot be read \(Is a directory\)\. Check"
  ):
    images.read_file(tmp_path)


@pytest.mark.parametrize("kind", [images.BadImageError, images.UnreadableError])
def test_the_error_travels_between_processes(kind):
  error = pickle.loads(pickle.dumps(kind("a.png: why")))
  assert isinstance(error, kind) and str(error) == "a.png: why"


def triangle_weights(length, out):
  """[out, length]: triangles as wide as the scale, in float64."""
  scale = length / out
  support = max(scale, 1.0)
  centres = (np.arange(out) + 0.5) * scale
  pixels = np.arange(length) + 0.5
  weights = np.maximum(0, 1 - np.abs(pixels - centres[:, None]) / support)
  return weights / weights.sum(1, keepdims=True)


def reference_crop(image, size, resize):
  """The whole picture resized, then cut; [size, size, 3] in float64."""
  height, width = image.shape[:2]
  if width <= height:
    new_width, new_height = resize, int(resize * height / width)
  else:
    new_width, new_height = int(resize * width / height), resize
  rows = triangle_weights(height, new_height)
  columns = triangle_weights(width, new_width)
  whole = np.einsum(
    "ah,bw,hwc->abc", rows, columns, image.astype(np.float64), optimize=True
  )
  top = round((new_height - size) / 2.0)
  left = round((new_width - size) / 2.0)
  return whole[top : top + size, left : left + size]


# The last two are enlarged.
SHAPES = [
  (48, 64),
  (33, 33),
  (375, 500),
  (101, 67),
  (20, 300),
  (9, 9),
  (5, 400),
]


@pytest.mark.parametrize(("size", "resize"), [(24, 27), (32, 32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_evaluation_crop_is_that_of_float64(shape, size, resize):
  noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  for image in (picture(*shape), noise):
    got = images.evaluate_crop(image, size=size, resize=resize)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    expected = reference_crop(image, size, resize)
    # Pillow rounds twice, to 8 bits.
    assert np.abs(got - expected).max() <= 1.001
  with pytest.raises(ValueError, match=r"at least the 32 pixels .*, got 31"):
    images.evaluate_crop(picture(), size=32, resize=31)


def test_boxes_lie_inside_and_have_the_shares_that_were_asked_for():
  rng = np.random.default_rng(0)
  width, height = 500, 375
  boxes = np.array([images.crop_box(width, height, rng) for _ in range(4000)])
  left, top, right, bottom = boxes.T
  assert left.min() >= 0 and top.min() >= 0
  assert right.max() <= width and bottom.max() <= height
  w, h = right - left, bottom - top
  share, aspect = w * h / (width * height), np.log(w / h)
  assert 0.078 < share.min() < 0.1 and 0.9 < share.max() <= 1
  assert abs(aspect).max() < math.log(4 / 3) + 0.02
  # Small crops always fit: there the draws are uniform, and so is the place.
  small = share < 0.4
  assert abs(aspect[small].mean()) < 0.02
  assert abs(share[small].mean() - 0.24) < 0.01
  place = left[small] / (width - w[small])
  assert abs(place.mean() - 0.5) < 0.02
  assert abs(np.var(place) - 1 / 12) < 0.01


@pytest.mark.parametrize(
  ("width", "height", "box"),
  [
    (1000, 10, (493, 0, 506, 10)),  # too wide: the largest 4 : 3
    (10, 1000, (0, 493, 10, 506)),
    (1, 500, (0, 249, 1, 250)),
  ],
)
def test_what_does_not_fit_is_cut_from_the_centre(width, height, box):
  rng = np.random.default_rng(0)
  got = images.crop_box(width, height, rng, area=(0.9, 1.0))
  assert got == box


def test_the_boxs_settings_are_obeyed():
  settings = {"area": (0.25, 0.25), "aspect": (1, 1)}
  for seed in range(20):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = images.crop_box(400, 400, rng, **settings)
    assert (right - left, bottom - top) == (200, 200)


def test_a_random_crop_is_the_box_resized():
  image = picture(96, 128)
  for seed in range(5):
    left, top, right, bottom = images.crop_box(
      128, 96, np.random.default_rng(seed), area=(0.3, 0.6)
    )
    got = images.random_resized_crop(
      image, np.random.default_rng(seed), size=16, area=(0.3, 0.6)
    )
    cut = image[top:bottom, left:right].astype(np.float64)
    rows = triangle_weights(bottom - top, 16)
    columns = triangle_weights(right - left, 16)
    expected = np.einsum("ah,bw,hwc->abc", rows, columns, cut)
    # At the border the filter may see a pixel beyond the box.
    inner = np.s_[1:-1, 1:-1]
    assert np.abs(got[inner] - expected[inner]).max() <= 1


def test_large_jpegs_are_decoded_smaller_without_a_visible_change(monkeypatch):
  content = encode(picture(480, 640), "JPEG", quality=95)
  decoded = []
  real = Image.Image.crop

  def cut(image, box):
    decoded.append(image.size)
    return real(image, box)

  monkeypatch.setattr(Image.Image, "crop", cut)
  settings = {"size": 24, "area": (0.5, 1.0)}
  for seed in range(4):
    first, second = (np.random.default_rng(seed) for _ in range(2))
    got = images.load_random_resized_crop(content, "x", first, **settings)
    whole = images.load(content, "x")
    close(got, images.random_resized_crop(whole, second, **settings), 1)
  assert set(decoded[1::2]) == {(640, 480)}
  assert max(decoded[::2]) < (320, 240)
