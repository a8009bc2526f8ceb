"""The DALI pipeline: its pixels, shards, checkpoints and errors."""

import io
import pathlib
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.data import dali, images
from kd_jax.distributed import devices

SIZE, RESIZE, COUNT, BATCH, STEPS = 24, 28, 21, 4, 5


def picture(height, width, seed=0):
  """Smooth colours and some noise: uint8 [H, W, 3]."""
  y, x = np.mgrid[:height, :width]
  channels = [255 * x / width, 255 * y / height, 0 * x + 12 * seed]
  noise = np.random.default_rng(seed).integers(0, 12, (height, width, 3))
  return np.clip(np.stack(channels, -1) + noise, 0, 255).astype(np.uint8)


def encode(pixels, format="JPEG", mode=None, **options):
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, format, **options)
  return file.getvalue()


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(picture(56, 84), exif=exif, quality=95)


@pytest.fixture
def write(tmp_path):
  """write({name: content}, ...) -> a source of files."""

  def make(contents, **options):
    paths = []
    for name, content in contents.items():
      path = tmp_path / f"{name}.JPEG"
      path.write_bytes(content)
      paths.append(str(path))
    return data.FolderSource(
      paths=tuple(paths),
      labels=(np.arange(len(paths)) % 3).astype(np.int32),
      num_classes=3,
      class_names=("a", "b", "c"),
      name="made",
      **{"image_size": SIZE, "resize": RESIZE, **options},
    )

  return make


