"""Image files to pixels: decoding, and the crops of ImageNet's recipes.

The content of a file decides its format, not its name. Photographs are turned
upright by their EXIF orientation; CMYK, grey, palette and 16-bit images become
8-bit RGB; an alpha channel is dropped. A file that is cut short is an error, as
is a PNG with a wrong checksum. A damaged JPEG may go unnoticed, since it has no
checksum: a cut one that is filled up with zeros has a rest that is grey.
"""

import contextlib
import io
import math
import os
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow reads more formats, some with programs of their own (Ghostscript).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# A JPEG is decoded at 1/2, 1/4 or 1/8 only if the crop keeps this many times
# the pixels per side that the network sees. On 64 ImageNet photographs the
# crops then differ by 0.2 to 1.1 levels of 255 in the mean from those of full
# decoding; with 1 instead of 2 it would be 0.3 to 2.2.
_MARGIN = 2
# Pixels times scans of a JPEG: encoders write about ten scans, and a small file
# of hundreds keeps a decoder busy for minutes.
_MAX_SCANNED = 2**31

Box = tuple[float, float, float, float]


class BadImageError(ValueError):
  """An image file that cannot be decoded; the text names it and the reason."""


class UnreadableError(OSError):
  """A file that is gone or does not give its bytes; the text names it."""


def read_file(path: str | os.PathLike[str]) -> bytes:
  """The content of an image file.

  Raises:
    UnreadableError: the file does not exist or cannot be read.
  """
  try:
    with open(path, "rb") as file:
      return file.read()
  except FileNotFoundError as error:
    raise UnreadableError(
      f"{path} does not exist: expected an image file. Check that the data are"
      " still there"
    ) from error
  except OSError as error:
    raise UnreadableError(
      f"{path}: expected an image file, got one that cannot be read"
      f" ({error.strerror}). Check the disk, or that it is still mounted"
    ) from error


# How files of the formats begin; those of PPM and BMP would fit texts too.
_BEGINNINGS = (
  *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*"),
)


def is_image(path: str | os.PathLike[str]) -> bool:
  """Whether a file begins as an image does, whatever its name."""
  try:
    with open(path, "rb") as file:
      begin = file.read(12)
  except OSError:
    return False
  webp = begin[:4] == b"RIFF" and begin[8:] == b"WEBP"
  return begin.startswith(_BEGINNINGS) or webp


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
  """Turns any error of a decoder into a BadImageError."""
  try:
    yield
  except MemoryError:
    raise
  # Damaged files make the decoders raise nearly any exception.
  except Exception as error:
    reason = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
      reason = f"of no known format; known: {', '.join(_FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
      most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
      reason = f"it has more than {most:.0f} megapixels; scale it down"
    raise BadImageError(
      f"{where}: expected an image file, got one that cannot be decoded"
      f" ({reason})"
    ) from error


def _open(content: bytes) -> Image.Image:
  """Reads the header; `load` decodes the pixels."""
  if not content:
    raise ValueError("it is empty: 0 bytes")
  image = Image.open(io.BytesIO(content), formats=_FORMATS)
  if image.format == "PNG":
    _check_png(content)
  elif image.format == "JPEG":
    scanned = content.count(b"\xff\xda") * image.width * image.height
    if scanned > _MAX_SCANNED:
      raise ValueError("its scans are far too many; save it again")
  return image


def _check_png(content: bytes) -> bytes:
  """Checks the checksums, which Pillow does not for the pixels.

  Returns:
    The compressed pixels.
  """
  at, pixels = 8, []
  while at < len(content):
    length = int.from_bytes(content[at : at + 4])
    end = at + length + 8
    kind, checksum = content[at + 4 : at + 8], content[end : end + 4]
    if zlib.crc32(content[at + 4 : end]) != int.from_bytes(checksum):
      raise ValueError(f"it is cut short or damaged at byte {at}")
    if kind == b"IDAT":
      pixels.append(content[at + 8 : end])
    if kind == b"IEND":
      break
    at = end + 4
  return b"".join(pixels)


def _load(image: Image.Image, content: bytes) -> None:
  """Decodes the pixels; a PNG must have all its rows."""
  image.load()
  if image.format != "PNG":
    return
  # Pillow leaves rows at zero that are not there, which rarely are so.
  first = max(image.height - 2, 0)
  last = np.asarray(image.crop((0, first, image.width, image.height)))
  if last.reshape(len(last), -1).any(axis=1).all():
    return
  bits, colour, *_, interlaced = content[24:29]
  bits *= {2: 3, 4: 2, 6: 4}.get(colour, 1)
  expected = 0
  for left, top, x, y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
    columns = -((left - image.width) // x)
    rows = -((top - image.height) // y)
    if columns > 0 and rows > 0:
      expected += rows * (1 + (columns * bits + 7) // 8)
  unpacked = zlib.decompressobj().decompress(_check_png(content), expected)
  if len(unpacked) < expected:
    raise ValueError("its last rows are missing")


# First column and row of each pass of an interlaced PNG, and the steps.
_ADAM7 = (
  *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4)),
  *((1, 0, 2, 2), (0, 1, 1, 2)),
)


def _is_turned(image: Image.Image) -> bool:
  """Whether EXIF's orientation exchanges height and width."""
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
  except Exception:  # damaged EXIF data
    return False


def _upright(image: Image.Image) -> Image.Image:
  """Turns a photograph as EXIF says, and converts it to RGB."""
  with contextlib.suppress(Exception):  # damaged EXIF data
    ImageOps.exif_transpose(image, in_place=True)
  return _rgb(image)


def _eight_bits(image: Image.Image) -> Image.Image:
  """Scales 16-bit grey; Pillow would clip it."""
  values = np.asarray(image)
  if values.min() < 0 or values.max() > 65535:
    raise ValueError(
      "expected values of 8 or 16 bits, got integers from"
      f" {values.min()} to {values.max()}"
    )
  return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype("u1"))


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode == "RGB":  # convert would copy
    return image
  if image.mode == "F":
    raise ValueError("expected values of 8 or 16 bits, got floating point")
  if image.mode.startswith("I"):
    image = _eight_bits(image)
  if "transparency" in image.info:
    image = image.convert("RGBA")
  return image.convert("RGB")


