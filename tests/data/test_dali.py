"""DALI's pipeline: exact order and crops, exact pixels, whatever the files."""

import io
import itertools
import json
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from kd_jax import data
from kd_jax.data import dali, fetch, images
from kd_jax.data.folder import FolderSource

SIZE, RESIZE, COUNT, BATCH, STEPS = 24, 28, 21, 4, 5
# The least error of rounding to uint8, with room for float32's.
HALF = 0.51


def picture(height, width, seed=0):
  """Smooth colours, sharp edges and some noise: uint8 [H, W, 3]."""
  y, x = np.mgrid[:height, :width]
  channels = [255 * x / width, 255 * y / height, 200 * ((x // 9 + y // 7) % 2)]
  noise = np.random.default_rng(seed).integers(0, 30, (height, width, 3))
  return np.clip(np.stack(channels, -1) + noise, 0, 255).astype(np.uint8)


def encode(pixels, format="JPEG", mode=None, **options):
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, format, **options)
  return file.getvalue()


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(picture(50, 70), exif=exif)


def png16():
  grey = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
  file = io.BytesIO()
  Image.fromarray(grey).save(file, "PNG")
  return file.getvalue()


JPEG = encode(picture(60, 80), quality=90)
ODD = {
  "cmyk": encode(picture(50, 60), mode="CMYK", quality=95),
  "grey": encode(picture(50, 60), mode="L"),
  "progressive": encode(picture(50, 60), progressive=True),
  "followed by zeros": JPEG + bytes(9),
  "16-bit png": png16(),
  "rgba png": encode(picture(40, 40), "PNG", "RGBA"),
  "palette png": encode(picture(40, 40), "PNG", "P"),
  "gif": encode(picture(40, 40), "GIF", "P"),
  **{f"turned {n}": turned(n) for n in range(1, 9)},
}
TABLE = JPEG.index(b"\xff\xc4")
BAD = {
  "empty": b"",
  "text": b"no image" * 9,
  "cut": JPEG[: len(JPEG) // 2],
  "cut by a byte": JPEG[:-1],
  "cut png": encode(picture(40, 40), "PNG")[:900],
  # Its header is in order, so that it is DALI that stumbles over it.
  "bad table": JPEG[: TABLE + 5] + b"\xff" * 16 + JPEG[TABLE + 21 :],
}


@pytest.fixture
def make(tmp_path):
  """make(contents, ...) -> a source of files with these contents."""

  def write(contents, **options):
    paths = []
    for name, content in contents.items():
      path = tmp_path / f"{name}.JPEG"
      path.write_bytes(content)
      paths.append(str(path))
    options = {"image_size": SIZE, "resize": RESIZE, **options}
    return FolderSource(
      paths=tuple(paths),
      labels=(np.arange(len(paths)) % 3).astype(np.int32),
      num_classes=3,
      class_names=("a", "b", "c"),
      name="made",
      **options,
    )

  return write


@pytest.fixture
def source(make):
  return make(
    {
      f"{i:02}": encode(picture(30 + 3 * i % 40, 30 + 7 * i % 50, i))
      for i in range(COUNT)
    }
  )


def create(source, **options):
  options = {"batch_size": BATCH, "seed": 3, "num_threads": 2, **options}
  return data.create("dali", source, **options)


def batches(pipeline, chunks):
  out = []
  for k in chunks:
    chunk = pipeline.next_chunk(k)
    out += [{name: leaf[i] for name, leaf in chunk.items()} for i in range(k)]
  return out


def assert_equal(got, expected):
  assert len(got) == len(expected)
  for one, other in zip(got, expected):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def triangles(length, out, start, end):
  """[out, length] in float64: triangles as wide as the scale.

  Beyond a picture's border DALI repeats its last pixel (Pillow leaves out what
  is not there).
  """
  scale = (end - start) / out
  centre = start + (np.arange(out) + 0.5) * scale
  pixel = np.arange(-length, 2 * length)
  distance = pixel + 0.5 - centre[:, None]
  weights = np.maximum(0, 1 - np.abs(distance) / max(scale, 1))
  within = np.eye(length)[np.clip(pixel, 0, length - 1)]
  return weights @ within / weights.sum(axis=1, keepdims=True)


def resized(pixels, box):
  """A box of a picture as [SIZE, SIZE, 3], in float64."""
  left, top, right, bottom = box
  rows = triangles(pixels.shape[0], SIZE, top, bottom)
  columns = triangles(pixels.shape[1], SIZE, left, right)
  return np.einsum("ah,bw,hwc->abc", rows, columns, pixels.astype(np.float64))


def centre(pixels):
  height, width, _ = pixels.shape
  box = images.evaluate_box(width, height, size=SIZE, resize=RESIZE)
  return resized(pixels, box)


def decoded(source, i):
  return images.decode(source.read_bytes(i), source.describe(i))


def crop(source, seed, epoch, i, **settings):
  """The crop that is due, from Pillow's pixels."""
  pixels = decoded(source, i)
  left, top, right, bottom = images.crop_box(
    *(pixels.shape[1], pixels.shape[0]),
    fetch.crop_generator(seed, epoch, i),
    **settings,
  )
  cut = pixels[top:bottom, left:right]
  return resized(cut, (0, 0, right - left, bottom - top))


@pytest.mark.parametrize(
  "settings", [{}, {"area": (0.1, 1.0), "aspect": (0.8, 1.25)}]
)
def test_training_batches_are_the_crops_that_are_due(settings, source):
  options = {f"crop_{name}": value for name, value in settings.items()}
  pipeline = create(source, **options)
  assert pipeline.resident == {}
  plan = pipeline._plan
  for step, batch in enumerate(batches(pipeline, [2, 3, 1])):
    epoch = step // STEPS
    np.testing.assert_array_equal(batch["index"], fetch.positions(plan, step))
    np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])
    assert {name: value.dtype for name, value in batch.items()} == {
      "image": np.uint8,
      "label": np.int32,
      "index": np.int32,
      "mask": np.bool_,
    }
    assert batch["image"].shape == (BATCH, SIZE, SIZE, 3)
    assert batch["mask"].all()
    for image, i in zip(batch["image"], batch["index"]):
      expected = crop(source, 3, epoch, i, **settings)
      assert np.abs(image - expected).max() < HALF


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_shares_make_up_the_batch(processes, source):
  alone = batches(create(source), [3, 2, 1])
  shares = [
    batches(
      create(source, process_index=process, process_count=processes), [3, 2, 1]
    )
    for process in range(processes)
  ]
  joined = [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*shares)
  ]
  assert_equal(joined, alone)


