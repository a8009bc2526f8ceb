"""Where images come from: whole labelled sets, as uint8 arrays in memory."""

import dataclasses
import gzip
import importlib.util
import io
import os
import pathlib
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from kd_jax.data import folder, records, safe_pickle
from kd_jax.data.common import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  SPLITS,
  check_classes,
  check_labels,
  unknown_name,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """One split of a labelled image set, in memory.

  Attributes:
    images: uint8 [N, H, W, 3]; kept C-contiguous.
    labels: int32 [N], in 0..num_classes - 1.
    num_classes: K.
    class_names: K names, in the labels' order.
    mean: per channel, of x / 255, of the training split.
    std: per channel, of x / 255, of the training split.
    name: what `load` was asked for.
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  name: str

  def __post_init__(self):
    images, labels = self.images, self.labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(
        f"The images of {self.name} must be uint8 [N, H, W, 3], got"
        f" {images.dtype} {images.shape}."
      )
    check_classes(
      labels, len(images), self.num_classes, self.class_names, self.name
    )
    # numpy's take copies the whole set for every batch of any other layout.
    object.__setattr__(self, "images", np.ascontiguousarray(images))
    object.__setattr__(self, "labels", np.ascontiguousarray(labels))

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the network's input."""
    height, width, channels = self.images.shape[1:]
    return height, width, channels


# CIFAR in the publisher's python layout (Krizhevsky, Learning Multiple Layers
# of Features from Tiny Images, 2009).


@dataclasses.dataclass(frozen=True)
class _Cifar:
  folder: str
  archive: str
  files: dict[str, tuple[str, ...]]
  meta: str
  names_key: str
  labels_key: str
  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


_CIFAR = {
  "cifar10": _Cifar(
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    files={
      "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
      "test": ("test_batch",),
    },
    meta="batches.meta",
    names_key="label_names",
    labels_key="labels",
    num_classes=10,
    mean=(0.49139968, 0.48215841, 0.44653091),
    std=(0.24703223, 0.24348513, 0.26158784),
  ),
  "cifar100": _Cifar(
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    files={"train": ("train",), "test": ("test",)},
    meta="meta",
    names_key="fine_label_names",
    labels_key="fine_labels",
    num_classes=100,
    # The values that the reference toolboxes normalise with.
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
  ),
}


@dataclasses.dataclass(frozen=True)
class Constants:
  """What is known of a set without its files.

  Attributes:
    num_classes: K.
    class_names: K names, in the labels' order.
    image_shape: (height, width, channels) as networks take them.
    mean: per channel, of x / 255; see `Source`.
    std: per channel, of x / 255.
  """

  num_classes: int
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]


_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock
cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


# Classes, and pixels of the network's input.
_IMAGENET = {
  "imagenet": (1000, 224),
  "tfds:imagenet2012": (1000, 224),
  "tiny-imagenet": (200, 64),
}


def constants(name: str) -> Constants:
  """What is known of a set without its files.

  Args:
    name: one that `load` knows, but not "folder" ("tfds:cifar10" is
      "cifar10"). The classes of ImageNet are called "0" to "999", those of
      Tiny ImageNet "0" to "199".

  Returns:
    Its constants.

  Raises:
    ValueError: unknown name, or "folder".
  """
  if name in _IMAGENET:
    count, size = _IMAGENET[name]
    names = tuple(map(str, range(count)))
    return Constants(count, names, (size, size, 3), IMAGENET_MEAN, IMAGENET_STD)
  layout = _CIFAR.get(name.removeprefix("tfds:"))
  if layout is not None:
    listed = {10: _CIFAR10_NAMES, 100: _CIFAR100_NAMES}[layout.num_classes]
    return Constants(
      layout.num_classes,
      tuple(listed.split()),
      (32, 32, 3),
      layout.mean,
      layout.std,
    )
  if name == "folder":
    raise ValueError(
      "Nothing is known of the data set 'folder' without its files. Name the"
      f" set that its classes are of: {', '.join(_IMAGENET)}, or load it."
    )
  if name not in _SOURCES:
    raise unknown_name("data set", name, _SOURCES)
  # The others are made, not read.
  source = load(name, split="test")
  return Constants(
    source.num_classes,
    source.class_names,
    source.image_shape,
    source.mean,
    source.std,
  )


