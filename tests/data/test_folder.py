"""Layouts of image folders, each made here, and what is wrong with others."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import scipy.io
from PIL import Image

from kd_jax import data

WNIDS = ("n01443537", "n02124075", "n03891332")


def write(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((6, 5, 3), value, np.uint8)).save(path, "PNG")


def tree(root, **splits):
  """Writes {split: {class: number of images}}."""
  for split, classes in splits.items():
    (root / split).mkdir(parents=True, exist_ok=True)
    for name, count in classes.items():
      (root / split / name).mkdir(parents=True, exist_ok=True)
      for i in range(count):
        write(root / split / name / f"{i}.png")
  return root


def relative(source, root):
  return [os.path.relpath(path, root) for path in source.paths]


@pytest.fixture
def root(tmp_path):
  return tree(
    tmp_path, train={"b": 2, "a": 3, "c": 1}, val={"a": 1, "b": 2, "c": 1}
  )


def test_class_folders_are_numbered_in_their_order(root):
  source = data.load("folder", split="train", dir=root)
  assert relative(source, root) == [
    *(f"train/a/{i}.png" for i in range(3)),
    *("train/b/0.png", "train/b/1.png", "train/c/0.png"),
  ]
  assert all(os.path.isabs(path) for path in source.paths)
  assert source.labels.dtype == np.int32
  assert source.labels.tolist() == [0, 0, 0, 1, 1, 2]
  assert source.class_names == ("a", "b", "c") and source.num_classes == 3
  assert len(source) == 6 and source.name == "folder"
  assert source.image_shape == (224, 224, 3) and source.resize == 256
  assert source.on_bad_image == "error"
  assert source.mean == (0.485, 0.456, 0.406)
  assert source.read_bytes(3) == (root / "train/b/0.png").read_bytes()
  assert source.describe(3) == str(root / "train/b/0.png")
  copy = pickle.loads(pickle.dumps(source))  # for worker processes
  assert copy.paths == source.paths
  np.testing.assert_array_equal(copy.labels, source.labels)
  test = data.load("folder", split="test", dir=root)
  assert relative(test, root)[1:3] == ["val/b/0.png", "val/b/1.png"]
  assert test.labels.tolist() == [0, 1, 1, 2]


def test_the_digest_is_of_the_files_wherever_they_lie(root, tmp_path):
  def digest(place):
    return data.digest(data.load("folder", split="train", dir=place))

  copy = shutil.copytree(root, tmp_path / "copy")
  whole = digest(root)
  assert digest(copy) == whole
  file = sorted((copy / "train").rglob("*.*"))[0]
  file.rename(file.with_stem("other"))  # as many, with the same labels
  assert digest(copy) != whole
  file.with_stem("other").rename(file)
  assert digest(copy) == whole
  shutil.copy(file, file.with_stem("more"))
  count, _, rest = digest(copy).partition(" images with the checksum ")
  assert int(count) == int(whole.split()[0]) + 1 and rest


@pytest.mark.parametrize(
  ("name", "options", "size", "resize"),
  [
    ("folder", {}, 224, 256),
    ("imagenet", {"image_size": 64}, 64, 73),
    ("folder", {"image_size": 64, "resize": 64}, 64, 64),
    ("imagenet", {"resize": 232}, 224, 232),
    ("tiny-imagenet", {}, 64, 64),
    ("tiny-imagenet", {"image_size": 56, "resize": 60}, 56, 60),
  ],
)
def test_sizes(root, name, options, size, resize):
  source = data.load(name, split="test", dir=root, **options)
  assert (source.image_shape, source.resize) == ((size, size, 3), resize)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"image_size": 0}, "image_size must be at least 1, got 0"),
    ({"image_size": 64, "resize": 60}, r"at most resize \(60, .*got 64"),
    ({"on_bad_image": "skp"}, r"on_bad_image 'skp'\. Did you mean skip"),
    ({"num_classes": 3}, "folder has no option num_classes, got 3; .*image_si"),
  ],
)
def test_wrong_options_are_refused(root, options, words):
  with pytest.raises(ValueError, match=words):
    data.load("folder", split="train", dir=root, **options)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_test_split(tmp_path, name):
  tree(tmp_path, train={"a": 1, "b": 1}, **{name: {"a": 2, "b": 1}})
  source = data.load("folder", split="test", dir=tmp_path)
  assert relative(source, tmp_path)[0] == f"{name}/a/0.png"
  # val comes first: a published test folder has no labels.
  tree(tmp_path, val={"a": 1, "b": 1})
  source = data.load("folder", split="test", dir=tmp_path)
  assert relative(source, tmp_path) == ["val/a/0.png", "val/b/0.png"]


def test_images_count_wherever_they_lie_whatever_their_names(tmp_path, caplog):
  tree(tmp_path, train={"b": 1})
  for name in ("deep/er/y.jpg", "u.jfif", "v.jpe", "w", "x.JPEG", "z.WebP"):
    write(tmp_path / "train" / "a" / name)
  for name in (".hidden.png", "._x.JPEG", ".git/o.png"):
    write(tmp_path / "train" / "a" / name)
  write(tmp_path / "train" / ".cache" / "x.png")
  assert len(data.load("folder", split="train", dir=tmp_path)) == 7
  assert not caplog.records
  write(tmp_path / "train" / "stray.png")
  for name in ("boxes.txt", "more.txt", "README"):
    (tmp_path / "train" / "a" / name).write_text("P5 is no picture")
  source = data.load("folder", split="train", dir=tmp_path)
  assert relative(source, tmp_path) == [
    *("train/a/deep/er/y.jpg", "train/a/u.jfif", "train/a/v.jpe", "train/a/w"),
    *("train/a/x.JPEG", "train/a/z.WebP", "train/b/0.png"),
  ]
  assert source.class_names == ("a", "b")
  assert caplog.messages == [
    f"{tmp_path}/train: left out 4 files that are no images of a class (2 .txt,"
    " 1 no ending, 1 beside the class folders)"
  ]


def test_the_home_folder_is_known(root, monkeypatch):
  monkeypatch.setenv("HOME", str(root))
  assert (
    data.load("folder", split="train", dir="~").paths[0].startswith(str(root))
  )
  assert data.detect("~") == "folder"


@pytest.mark.parametrize(
  ("splits", "split", "words"),
  [
    (None, "train", "which does not exist"),
    ({"test": {}}, "train", r"No train images: .*a folder train .*holds test"),
    ({"val": {"a": 1}}, "train", r"a folder train .*which holds val\."),
    ({"in/train": {"a": 1}}, "train", r"holds in\. .*data\.dir=.*/set/in\."),
    (
      {"train": {"a": 1}},
      "train",
      "one class folder, a: expected at least 2 classes.",
    ),
    (
      {"train": {"all/cat": 1, "all/dog": 1}},
      "train",
      r"one class folder, all: .*\(cat, dog\).*from .*/train/all to .*/train\.",
    ),
    (
      {"train": {"a": 1}},
      "test",
      r"No test images: expected a folder val or validation or test .*FOLDER",
    ),
    (
      {"train": {"a": 1, "b": 0, "c": 2, "d": 0}},
      "train",
      r"without an image in .*train: b, d\. Expected files that end in .*jpg",
    ),
    ({"train": {"a": 0, "b": 0}}, "train", "No images in .*train: expected"),
    ({"train": {"a": 1}, "val": {}}, "test", "No images in .*val: expected"),
    (
      {"train": {"a": 1, "b": 1}, "val": {"b": 1, "c": 1, "d": 1}},
      "train",
      r"differ \(only in .*train: a; only in .*val: c, d\): expected the same",
    ),
    (
      {"train": {"a": 1, "b": 1}, "val": {"b": 1}},
      "test",
      r"differ \(only in .*train: a\)",
    ),
  ],
)
def test_what_is_wrong_is_said_at_start(tmp_path, splits, split, words):
  if splits is not None:
    tree(tmp_path / "set", **splits)
  with pytest.raises(ValueError, match=words):
    data.load("folder", split=split, dir=tmp_path / "set")


# Words for WordNet's numbers.


def words(root, name):
  entries = dict(zip(WNIDS, ("goldfish, carp", "Egyptian cat", "bench")))
  if name == "imagenet_class_index.json":
    content = json.dumps(
      {str(i): [w, v.split(",")[0]] for i, (w, v) in enumerate(entries.items())}
    )
  else:
    gap = "\t" if name == "words.txt" else " "
    content = "".join(f"{w}{gap}{v}\n" for w, v in entries.items())
  (root / name).write_text(content)


@pytest.mark.parametrize(
  "name",
  [
    "imagenet_class_index.json",
    "synset_words.txt",
    "LOC_synset_mapping.txt",
    "words.txt",
  ],
)
def test_classes_are_called_by_their_words(tmp_path, name):
  tree(tmp_path, train={wnid: 1 for wnid in (*WNIDS, "own")})
  words(tmp_path, name)
  source = data.load("imagenet", split="train", dir=tmp_path)
  assert source.class_names == ("goldfish", "Egyptian cat", "bench", "own")


@pytest.mark.parametrize(
  "content", ["{", "[]", '{"0": "tench"}', '{"0": ["n01", 3]}']
)
def test_a_damaged_class_index_is_named(tmp_path, content):
  tree(tmp_path, train={"a": 1, "b": 1})
  (tmp_path / "imagenet_class_index.json").write_text(content)
  with pytest.raises(ValueError, match=r"class_index\.json.* expected .*tench"):
    data.load("imagenet", split="train", dir=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_words_in_other_encodings(tmp_path, encoding, caplog):
  tree(tmp_path, train={wnid: 1 for wnid in WNIDS})
  text = f"{WNIDS[0]}\tcafé\n{WNIDS[1]}\tThé, noir\n"
  (tmp_path / "words.txt").write_bytes(text.encode(encoding))
  source = data.load("imagenet", split="train", dir=tmp_path)
  assert source.class_names == ("café", "Thé", WNIDS[2])
  named = any("words.txt, line 1: expected UTF-8" in m for m in caplog.messages)
  assert named == (encoding == "latin-1")
  (tmp_path / "words.txt").write_bytes(b"a\0b")
  with pytest.raises(ValueError, match=r"words\.txt: .* null bytes"):
    data.load("imagenet", split="train", dir=tmp_path)


# Flat validation folders.

# In the order of the file names: image 1 is of class 2, and so on.
LABELS = [2, 0, 1, 2]
# The development kit counts from 1, in an order of its own.
KIT = {"n03891332": 1, "n01443537": 2, "n02124075": 3}


def flat(root, *, train=True, name="ILSVRC2012_val_{:08d}.JPEG"):
  if train:
    tree(root, train={wnid: 1 for wnid in WNIDS})
  for i in range(4):
    write(root / "val" / name.format(i + 1))
  return root


def names():
  return [f"ILSVRC2012_val_{i:08d}" for i in range(1, 5)]


def label_file(root, kind):
  wnids = [WNIDS[label] for label in LABELS]
  lines = list(zip(names(), wnids))[::-1]  # any order
  if kind == "wnid":
    path, text = "val_labels.txt", [f"{n}.JPEG {w}" for n, w in lines]
  elif kind == "number":
    path = "val.txt"
    text = [f"val/{n}.JPEG {label}" for n, label in zip(names(), LABELS)]
  elif kind == "kaggle":
    path = "LOC_val_solution.csv"
    text = [
      "ImageId,PredictionString",
      *(f"{n},{w} 1 2 3 4 {w} 5 6 7 8 " for n, w in lines),
    ]
  else:
    path = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    text = [str(KIT[w]) for w in wnids]
  path = root / path
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(text) + "\n")
  return path


def meta(path, **changes):
  synsets = np.zeros(len(KIT), [("ILSVRC2012_ID", object), ("WNID", object)])
  for row, (wnid, number) in zip(synsets, KIT.items()):
    row["ILSVRC2012_ID"], row["WNID"] = float(number), wnid
  scipy.io.savemat(
    path.parent / "meta.mat", {"synsets": synsets[:, None], **changes}
  )


def load_flat(root):
  return data.load("imagenet", split="test", dir=root)


@pytest.mark.parametrize("kind", ["wnid", "number", "kaggle", "kit"])
def test_labels_of_a_flat_folder(tmp_path, kind):
  path = label_file(flat(tmp_path), kind)
  if kind == "kit":
    meta(path)
  source = load_flat(tmp_path)
  assert relative(source, tmp_path) == [f"val/{n}.JPEG" for n in names()]
  assert source.labels.tolist() == LABELS and source.labels.dtype == np.int32
  assert source.class_names == WNIDS
  if kind != "kit":  # labels may also lie beside the images
    path.rename(tmp_path / "val" / path.name)
    assert load_flat(tmp_path).labels.tolist() == LABELS


@pytest.mark.parametrize("line", ["{}\t{}", "{} {}", "{},{}", "{}, {}"])
def test_file_names_with_blanks_and_commas(tmp_path, line):
  tree(tmp_path, train={"cat": 1, "dog": 1})
  found = {"my photo.png": "dog", "x.png": "cat", "y": "dog", "a b": "cat"}
  if line == "{} {}":
    found["p, q.png"] = "dog"
  if line == "{},{}":
    del found["a b"]
  text = "".join(line.format(*pair) + "\n" for pair in found.items())
  for name in found:
    write(tmp_path / "val" / name)
  (tmp_path / "val_labels.txt").write_text(text, encoding="utf-8-sig")
  source = load_flat(tmp_path)
  assert {
    os.path.basename(path): source.class_names[label]
    for path, label in zip(source.paths, source.labels)
  } == found


@pytest.mark.parametrize(
  "where", ["wnids.txt", "imagenet_class_index.json", ""]
)
def test_a_flat_folder_without_train(tmp_path, where):
  label_file(flat(tmp_path, train=False), "wnid")
  expected = WNIDS
  if where == "wnids.txt":
    # Tiny ImageNet's is not sorted, and has classes that no image is of.
    expected = ("n01000000", *WNIDS)
    (tmp_path / where).write_text("\n".join(expected[::-1]) + "\n")
  elif where:
    words(tmp_path, where)
    expected = ("goldfish", "Egyptian cat", "bench")
  source = load_flat(tmp_path)
  assert source.class_names == expected
  assert source.labels.tolist() == [
    label + (where == "wnids.txt") for label in LABELS
  ]


def test_tiny_imagenets_own_layout(tmp_path):
  for wnid in WNIDS:
    for i in range(2):
      write(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\n")
  for i in range(4):
    write(tmp_path / "val" / "images" / f"val_{i}.JPEG")
    write(tmp_path / "test" / "images" / f"test_{i}.JPEG")
  (tmp_path / "wnids.txt").write_text("\n".join(WNIDS[::-1]))
  words(tmp_path, "words.txt")
  (tmp_path / "val" / "val_annotations.txt").write_text(
    "".join(
      f"val_{i}.JPEG\t{WNIDS[label]}\t0\t0\t9\t9\n"
      for i, label in enumerate(LABELS)
    )
  )
  train = data.load("tiny-imagenet", split="train", dir=tmp_path)
  assert relative(train, tmp_path)[:2] == [
    f"train/{WNIDS[0]}/images/{WNIDS[0]}_{i}.JPEG" for i in range(2)
  ]
  assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
  test = data.load("tiny-imagenet", split="test", dir=tmp_path)
  assert relative(test, tmp_path)[3] == "val/images/val_3.JPEG"
  assert test.labels.tolist() == LABELS
  assert (
    test.class_names
    == train.class_names
    == ("goldfish", "Egyptian cat", "bench")
  )


def test_the_kits_numbers_need_its_table(tmp_path):
  path = label_file(flat(tmp_path), "kit")
  with pytest.raises(
    ValueError, match=r"kit's own order, and .*meta\.mat.* missing.*LOC_val"
  ):
    load_flat(tmp_path)
  (path.parent / "meta.mat").write_bytes(b"nonsense" * 20)
  with pytest.raises(ValueError, match=r"meta\.mat: expected .*synsets, got"):
    load_flat(tmp_path)
  meta(path)
  path.write_text("1\n2\n4\n1\n")
  with pytest.raises(ValueError, match=r"line 3: expected a number of .*'4'"):
    load_flat(tmp_path)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("a.png n01443537 1\n", "line 1: expected '<file> <class>', got 'a.png"),
    ("ILSVRC2012_val_00000001.JPEG n01443537\n", "without a label: 3, such as"),
    ("a.png n01\na.jpg n02\n", "gives a two classes, n01 and n02"),
    (
      "".join(f"{n} n01443537\n" for n in [*names(), "more"]),
      "labels without an image: 1, such as more",
    ),
    (
      "".join(f"{n} n0{i}\n" for i, n in enumerate(names())),
      "names classes that do not exist: 4, such as n00, n01, n02.*of the 3",
    ),
    (
      "".join(f"{n} {i}\n" for i, n in enumerate(names())),
      r"class number 3, expected 0 to 2, .*development kit's",
    ),
  ],
)
def test_wrong_label_files(tmp_path, text, words):
  flat(tmp_path)
  (tmp_path / "val_labels.txt").write_text(text)
  with pytest.raises(ValueError, match=words):
    load_flat(tmp_path)


def test_label_files_that_do_not_fit(tmp_path):
  flat(tmp_path)
  with pytest.raises(ValueError, match=r"missing: .*val_labels\.txt.*csv"):
    load_flat(tmp_path)
  path = label_file(tmp_path, "kaggle")
  path.write_text(path.read_text() + "x,n01 1 2 3 4 n02 1 2 3 4\n")
  with pytest.raises(ValueError, match=r"line 6: expected '<file>,<class>"):
    load_flat(tmp_path)
  path.unlink()
  label_file(tmp_path, "number")
  shutil.rmtree(tmp_path / "train")
  with pytest.raises(ValueError, match=r"which class a number is.*wnids\.txt"):
    load_flat(tmp_path)


def test_label_files_that_disagree_are_refused(tmp_path):
  label_file(flat(tmp_path), "wnid")
  label_file(tmp_path, "number")
  assert load_flat(tmp_path).labels.tolist() == LABELS
  path = label_file(tmp_path, "kaggle")
  path.write_text(path.read_text().replace(WNIDS[2], WNIDS[1]))
  with pytest.raises(
    ValueError,
    match=r"val_labels\.txt and .*csv disagree .*00000001\.JPEG and of 1 other",
  ):
    load_flat(tmp_path)


def test_names_that_differ_in_their_endings_are_refused(tmp_path):
  label_file(flat(tmp_path), "wnid")
  write(tmp_path / "val" / "ILSVRC2012_val_00000002.png")
  with pytest.raises(
    ValueError, match="only their endings tell apart: 1, such"
  ):
    load_flat(tmp_path)
