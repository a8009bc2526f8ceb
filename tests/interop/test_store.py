"""Exports: whole, readable by plain Orbax, never half, never overwritten."""

import contextlib
import json
import resource
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kd_jax import data, models, storage
from kd_jax.interop import card as card_lib
from kd_jax.interop import formats, store
from kd_jax.interop.model import Model


@pytest.fixture(scope="module")
def model(draw):
  known = data.constants("cifar10")
  card = card_lib.make(
    "_tiny",
    num_classes=10,
    image_shape=known.image_shape,
    class_names=known.class_names,
    mean=known.mean,
    std=known.std,
    trained_on="cifar10",
    data_options={},
    test={"top1": 12.5},
  )
  return Model(card, draw(models.create("_tiny", 10)))


@pytest.fixture
def export(model, tmp_path):
  store.write(model, tmp_path / "export")
  return tmp_path / "export"


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_written_and_read_again(model, export):
  loaded = store.load(export)
  assert loaded.card == json.loads(json.dumps(model.card))
  assert_equal(loaded.variables, model.variables)
  full = card_lib.read_card(export)
  count = sum(x.size for x in jax.tree.leaves(model.variables["params"]))
  assert full["parameters"] == count


@pytest.mark.parametrize(
  "checkpointer", [ocp.PyTreeCheckpointer, ocp.StandardCheckpointer]
)
def test_plain_orbax_reads_it(model, export, checkpointer):
  with checkpointer() as reader:
    read = reader.restore(export / "checkpoint")
  assert_equal(read, model.variables)


def test_folders_are_not_overwritten(model, export, tmp_path):
  before = contents(export)
  store.write(model, export)  # the same again changes nothing
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.txt").write_text("years")
  moved = jax.tree.map(lambda x: x + 1, model.variables)
  for changed, to in (
    (Model({**model.card, "test": {}}, model.variables), export),
    (Model(model.card, moved), export),
    (model, other),
    (model, other / "thesis.txt"),
  ):
    with pytest.raises(ValueError, match=r"new or empty.*Nothing was changed"):
      store.write(changed, to)
  assert contents(export) == before
  assert contents(other) == {other / "thesis.txt": b"years"}
  empty = tmp_path / "empty"
  empty.mkdir()
  store.write(model, empty)
  assert_equal(store.load(empty).variables, model.variables)


def test_a_failed_export_leaves_nothing(model, tmp_path, monkeypatch):
  def fail(*_):
    raise OSError("No space left on device")

  monkeypatch.setattr(storage, "write_json", fail)
  with pytest.raises(OSError, match="No space left"):
    store.write(model, tmp_path / "export")
  assert list(tmp_path.iterdir()) == []