@pytest.fixture
def source(write):
  return write(
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


def centre(source, i):
  """Evaluation's crop with Pillow."""
  image = images.load(source.read_bytes(i), "x")
  crop = images.evaluate_crop(image, size=SIZE, resize=RESIZE)
  return crop.astype(float)


@pytest.mark.parametrize(
  ("area", "aspect"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.3, 0.4), (1, 2))]
)
def test_crops_have_the_areas_and_aspects_of_the_settings(write, area, aspect):
  """Red grows with x and green with y, so that they tell the crop's box."""
  height, width, count = 160, 240, 60
  y, x = np.mgrid[:height, :width]

  def gradient(i):
    channels = [255 * x / width, 255 * y / height, 0 * x + 4 * i]
    return np.stack(channels, -1).astype(np.uint8)

  source = write({f"{i:02}": encode(gradient(i), "PNG") for i in range(count)})
  pipeline = create(source, crop_area=area, crop_aspect=aspect)
  shares, ratios, lefts = [], [], []
  for batch in batches(pipeline, [count // BATCH]):
    np.testing.assert_array_equal(
      batch["image"][:, 9, 9, 2] // 4, batch["index"]
    )
    for image in batch["image"].astype(float):
      red, green = image[..., 0].mean(0), image[..., 1].mean(1)
      # Without the border, whose pixels are blurred.
      w, h = ((v[-3] - v[2]) / 255 * SIZE / (SIZE - 5) for v in (red, green))
      shares.append(w * h)
      ratios.append(w * width / (h * height))
      lefts.append(red[0])
  assert area[0] - 0.02 < min(shares) and max(shares) < area[1] + 0.02
  assert np.ptp(shares) > 0.6 * np.ptp(area)
  assert aspect[0] * 0.9 < min(ratios) and max(ratios) < aspect[1] * 1.1
  assert np.ptp(ratios) > 0.6 * np.ptp(aspect)
  assert np.std(lefts) > 20


def test_epochs_and_seeds_have_crops_of_their_own(source):
  def first(seed, epoch):
    pipeline = create(source, seed=seed, shuffle=False)
    return batches(pipeline, [STEPS] * epoch + [1])[-1]["image"].astype(int)

  images_of = [first(0, 0), first(1, 0), first(0, 1)]
  for i in range(3):
    for j in range(i):
      assert np.abs(images_of[i] - images_of[j]).mean() > 3


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_shards_partition_every_epoch(shards, source):
  """Also with shards of different sizes: 21 images."""
  options = {"batch_size": shards * 2, "process_count": shards}
  parts = [create(source, process_index=i, **options) for i in range(shards)]
  steps = COUNT // (shards * 2)
  for _ in range(3):
    found = [batch["index"] for p in parts for batch in batches(p, [steps])]
    assert len(np.unique(found)) == steps * shards * 2 == np.size(found)
  # The shards' crops are drawn independently.
  assert len({str(p.get_state()["checkpoints"]) for p in parts}) == shards


def test_a_position_belongs_to_a_number_of_shards(source, caplog, assert_equal):
  half = create(source, process_index=1, process_count=2)
  batches(half, [3])
  state = half.get_state()
  assert list(state["checkpoints"]) == ["1"]
  alone = create(source)
  alone.set_state(state)
  assert "shards 2 x cpu, and this run has 1 x cpu" in caplog.text
  assert alone.step == 3
  # A pass of its own, with another order than the first one's.
  after = batches(alone, [2, 5])  # the second chunk crosses the end of the pass
  index = np.concatenate([batch["index"] for batch in after[:STEPS]])
  assert len(np.unique(index)) == STEPS * BATCH
  assert all(len(np.unique(batch["index"])) == BATCH for batch in after)
  first = np.concatenate([b["index"] for b in batches(create(source), [STEPS])])
  assert (index != first).any()
  # From there on it is exact again, over the end of the pass.
  alone.set_state(state)
  batches(alone, [1])
  saved = alone.get_state()
  again = create(source)
  again.set_state(saved)
  assert_equal(batches(again, [1, 2, 3]), after[1:])


def test_threads_change_nothing(source, assert_equal):
  expected = batches(create(source), [1, 4, 5])
  for threads in (0, 1):
    got = batches(create(source, num_threads=threads), [1, 4, 5])
    assert_equal(got, expected)


def test_batches_stay_as_they_were(source, assert_equal):
  """They are views of DALI's memory, which it must not use again."""
  pipeline = create(source)
  kept = batches(pipeline, [1] * 3 * STEPS)
  before = [batch["image"].copy() for batch in kept]
  batches(pipeline, [1] * 2 * STEPS)
  pipeline.close()
  assert_equal([batch["image"] for batch in kept], before)


def test_what_gpus_decode_is_joined_there(assert_equal):
  """Only how; no GPU is needed."""
  chunk_sharding = devices.make_devices(num_devices=4).batch_sharding
  spec = jax.sharding.PartitionSpec(*chunk_sharding.spec[1:])
  sharding = jax.sharding.NamedSharding(chunk_sharding.mesh, spec)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (2, 8, 3, 3, 3), np.uint8)
  index = rng.integers(0, 9, (2, 8, 1)).astype(np.int32)
  labels = np.arange(9, dtype=np.int32)[::-1].copy()
  put = [
    [jax.device_put(x, sharding) for x in leaves] for leaves in (image, index)
  ]
  got = jax.jit(dali.join, out_shardings=chunk_sharding)(*put, labels)
  expected = {
    "image": image,
    "label": labels[index[..., 0]],
    "index": index[..., 0],
    "mask": np.ones((2, 8), bool),
  }
  assert_equal(got, expected)
  assert all(leaf.sharding == chunk_sharding for leaf in got.values())


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_image_once(source, processes, assert_equal):
  for process in range(processes):
    arguments = (source, 4, process, processes)
    stream = data.eval_stream(*arguments, pipeline="dali")
    expected = list(data.eval_stream(*arguments))
    for _ in range(2):
      found = list(stream)
      assert len(found) == len(stream) == len(expected) == STEPS + 1
      for got, other in zip(found, expected):
        difference = got.pop("image").astype(float) - other["image"]
        # Where half a pixel is rounded, the crops differ by a pixel.
        assert np.abs(difference).mean() < 4
        assert not difference[~other["mask"]].any()
        assert_equal(got, {k: v for k, v in other.items() if k != "image"})
  next(iter(stream))  # may be left early


ODD = {
  "cmyk": encode(picture(56, 84), mode="CMYK", quality=95),
  "grey": encode(picture(56, 84), mode="L"),
  "progressive": encode(picture(56, 84), progressive=True),
  "rgba png": encode(picture(56, 84), "PNG", "RGBA"),
  "palette png": encode(picture(56, 84), "PNG", "P"),
  "webp": encode(picture(56, 84), "WEBP"),
  **{f"turned {n}": turned(n) for n in range(1, 9)},
}


def test_formats_and_orientations(write):
  """Of sizes that are resized and cropped without rounding."""
  source = write(ODD)
  (batch,) = data.eval_stream(source, len(ODD), pipeline="dali")
  for i, (name, image) in enumerate(zip(ODD, batch["image"])):
    difference = np.abs(image - centre(source, i))
    assert difference.mean() < (3 if name == "cmyk" else 1), name


JPEG = encode(picture(60, 80), quality=90)
TABLE = JPEG.index(b"\xff\xc4")
PNG = encode(picture(60, 80), "PNG")
PIXELS = PNG.index(b"IDAT")


def png_part(kind, content):
  checksum = zlib.crc32(kind + content).to_bytes(4)
  return len(content).to_bytes(4) + kind + content + checksum


HALF_OF_THE_ROWS = (
  PNG[: PIXELS - 4]
  + png_part(b"IDAT", zlib.compress(bytes(30 * (1 + 3 * 80))))
  + png_part(b"IEND", b"")
)


@pytest.mark.parametrize(
  ("content", "kind", "words"),
  [
    (None, data.UnreadableError, "bad.JPEG"),
    (b"", data.UnreadableError, "bad.JPEG"),
    (b"no image" * 9, data.BadImageError, "pipeline 'grain'"),
    (JPEG[: len(JPEG) // 2], data.BadImageError, "pipeline 'grain'"),
    (
      JPEG[: TABLE + 5] + b"\xff" * 16 + JPEG[TABLE + 21 :],
      data.BadImageError,
      "bad.JPEG",
    ),
    (
      PNG[: PIXELS + 99] + b"\xff" + PNG[PIXELS + 100 :],
      data.BadImageError,
      "bad.JPEG",
    ),
    (HALF_OF_THE_ROWS, data.BadImageError, "bad.JPEG"),
  ],
  ids=["missing", "empty", "text", "cut", "bad table", "png", "rows"],
)
def test_a_bad_file_is_an_error_and_the_position_stays(
  write, content, kind, words, assert_equal
):
  files = {f"{i}": encode(picture(30, 40, i)) for i in range(24)}
  source = write(files | {"bad": JPEG})
  expected = batches(create(source, shuffle=False, batch_size=5), [5])
  path = pathlib.Path(source.paths[-1])
  if content is None:
    path.unlink()
  else:
    path.write_bytes(content)
  pipeline = create(source, shuffle=False, batch_size=5)
  assert_equal(batches(pipeline, [2]), expected[:2])
  with pytest.raises(kind, match=words):
    batches(pipeline, [3])
  assert pipeline.step == 2
  with pytest.raises(kind, match=words):
    list(data.eval_stream(source, 25, pipeline="dali"))
  path.write_bytes(JPEG)  # the file comes back
  assert_equal(batches(pipeline, [3]), expected[2:])


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"crop_area": (0, 1)}, r"crop_area must .* <= 1, got \(0, 1\)"),
    ({"crop_aspect": (2, 1)}, r"crop_aspect must .* got \(2, 1\)"),
    ({"device": "gpus"}, "device 'gpus'. Did you mean gpu"),
    ({"device": "gpu"}, "uses cpu here. Use device 'cpu', or install JAX"),
  ],
)
def test_wrong_options_are_refused(options, words, source):
  with pytest.raises(ValueError, match=words):
    create(source, **options)


def test_leaving_bad_images_out_is_refused(write):
  source = write({"a": JPEG}, on_bad_image="skip")
  for make in (create, lambda s: data.eval_stream(s, 1, pipeline="dali")):
    with pytest.raises(ValueError, match=r"on_bad_image .* got 'skip'.*grain"):
      make(source)