def test_threads_and_prefetching_change_nothing(source):
  chunks = [1, 4, 5]
  expected = batches(create(source), chunks)
  assert_equal(
    batches(create(source, num_threads=0, prefetch=7), chunks), expected
  )
  assert_equal(
    batches(create(source, num_threads=1, prefetch=1), [2, 3, 2, 3]), expected
  )


@pytest.mark.parametrize("position", [0, 3, STEPS, STEPS + 2])
def test_a_position_is_restored_exactly(position, source):
  pipeline = create(source)
  batches(pipeline, [1] * position)
  state = json.loads(json.dumps(pipeline.get_state()))
  expected = batches(pipeline, [1] * STEPS)

  restored = create(source)
  batches(restored, [2])  # not where it was
  restored.set_state(state)
  assert (restored.step, restored.epoch) == (position, position // STEPS)
  assert restored.get_state() == state
  assert_equal(batches(restored, [1] * STEPS), expected)
  pipeline.set_state(state)  # and back
  assert_equal(batches(pipeline, [1] * STEPS), expected)


def test_batches_stay_as_they_were(source):
  """They are views of DALI's memory, which it must not use again."""
  pipeline = create(source)
  kept = batches(pipeline, [1] * 3 * STEPS)
  before = [batch["image"].copy() for batch in kept]
  batches(pipeline, [1] * 2 * STEPS)
  pipeline.close()
  for batch, image in zip(kept, before):
    np.testing.assert_array_equal(batch["image"], image)


def test_chunks_go_straight_to_the_devices(source):
  expected = create(source).next_chunk(3)
  mesh = jax.make_mesh((4,), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
  chunk = create(source, sharding=sharding).next_chunk(3)
  for name, leaf in chunk.items():
    assert isinstance(leaf, jax.Array) and leaf.sharding == sharding
    np.testing.assert_array_equal(leaf, expected[name])


def test_a_pipeline_per_device_gives_the_same_rows(source):
  """As on GPUs, with DALI on the CPU for each."""
  alone, two = create(source), create(source)
  work, parts = next(two._make_stream(1, None, gpus=[None, None]))
  batches(alone, [1])
  expected = alone.next_chunk(1)
  assert [len(part) for part in parts] == [BATCH // 2] * 2
  np.testing.assert_array_equal(work.index, expected["index"][0])
  np.testing.assert_array_equal(np.concatenate(parts), expected["image"][0])


def evaluate(source, batch_size=4, **options):
  stream = dali.DaliEvalStream(source, batch_size, **options)
  found = list(stream)
  assert len(found) == len(stream)
  return stream, found


def test_evaluation_sees_every_image_once(source):
  stream, found = evaluate(source)
  assert len(found) == STEPS + 1  # 21 images in batches of 4
  expected = data.eval_stream(source, 4)
  for batch, other in zip(found, expected):
    assert batch["image"].dtype == np.uint8
    for key in ("label", "index", "mask"):
      assert batch[key].dtype == other[key].dtype
      np.testing.assert_array_equal(batch[key], other[key])
    assert not batch["image"][~batch["mask"]].any()
    for row in np.flatnonzero(batch["mask"]):
      reference = centre(decoded(source, batch["index"][row]))
      assert np.abs(batch["image"][row] - reference).max() < HALF
  assert sum(batch["mask"].sum() for batch in found) == COUNT
  assert_equal(list(stream), found)  # and again


def test_the_processes_evaluate_their_shares(source):
  _, alone = evaluate(source)
  shares = [
    evaluate(source, process_index=process, process_count=2)[1]
    for process in range(2)
  ]
  joined = [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*shares)
  ]
  assert_equal(joined, alone)


def test_leaving_evaluation_early_ends_it(source):
  stream = dali.DaliEvalStream(source, 4)
  first = list(itertools.islice(stream, 1))
  assert_equal(list(itertools.islice(stream, 1)), first)


def test_odd_files_are_decoded_right(make):
  source = make(ODD)
  count = len(ODD)
  pipeline = create(source, batch_size=count)
  (batch,) = batches(pipeline, [1])
  for image, i in zip(batch["image"], batch["index"]):
    assert np.abs(image - crop(source, 3, 0, i)).max() < HALF, list(ODD)[i]
  (batch,) = evaluate(source, count)[1]
  for name, image, i in zip(ODD, batch["image"], range(count)):
    assert np.abs(image - centre(decoded(source, i))).max() < HALF, name
  # Not merely as Pillow does it: what was drawn is what is seen.
  by_name = dict(zip(ODD, batch["image"].astype(float)))
  assert np.abs(by_name["cmyk"] - centre(picture(50, 60))).mean() < 5
  upright = centre(np.rot90(picture(50, 70), -1))
  assert np.abs(by_name["turned 6"] - upright).mean() < 12
  assert abs(by_name["16-bit png"].mean() - 127.5) < 5
  assert not pipeline.skipped


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(name, make):
  source = make({"good": JPEG, name: BAD[name]})
  with pytest.raises(data.BadImageError, match=f"/{name}.JPEG: expected an im"):
    evaluate(source, 2)
  pipeline = create(source, batch_size=2)
  for _ in range(2):  # the position stays
    with pytest.raises(data.BadImageError, match=f"/{name}.JPEG: expected an"):
      pipeline.next_chunk(1)
    assert pipeline.step == 0


@pytest.mark.parametrize("name", ["cut", "bad table"])
def test_a_bad_file_is_an_error_when_its_batch_is_due(name, make):
  files = {f"{i}": encode(picture(30, 40, i)) for i in range(12)}
  good = batches(create(make(files), shuffle=False), [3])
  pipeline = create(make(files | {"9": BAD[name]}), shuffle=False, prefetch=3)
  assert_equal(batches(pipeline, [1, 1]), good[:2])
  with pytest.raises(data.BadImageError, match=r"/9.JPEG: expected"):
    pipeline.next_chunk(1)
  assert pipeline.step == 2
  make(files)  # the file comes back
  assert_equal(batches(pipeline, [1]), good[2:])


def test_bad_files_are_left_out_counted_and_listed(make):
  good = {f"good {i}": encode(picture(40, 50, i)) for i in range(3)}
  files = {**dict(itertools.islice(BAD.items(), 3)), "good": JPEG}
  files |= {**dict(itertools.islice(BAD.items(), 3, None)), **good}
  source = make(files, on_bad_image="skip")
  readable = [i for i, name in enumerate(files) if name not in BAD]
  count = len(files)

  pipeline = create(source, batch_size=5)
  for step, batch in enumerate(batches(pipeline, [2, 2])):
    wanted = fetch.positions(pipeline._plan, step)
    stand_in = [min(j for j in readable if j >= i) for i in wanted]
    np.testing.assert_array_equal(batch["index"], stand_in)
    np.testing.assert_array_equal(batch["label"], source.labels[stand_in])
    assert batch["mask"].all()
    for image, i in zip(batch["image"], stand_in):
      assert np.abs(image - crop(source, 3, step // 2, i)).max() < HALF

  stream, found = evaluate(source, 4)
  mask = np.concatenate([batch["mask"] for batch in found])[:count]
  np.testing.assert_array_equal(np.flatnonzero(mask), readable)
  image = np.concatenate([batch["image"] for batch in found])
  assert not image[:count][~mask].any()
  for skipped in (pipeline.skipped, stream.skipped):
    assert len(skipped) == len(BAD)
    for name, reason in zip((n for n in files if n in BAD), skipped.reasons()):
      assert f"/{name}.JPEG" in reason


def test_an_error_that_is_no_files_fault_is_not_hidden(monkeypatch, source):
  monkeypatch.setattr(
    dali, "_uncompressed", lambda pixels: np.zeros(9, np.uint8)
  )
  monkeypatch.setattr(dali, "jpeg_size", lambda content: None)
  with pytest.raises(Exception, match=r"decoders|nvImageCodec"):
    create(source).next_chunk(1)


@pytest.mark.parametrize(
  ("name", "content", "size"),
  [
    ("plain", JPEG, (60, 80)),
    ("grey", ODD["grey"], (50, 60)),
    ("progressive", ODD["progressive"], (50, 60)),
    ("turned 3", turned(3), (50, 70)),
    ("turned 6", turned(6), (70, 50)),
    ("of no known orientation", turned(9), None),
    ("cmyk", ODD["cmyk"], None),
    ("png", ODD["rgba png"], None),
    ("cut", JPEG[:-1], None),
    ("only its two ends", b"\xff\xd8\xff\xd9", None),
    ("without a scan", JPEG[:200] + b"\xff\xd9", None),
    ("no markers", b"\xff\xd8" + bytes(90) + b"\xff\xd9", None),
    (
      "turned by XMP",
      encode(picture(9, 9), xmp=b'<x tiff:Orientation="6"/>'),
      None,
    ),
  ],
)
def test_only_plain_jpegs_are_left_to_dali(name, content, size):
  assert dali.jpeg_size(content) == size, name


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"crop_area": (0, 1)}, r"crop_area must .* <= 1, got \(0, 1\)"),
    ({"crop_area": (0.5, 1.1)}, r"crop_area must .* got \(0.5, 1.1\)"),
    ({"crop_aspect": (2, 1)}, r"crop_aspect must .* got \(2, 1\)"),
    ({"device": "gpus"}, "Unknown device 'gpus'. Did you mean gpu"),
    ({"device": "gpu"}, "uses cpu here. Use device 'cpu', or install JAX"),
    ({"num_threads": -1}, "num_threads must be 0 or more .* got -1 and 2"),
    ({"prefetch": 0}, "prefetch 1 or more, got 2 and 0"),
    ({"batch_size": COUNT + 1}, "batch_size 22 is more than the 21 examples"),
  ],
)
def test_wrong_options_are_refused(options, words, source):
  with pytest.raises(ValueError, match=words):
    create(source, **options)


def test_a_set_in_memory_is_refused():
  source = data.load("synthetic", split="train", num_examples=9, num_classes=2)
  with pytest.raises(
    ValueError, match=r"files: expected .* 'synthetic'.*grain"
  ):
    create(source)


def test_without_dali_the_error_says_what_to_do(monkeypatch, source):
  monkeypatch.delitem(sys.modules, "kd_jax.data.dali")
  monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as if not installed
  with pytest.raises(
    ImportError, match=r"pip install nvidia-dali-cuda120\).*pipeline 'grain'"
  ):
    create(source)