def damage(folder, how):
  checkpoint = folder / "checkpoint"
  if how == "no metadata":
    (checkpoint / "_METADATA").unlink()
  elif how == "no arrays":
    shutil.rmtree(checkpoint)
  elif how.startswith(("{", "[")):
    (folder / "model.json").write_text(how)
  else:
    largest = max(checkpoint.rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    half = len(content) // 2
    if how == "cut short":
      content = content[:half]
    else:
      content[half] ^= 0x10
    largest.write_bytes(content)


HEAD = card_lib.reused_head(
  {"name": "simkd"}, names=["resnet8"], weights=[1.0], maps=[(8, 8, 64)]
)
SHA = r"expected the files that model\.json was written for.*copy the model"


@pytest.mark.parametrize(
  ("how", "words"),
  [
    *((how, SHA) for how in ("no metadata", "no arrays")),
    *((how, SHA) for how in ("cut short", "one bit")),
    ('{"format": "kd_jax exp', "expected JSON, got a file that ends or breaks"),
    ('{"format": "kd_jax export 99"}', "expected an export, a folder with"),
    ("[1]", "expected an export, a folder with"),
  ],
)
def test_damage(how, words, export):
  damage(export, how)
  with pytest.raises(ValueError, match=words):
    store.load(export)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("0.49139968", "0.49139969"),
    ('"airplane"', '"aeroplane"'),
    ('"top1": 12.5', '"top1": 92.5'),
    ("32,", "64,"),
  ],
)
def test_a_card_that_was_changed(old, new, export):
  path = export / "model.json"
  text = path.read_text()
  path.write_text(text.replace(old, new, 1))
  with pytest.raises(
    ValueError, match=r"model\.json: .*its card_sha256 differs"
  ):
    store.load(export)
  path.write_text(json.dumps(json.loads(text)))  # laid out in another way
  store.load(export)
  card = json.loads(text.replace(old, new, 1))
  del card["card_sha256"]  # written before there was a digest
  path.write_text(json.dumps(card))
  assert store.load(export).card["architecture"] == "_tiny"


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"num_classes": 0}, "at num_classes: expected `int` >= 1"),
    ({"num_classes": "10"}, "at num_classes: expected `int`, got `str`"),
    (
      {"image_shape": [-32, 32, 3]},
      r"at image_shape\[0\]: expected `int` >= 1",
    ),
    ({"class_names": ["a"]}, "at class_names: expected one a class"),
    (
      {"normalization": {"mean": [0.5], "std": [1.0] * 3}},
      "mean: expected one",
    ),
    ({"normalization": {"mean": [0.5] * 3, "std": [1.0, 0.0, 1.0]}}, "above 0"),
    ({"normalization": {"mean": [None] * 3, "std": [1.0] * 3}}, "got `null`"),
    ({"architecture": "resnet9"}, "unknown model 'resnet9'"),
    (
      {"architecture": "resnet8"},
      r"expected the network of the card's archite",
    ),
    ({"dtype": "int8"}, "at dtype: invalid enum value 'int8'"),
    ({"head": {"teachers": ["resnet8"]}}, "at head: object missing required"),
    (
      {"head": {**HEAD, "teacher_maps": []}},
      r"at head.teacher_maps: expected one a teacher, got \[\]",
    ),
    ({"head": {**HEAD, "distiller": {"name": "x"}}}, "unknown method 'x'"),
    ({"head": HEAD}, "expected the network of the card's architecture"),
  ],
)
def test_a_card_without_a_digest_has_to_make_sense(export, changes, words):
  path = export / "model.json"
  card = {**json.loads(path.read_text()), **changes}
  del card["card_sha256"]
  path.write_text(json.dumps(card))
  with pytest.raises(ValueError, match=words) as caught:
    store.load(export)
  assert str(caught.value).startswith(str(path))
  assert "\n" not in str(caught.value)


def test_a_full_disk(model, tmp_path):
  """No draft is left, and the same command works afterwards."""
  for name in ("a.npz", "a.safetensors", "a.pth"):
    with pytest.raises(OSError, match=name), full_disk():
      formats.save(model, tmp_path / "new" / name)
    assert list((tmp_path / "new").iterdir()) == []
    formats.save(model, tmp_path / "new" / name)
    (tmp_path / "new" / name).unlink()


@contextlib.contextmanager
def full_disk():
  """Files end after 1,000 bytes."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_folders_of_other_toolboxes(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "model.safetensors").write_text("x")
  with pytest.raises(ValueError, match=r"model hub.*Give .*model\.safetensors"):
    store.load(tmp_path)
  for name in ("model.safetensors.index.json", "__0_0.distcp"):
    (tmp_path / name).write_text("{}")
    with pytest.raises(
      ValueError, match=r"in parts.*not supported yet.*one fil"
    ):
      store.load(tmp_path)
    (tmp_path / name).unlink()


def test_paths_without_an_export(tmp_path):
  with pytest.raises(ValueError, match="none does not exist"):
    store.load(tmp_path / "none")
  with pytest.raises(ValueError, match="got a folder with neither"):
    store.load(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(
    ValueError, match=r"not finished.*kd_jax export --workdir"
  ):
    store.load(tmp_path)