def load(content: bytes, where: str) -> Image.Image:
  """Decodes an image file.

  Args:
    content: the whole file.
    where: its name, for the error.

  Returns:
    The upright picture, mode RGB.

  Raises:
    BadImageError: it cannot be decoded to its end.
  """
  with _named(where):
    image = _open(content)
    _load(image, content)
    return _upright(image)


def decode(content: bytes, where: str) -> np.ndarray:
  """Decodes an image file to uint8 [H, W, 3]; see `load`."""
  return np.asarray(load(content, where))


def _picture(image: Image.Image | np.ndarray) -> Image.Image:
  return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _resize(image: Image.Image, size: int, box: Box) -> np.ndarray:
  """Resizes a box to uint8 [size, size, 3], antialiased bilinear."""
  return np.asarray(
    image.resize((size, size), Image.Resampling.BILINEAR, box=box)
  )


def _resize_crop(image: Image.Image, size: int, box: Box) -> np.ndarray:
  """Resizes a crop without looking at the pixels around it."""
  left, top = math.floor(box[0]), math.floor(box[1])
  cut = image.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
  inside = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
  return _resize(cut, size, inside)


def evaluate_crop(
  image: Image.Image | np.ndarray, *, size: int, resize: int
) -> np.ndarray:
  """Resizes the shorter side, then crops the centre, as torchvision does.

  The longer side becomes `int(resize * longer / shorter)` pixels, and the crop
  begins at `round((side - size) / 2)`. Only the centre is computed.

  Args:
    image: RGB picture or uint8 [H, W, 3].
    size: height and width of the crop, in pixels.
    resize: the shorter side before the crop; at least `size`.

  Returns:
    uint8 [size, size, 3].

  Raises:
    ValueError: resize is less than size.
  """
  if resize < size:
    raise ValueError(
      f"resize must be at least the {size} pixels of the crop, got {resize}."
    )
  image = _picture(image)
  shorter = min(image.size)
  new = [int(resize * side / shorter) for side in image.size]
  left, top = (round((side - size) / 2) for side in new)
  x, y = image.width / new[0], image.height / new[1]
  box = (left * x, top * y, (left + size) * x, (top + size) * y)
  return _resize(image, size, box)


def crop_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  *,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
  """Draws a crop as torchvision's RandomResizedCrop does.

  After Szegedy et al., Going Deeper with Convolutions, 2015: the share of the
  picture's area is uniform, the aspect ratio uniform in its logarithm. A crop
  that does not fit is drawn again, up to ten times; then the largest central
  crop with an aspect ratio in range is taken.

  Args:
    width: of the picture, in pixels.
    height: of the picture, in pixels.
    rng: where the draws come from.
    area: least and largest share of the picture's area.
    aspect: least and largest width / height.

  Returns:
    left, top, right, bottom, in pixels.
  """
  for _ in range(10):
    pixels = width * height * rng.uniform(*area)
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      left = int(rng.integers(width - w + 1))
      return left, top, left + w, top + h
  ratio = min(max(width / height, aspect[0]), aspect[1])
  w = max(1, min(width, round(height * ratio)))
  h = max(1, min(height, round(width / ratio)))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_resized_crop(
  image: Image.Image | np.ndarray,
  rng: np.random.Generator,
  *,
  size: int,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Draws a crop and resizes it; torchvision's RandomResizedCrop.

  Args:
    image: RGB picture or uint8 [H, W, 3].
    rng: where the draws come from; see `crop_box`.
    size: height and width of the result, in pixels.
    area: least and largest share of the picture's area.
    aspect: least and largest width / height.

  Returns:
    uint8 [size, size, 3].
  """
  image = _picture(image)
  box = crop_box(image.width, image.height, rng, area=area, aspect=aspect)
  return _resize_crop(image, size, box)


def load_random_resized_crop(
  content: bytes,
  where: str,
  rng: np.random.Generator,
  *,
  size: int,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Decodes an image file and draws a crop; see `random_resized_crop`.

  The crop is the same as from the decoded picture. If it has far more pixels
  than are wanted, the JPEG decoder scales the picture down first.

  Args:
    content: the whole file.
    where: its name, for the error.
    rng: where the draws come from; see `crop_box`.
    size: height and width of the result, in pixels.
    area: least and largest share of the picture's area.
    aspect: least and largest width / height.

  Returns:
    uint8 [size, size, 3].

  Raises:
    BadImageError: the file cannot be decoded to its end.
  """
  with _named(where):
    image = _open(content)
    if image.format != "JPEG":  # others may keep their EXIF data behind
      _load(image, content)
    width, height = image.size[:: -1 if _is_turned(image) else 1]
    left, top, right, bottom = crop_box(
      width, height, rng, area=area, aspect=aspect
    )
    spare = min(right - left, bottom - top) // (_MARGIN * size)
    if spare > 1:
      image.draft(None, (image.width // spare, image.height // spare))
    image.load()
    image = _upright(image)
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, right * x, bottom * y)
    return _resize_crop(image, size, box)