def _read_folder(
  folder: pathlib.Path, members: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
  read = {}
  for member in members:
    path = folder / member
    if not path.is_file():
      raise ValueError(
        f"{folder} lacks the file {member} (expected {', '.join(members)})."
        " Unpack the archive again."
      )
    with path.open("rb") as file:
      read[member] = safe_pickle.load(file, str(path))
  return read


def _read_archive(
  archive: pathlib.Path, folder: str, members: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
  wanted = {f"{folder}/{member}": member for member in members}
  read = {}
  try:
    # In the order of the archive, so that it is decompressed only once, and to
    # its very end, where gzip keeps the checksum.
    with (
      gzip.open(archive) as stream,
      tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
      for entry in tar:
        member = wanted.get(entry.name.removeprefix("./"))
        file = tar.extractfile(entry) if member else None
        if member is None or file is None:
          continue
        content = io.BytesIO(file.read())
        read[member] = safe_pickle.load(content, f"{archive}: {entry.name}")
      while stream.read(1 << 20):
        pass
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise ValueError(
      f"{archive} is cut short or damaged: expected a whole .tar.gz archive,"
      f" got {type(error).__name__}: {error}. Delete it and download it again."
    ) from error
  missing = sorted(set(members) - set(read))
  if missing:
    raise ValueError(
      f"{archive} lacks {', '.join(missing)} (expected {', '.join(wanted)}):"
      " it is cut short or another archive. Download it again."
    )
  return read


def _read_cifar(
  name: str, layout: _Cifar, base: pathlib.Path, members: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
  """Finds the folder or the archive, and reads `members` from it."""
  if (base / layout.folder).is_dir():
    return _read_folder(base / layout.folder, members)
  if any((base / member).is_file() for member in members):
    return _read_folder(base, members)
  for archive in (base / layout.archive, base):
    if archive.is_file():
      return _read_archive(archive, layout.folder, members)
  exists = "holds neither" if base.is_dir() else "does not exist"
  raise ValueError(
    f"No {name} data: expected the folder {layout.folder} or the file"
    f" {layout.archive} in {str(base)!r}, which {exists}. Either download"
    f" {layout.archive} from the CIFAR page of the University of Toronto and"
    " put it there (it need not be unpacked), or name the folder that has it"
    f" with --config.data.dir=FOLDER, or use the source tfds:{name}"
    " (TensorFlow Datasets). The source 'digits' needs no file."
  )


def _cifar_rows(
  content: dict[str, Any], layout: _Cifar, where: str
) -> tuple[np.ndarray, np.ndarray]:
  """The checked rows and labels of one data file."""
  for key in ("data", layout.labels_key):
    if key not in content:
      raise ValueError(
        f"{where} has no {key!r}, got {sorted(content)}: it is of another"
        " data set. Check the folder, or the source's name."
      )
  data, labels = content["data"], content[layout.labels_key]
  if (
    not isinstance(data, np.ndarray)
    or data.dtype != np.uint8
    or data.ndim != 2
    or data.shape[1] != 3072
  ):
    got = getattr(data, "shape", type(data).__name__)
    raise ValueError(
      f"The data of {where} must be uint8 rows of 3072 values (3 x 32 x 32),"
      f" got {got}. Download the archive again."
    )
  if not isinstance(labels, list) or not all(
    isinstance(label, int) for label in labels
  ):
    raise ValueError(
      f"The {layout.labels_key} of {where} must be a list of integers, got"
      f" {type(labels).__name__}. Download the archive again."
    )
  if len(labels) != len(data):
    raise ValueError(
      f"Wrong row count in {where}: expected one label per image, got"
      f" {len(data)} images and {len(labels)} labels. Download the archive"
      " again."
    )
  # int64 first: a label may be too large for int32.
  wide = np.array(labels, np.int64)
  check_labels(wide, layout.num_classes, where)
  return data, wide.astype(np.int32)


def _load_cifar(name: str, split: str, directory: pathlib.Path) -> Source:
  layout = _CIFAR[name]
  members = layout.files[split]
  content = _read_cifar(name, layout, directory, (*members, layout.meta))
  parts = [
    _cifar_rows(content[member], layout, f"{name} ({member})")
    for member in members
  ]
  names = content[layout.meta].get(layout.names_key)
  if not isinstance(names, list) or len(names) != layout.num_classes:
    got = len(names) if isinstance(names, list) else "none"
    raise ValueError(
      f"The file {layout.meta} of {name} must list {layout.num_classes}"
      f" {layout.names_key}, got {got}. Download the archive again."
    )
  rows = np.concatenate([data for data, _ in parts])
  images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return Source(
    images=images,
    labels=np.concatenate([labels for _, labels in parts]),
    num_classes=layout.num_classes,
    class_names=tuple(
      item.decode("latin1") if isinstance(item, bytes) else str(item)
      for item in names
    ),
    mean=layout.mean,
    std=layout.std,
    name=name,
  )


# TensorFlow Datasets.


# What the publisher's files of a set are called here.
_PUBLISHED = {"imagenet2012": "imagenet"}


def _import_tfds(name: str) -> Any:
  dataset = name.removeprefix("tfds:")
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ImportError(
      f"The source {name} needs the package tensorflow-datasets. Install it"
      " (pip install tensorflow-datasets array_record), or use the source"
      f" {_PUBLISHED.get(dataset, dataset)} (the publisher's files)."
    ) from error
  return tfds


def _tfds_builder(tfds: Any, dataset: str, directory: str) -> Any:
  """The builder of a set that is prepared for random access."""
  # Where this project keeps its data, then TFDS's own folder.
  searched, other_format = [], None
  for data_dir in (directory, None):
    builder = tfds.builder(dataset, data_dir=data_dir)
    searched.append(str(builder.data_dir))
    if builder.is_prepared():
      formats = {item.value for item in builder.info.available_file_formats()}
      if "array_record" in formats:
        return builder
      other_format = str(builder.data_dir)
  if other_format is not None:
    raise ValueError(
      f"tfds:{dataset} is prepared in {other_format} in a format that cannot"
      " be read without TensorFlow, expected array_record. Prepare it with"
      ' file_format="array_record" in another folder, and name that one with'
      " --config.data.dir=FOLDER."
    )
  if importlib.util.find_spec("tensorflow") is None:
    raise ValueError(
      f"tfds:{dataset} is not prepared (looked in {' and '.join(searched)}),"
      " and preparing it needs TensorFlow, which is not installed. Either"
      " pip install tensorflow (needed only once) and start again, or prepare"
      f' it elsewhere with tfds.builder("{dataset}", data_dir=FOLDER,'
      ' file_format="array_record").download_and_prepare() and name that'
      " folder with --config.data.dir=FOLDER, or use the source"
      f" {_PUBLISHED.get(dataset, dataset)} (the publisher's files)."
    )
  builder = tfds.builder(
    dataset, data_dir=directory, file_format="array_record"
  )
  builder.download_and_prepare()
  return builder


def _damaged_records(
  name: str, split: str, builder: Any, error: Exception
) -> ValueError:
  return ValueError(
    f"The {split} records of {name} are cut short or damaged, got"
    f" {type(error).__name__}: {error}. Delete {builder.data_dir} and prepare"
    " it again."
  )


def _load_tfds(name: str, split: str, directory: pathlib.Path) -> Source:
  dataset = name.removeprefix("tfds:")
  tfds = _import_tfds(name)
  builder = _tfds_builder(tfds, dataset, os.fspath(directory))
  try:
    found = builder.as_data_source(split, file_format="array_record")
    examples = found.__getitems__(range(len(found)))
  # The record reader and the image decoder raise errors of their own.
  except Exception as error:
    raise _damaged_records(name, split, builder, error) from error
  layout = _CIFAR[dataset]
  return Source(
    images=np.stack([example["image"] for example in examples]),
    labels=np.array([example["label"] for example in examples], np.int32),
    num_classes=builder.info.features["label"].num_classes,
    class_names=tuple(builder.info.features["label"].names),
    mean=layout.mean,
    std=layout.std,
    name=name,
  )


def _load_tfds_encoded(
  name: str, split: str, directory: pathlib.Path, **options: Any
) -> records.RecordSource:
  tfds = _import_tfds(name)
  dataset = name.removeprefix("tfds:")
  builder = _tfds_builder(tfds, dataset, os.fspath(directory))
  published = {"train": "train", "test": "validation"}[split]
  try:
    found = builder.as_data_source(
      published,
      file_format="array_record",
      decoders={"image": tfds.decode.SkipDecoding()},
    )
    path = pathlib.Path(builder.data_dir) / f"kd_jax_labels_{published}.npy"
    labels = records.read_labels(found, path)
  except records.StaleLabelsError:
    raise
  # The record reader raises errors of its own.
  except Exception as error:
    raise _damaged_records(name, split, builder, error) from error
  feature = builder.info.features["label"]
  return records.RecordSource(
    records=found,
    split=published,
    labels=labels,
    num_classes=feature.num_classes,
    class_names=tuple(feature.names),
    name=name,
    **options,
  )


# Sets that need no file.


def _bilinear(images: np.ndarray, size: int) -> np.ndarray:
  """Resizes [N, H, H] to [N, size, size], pixel centres at halves."""
  height = images.shape[1]
  centres = (np.arange(size) + 0.5) * height / size - 0.5
  centres = np.clip(centres, 0, height - 1)[:, None]
  weights = np.maximum(0, 1 - np.abs(centres - np.arange(height)))
  return weights @ images @ weights.T


def _load_digits(
  name: str, split: str, directory: pathlib.Path, *, image_size: int = 32
) -> Source:
  """scikit-learn's 1797 digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998).

  Every fifth digit of each class's sequence is a test example: 1437 and 360,
  the same on every machine and under every seed.
  """
  del directory
  try:
    from sklearn.datasets import load_digits
  except ModuleNotFoundError as error:
    raise ImportError(
      "The source digits needs the package scikit-learn. Install it (pip"
      " install scikit-learn), or use the source synthetic."
    ) from error
  digits = load_digits()
  by_class = np.argsort(digits.target, kind="stable")
  chosen = {
    "test": np.sort(by_class[::5]),
    "train": np.sort(np.delete(by_class, np.s_[::5])),
  }

  def images(rows: np.ndarray) -> np.ndarray:
    grey = _bilinear(digits.images[rows] * (255 / 16), image_size)
    grey = np.rint(grey).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)

  train = images(chosen["train"]) / 255
  return Source(
    images=images(chosen[split]),
    labels=digits.target[chosen[split]].astype(np.int32),
    num_classes=10,
    class_names=tuple(str(digit) for digit in range(10)),
    mean=(float(train.mean()),) * 3,
    std=(float(train.std()),) * 3,
    name=name,
  )


def _load_synthetic(
  name: str,
  split: str,
  directory: pathlib.Path,
  *,
  num_examples: int = 1024,
  num_classes: int = 10,
  image_size: int = 32,
) -> Source:
  """A coarse pattern per class under noise of the same strength.

  Classes are equally frequent; the patterns are the same in both splits and
  the noise is not, so that what is learnt in training shows in the test.
  """
  del directory
  coarse = 4
  labels = np.arange(num_examples) % num_classes
  patterns = np.random.default_rng(0).integers(
    0, 128, (num_classes, coarse, coarse, 3), np.uint8
  )
  cell = np.arange(image_size) * coarse // image_size
  patterns = patterns[:, cell][:, :, cell]
  noise = np.random.default_rng((1, SPLITS.index(split))).integers(
    0, 128, (num_examples, image_size, image_size, 3), np.uint8
  )
  return Source(
    images=patterns[labels] + noise,
    labels=labels.astype(np.int32),
    num_classes=num_classes,
    class_names=tuple(f"class {i}" for i in range(num_classes)),
    # Of the sum of two uniform values in 0..127.
    mean=(127 / 255,) * 3,
    std=(float(np.sqrt((128**2 - 1) / 6) / 255),) * 3,
    name=name,
  )


# Images in files.


def _load_folder(
  name: str, split: str, directory: pathlib.Path, **options: Any
) -> folder.FolderSource:
  # Tiny ImageNet's images have the size of its networks' input.
  native = {"image_size": 64, "resize": 64} if name == "tiny-imagenet" else {}
  return folder.load_folder(
    directory, split, name=name, **{**native, **options}
  )


_SOURCES: dict[str, Callable[..., Source | folder.EncodedSource]] = {
  "cifar10": _load_cifar,
  "cifar100": _load_cifar,
  "digits": _load_digits,
  "folder": _load_folder,
  "imagenet": _load_folder,
  "synthetic": _load_synthetic,
  "tfds:cifar10": _load_tfds,
  "tfds:cifar100": _load_tfds,
  "tfds:imagenet2012": _load_tfds_encoded,
  "tiny-imagenet": _load_folder,
}
_ENCODED = ("image_size", "on_bad_image", "resize")
_OPTIONS: dict[str, tuple[str, ...]] = {
  "digits": ("image_size",),
  "folder": _ENCODED,
  "imagenet": _ENCODED,
  "tfds:imagenet2012": _ENCODED,
  "tiny-imagenet": _ENCODED,
  "synthetic": ("image_size", "num_classes", "num_examples"),
}


def digest(source: Source | folder.EncodedSource) -> str:
  """Says in a few words which images a set has, wherever it lies.

  Args:
    source: the set.

  Returns:
    The number of images, and a checksum of their labels and, where there are
    files, of their paths below the folder that they share.
  """
  checksum = zlib.crc32(source.labels.tobytes())
  if isinstance(source, folder.FolderSource):
    ends = [min(source.paths), max(source.paths)]
    start = len(os.path.commonpath(ends))
    names = "\n".join(path[start:] for path in source.paths)
    checksum = zlib.crc32(os.fsencode(names), checksum)
  return f"{len(source)} images with the checksum {checksum:08x}"


def names() -> list[str]:
  """The names that `load` knows."""
  return sorted(_SOURCES)


def detect(dir: str | os.PathLike[str]) -> str:
  """The name of the set whose layout a folder has.

  Args:
    dir: a folder as `load` takes it.

  Returns:
    A name for `load`: that of a CIFAR, "tiny-imagenet" or "folder".

  Raises:
    ValueError: if it has no layout that is known, or that of two.
  """
  base = pathlib.Path(dir)
  found = [
    name
    for name, layout in _CIFAR.items()
    if any(
      (base / item).exists()
      for item in (layout.folder, layout.archive, layout.meta)
    )
  ]
  if any((base / item).is_dir() for item in ("train", "val")):
    # Its list of classes.
    tiny = (base / "wnids.txt").is_file()
    found.append("tiny-imagenet" if tiny else "folder")
  if len(found) != 1:
    expected = [layout.folder for layout in _CIFAR.values()]
    raise ValueError(
      f"{base}: expected one data set, {', '.join(expected)} or train and val,"
      f" got {' and '.join(found) or 'none of them'}. Name the set and its"
      " folder"
    )
  return found[0]


def load(
  name: str,
  *,
  split: str,
  dir: str | os.PathLike[str] = "../data",
  image_size: int | None = None,
  num_classes: int | None = None,
  num_examples: int | None = None,
  resize: int | None = None,
  on_bad_image: str | None = None,
) -> Any:
  """Reads one split of an image set into memory, or lists its files.

  Args:
    name: "cifar10" or "cifar100" (the publisher's python version: the folder
      or the .tar.gz), "tfds:cifar10", "tfds:cifar100" or "tfds:imagenet2012"
      (TensorFlow Datasets; read without TensorFlow once prepared), "digits"
      (scikit-learn's handwritten digits, bilinearly enlarged), "synthetic", or
      "folder" (class folders of images), "imagenet" or "tiny-imagenet": image
      files in the layouts of `kd_jax.data.folder.load_folder`.
    split: "train" or "test".
    dir: the folder that holds the publisher's folder or archive, or that
      folder or archive itself; for image files the folder of `train` and
      `val`; for "tfds:..." TFDS's data folder (TFDS's own default is searched
      too).
    image_size: pixels, height and width (digits, synthetic: 32; image files:
      224; tiny-imagenet: 64).
    num_classes: of the synthetic set (10).
    num_examples: of the synthetic set's split (1024).
    resize: pixels of the shorter side before evaluation's centre crop (image
      files: 256/224 of image_size; tiny-imagenet: 64).
    on_bad_image: "error", or "skip" for image files that cannot be decoded.

  Returns:
    The split: a `Source`, or an `EncodedSource` of image files. The test split
    carries the training split's mean and std.

  Raises:
    ValueError: unknown name, split or option; data missing, cut short,
      damaged or inconsistent; a file that names anything but plain data.
    ImportError: the source's package is not installed.
  """
  if name not in _SOURCES:
    raise unknown_name("data source", name, _SOURCES)
  if split not in SPLITS:
    raise unknown_name("split", split, SPLITS)
  given = {
    "image_size": image_size,
    "num_classes": num_classes,
    "num_examples": num_examples,
    "resize": resize,
    "on_bad_image": on_bad_image,
  }
  options = {key: value for key, value in given.items() if value is not None}
  allowed = _OPTIONS.get(name, ())
  for key, value in options.items():
    if key not in allowed:
      raise ValueError(
        f"The source {name} has no option {key}, got {value}; expected"
        f" {' or '.join(allowed) or 'no option'}. Leave it unset (None)."
      )
    if isinstance(value, int) and value < 1:
      raise ValueError(f"{key} must be at least 1, got {value}.")
  return _SOURCES[name](name, split, pathlib.Path(dir), **options)
