"""Image files to pixels: decoding, and the crops of ImageNet's recipes.

The content of a file decides its format, not its name. Photographs are turned
upright by their EXIF orientation; CMYK, grey, palette and 16-bit images become
8-bit RGB; an alpha channel is dropped. A file that is cut short is an error.
Damage that Pillow does not notice stays unnoticed: JPEG has no checksum, and a
cut file that is filled up with zeros decodes to a picture whose rest is grey.
"""

import contextlib
import io
import math
import os
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


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
  """Turns any error of a decoder into a BadImageError."""
  try:
    yield
  except MemoryError:
    raise
  # Damaged files make the decoders raise nearly any exception.
  except Exception as error:
    reason = str(error)
    if isinstance(error, UnidentifiedImageError):
      reason = f"of no known format; known: {', '.join(_FORMATS)}"
    raise BadImageError(
      f"{where}: expected an image file, got one that cannot be decoded"
      f" ({reason})"
    ) from error


def _open(content: bytes) -> Image.Image:
  """Reads the header; `load` decodes the pixels."""
  if not content:
    raise ValueError("it is empty: 0 bytes")
  return Image.open(io.BytesIO(content), formats=_FORMATS)


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
    image.load()
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
      image.load()
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
