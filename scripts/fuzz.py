"""Feeds changed files to the readers: the same content, one line, or a fault.

    python scripts/fuzz.py                    all readers, 1,000 files of each
    python scripts/fuzz.py card --count 100000 --seed 7

A reader may give the content back, or refuse the file with a ValueError of one
line that names it. Anything else is a fault, whose file is kept. Readers run in
a process of their own with 1 GB more memory than they start with and 10 s for
each file. tests/test_fuzz.py tries a few such files.
"""

import argparse
import collections
import dataclasses
import functools
import io
import json
import logging
import multiprocessing
import pathlib
import pickle
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from kd_jax import data, storage
from kd_jax.data import images
from kd_jax.interop import card as card_lib
from kd_jax.interop import (
  digests,
  files,
  formats,
  opening,
  program,
  pytorch,
  store,
)
from kd_jax.interop import model as model_lib
from kd_jax.runs import records


@dataclasses.dataclass(frozen=True)
class Target:
  """A reader of files.

  Attributes:
    file: the name that the reader expects.
    make: makes the bytes of a valid file.
    read: reads the file; it takes its path.
    kind: how files are changed, a key of `MUTATIONS`.
    digest: of what was read: equal for equal content.
  """

  file: str
  make: Callable[[], bytes]
  read: Callable[[pathlib.Path], Any]
  kind: str = "json"
  digest: Callable[[Any], Any] = repr
  examples: int = 100  # for tests/test_fuzz.py: fewer of a slow reader


def _json(content: Any) -> Callable[[], bytes]:
  return lambda: json.dumps(content).encode()


def _card() -> bytes:
  head = card_lib.reused_head(
    {"name": "simkd"}, names=["resnet8"], weights=[1.0], maps=[(8, 8, 64)]
  )
  card = card_lib.make(
    "resnet8",
    num_classes=3,
    image_shape=(32, 32, 3),
    class_names="abc",
    mean=[0.5] * 3,
    std=[0.2] * 3,
    trained_on="cifar10",
    data_options={"num_classes": 3},
    head=head,
    method="simkd",
    test={"top1": 50.0},
  )
  return json.dumps(card).encode()


_SCORES = {"ce": 0.5, "top1": 90.0, "top5": 99.0, "epoch": 2}
_TEACHER = {"name": "a", "checkpoint": "b", "fingerprint": 7, **_SCORES}
_RESULT = {
  "final": _SCORES,
  "best": _SCORES,
  "teacher": _TEACHER,
  "student": "resnet8",
  "method": "kd",
  "seed": 0,
  "parameters": 1,
  "distiller_parameters": 0,
  "seconds": 1.5,
  "hardware": "1 x CPU",
  "skipped_images": {"train": 0},
}
_CONFIG = {
  **{k: {"name": "resnet8"} for k in ("student", "teacher", "distiller")},
  "data": {"name": "cifar10", "dir": "data"},
  "epochs": 1,
  "batch_size": 8,
  "loss_weights": {"ce": 1.0},
  "loss_ramp_epochs": {},
}
_LINES = [
  {"step": 1, "kind": "train", "loss": 2.5},
  {"step": 2, "kind": "eval", **_SCORES},
]


@functools.cache
def _model(method: str = "none") -> model_lib.Model:
  """A tiny model; "simkd": with a projector and its teacher's classifier."""
  head = None
  if method != "none":
    head = card_lib.reused_head(
      {"name": "simkd"}, names=["_tiny"], weights=[1.0], maps=[(2, 2, 8)]
    )
  card = card_lib.make(
    "_tiny",
    num_classes=3,
    image_shape=(8, 8, 3),
    class_names="abc",
    mean=[0.5] * 3,
    std=[0.2] * 3,
    trained_on="folder",
    data_options={},
    head=head,
    method=method,
  )
  shapes = model_lib.variable_shapes(model_lib.build(card), (8, 8, 3))
  ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  return model_lib.Model(card, ones)


def _written(name: str, method: str = "none") -> bytes:
  """A file that `formats.save` writes."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / name
    formats.save(_model(method), path)
    return path.read_bytes()


def _tensors() -> dict[str, np.ndarray]:
  return pytorch.to_state_dict("_tiny", _model().variables)


def _torch(**options: Any) -> bytes:
  """What a toolbox saves: the network, the optimiser's state, options."""
  import torch

  tensors = {k: torch.from_numpy(v) for k, v in _tensors().items()}
  more = {"epoch": 3, "opt": argparse.Namespace(lr=0.1), "x": np.float64(1)}
  file = io.BytesIO()
  torch.save(
    {"model": tensors, "optimizer": {"state": {}}, **more}, file, **options
  )
  return file.getvalue()


def _npz() -> bytes:
  file = io.BytesIO()
  np.savez(file, **_tensors())
  return file.getvalue()


def _safetensors() -> bytes:
  from safetensors import numpy as safetensors

  return safetensors.save(_tensors())


@functools.cache
def _largest() -> pathlib.Path:
  """The path of the largest file in an export, below its folder."""
  with tempfile.TemporaryDirectory() as folder:
    to = pathlib.Path(folder) / "export"
    store.write(_model(), to)
    found = (p for p in to.rglob("*") if p.is_file())
    largest = max(found, key=lambda path: path.stat().st_size)
    kept = pathlib.Path(tempfile.mkdtemp()) / "export"
    shutil.copytree(to, kept)
    return kept / largest.relative_to(to)


def _read_export(path: pathlib.Path) -> model_lib.Model:
  """Reads an export whose largest file is this one."""
  largest, to = _largest(), path.parent / "export"
  source = next(p for p in largest.parents if p.name == "export")
  if not to.exists():
    shutil.copytree(source, to)
  (to / largest.relative_to(source)).write_bytes(path.read_bytes())
  return store.load(to)


def _arrays(content: Any) -> Any:
  """A digest of weights or of a model."""
  if isinstance(content, files.Weights):
    return digests.of_tensors(content.tensors, None)
  flat = traverse_util.flatten_dict(content.variables, sep="/")
  return digests.of_tensors(flat, json.dumps(content.card, sort_keys=True))


_META = {b"label_names": [b"class %d" % i for i in range(10)]}
_BATCH = {
  b"data": np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072),
  b"labels": [3, 9],
}


def _cifar_archive() -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w:gz") as tar:
    for name, content in (("test_batch", _BATCH), ("batches.meta", _META)):
      packed = pickle.dumps(content, 3)
      entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
      entry.size = len(packed)
      tar.addfile(entry, io.BytesIO(packed))
  return file.getvalue()


def _read_cifar(path: pathlib.Path) -> Any:
  meta = path.with_name("batches.meta")
  if path.name == "test_batch" and not meta.exists():
    meta.write_bytes(pickle.dumps(_META, 3))
  source = data.load("cifar10", split="test", dir=path.parent)
  return source.images.tolist(), source.labels.tolist(), source.class_names


def _picture(format: str) -> Callable[[], bytes]:
  def make() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()

  return make


def _read_picture(path: pathlib.Path) -> Any:
  return images.decode(path.read_bytes(), str(path)).tolist()


def _read_folder(path: pathlib.Path) -> Any:
  """Two classes, and two images whose classes a list tells."""
  for name in ("train/n01/x", "train/n02/y", "val/a b", "val/c"):
    picture = (path.parent / name).with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.touch()
  labels = path.with_name("val.txt")
  if path.name != "val_labels.txt":
    labels.write_text("a b.png n02\nc.png n01\n")
  source = data.load("folder", split="test", dir=path.parent)
  return source.labels.tolist(), source.class_names


TARGETS = {
  "pth": Target("a.pth", _torch, files.read, "zip", _arrays, 30),
  "legacy": Target(
    "a.pth",
    lambda: _torch(_use_new_zipfile_serialization=False),
    files.read,
    "pickle",
    _arrays,
    examples=30,
  ),
  "npz": Target("a.npz", _npz, files.read, "zip", _arrays, 30),
  "safetensors": Target(
    "a.safetensors", _safetensors, files.read, "safetensors", _arrays
  ),
  "sealed": Target(
    "a.safetensors",
    lambda: _written("a.safetensors"),
    opening.open_model,
    "safetensors",
    _arrays,
    examples=20,
  ),
  "simkd": Target(
    "a.pth",
    lambda: _written("a.pth", "simkd"),
    opening.open_model,
    "zip",
    _arrays,
    examples=20,
  ),
  "stablehlo": Target(
    "a.stablehlo",
    lambda: _written("a.stablehlo"),
    program.read,
    "bytes",
    lambda found: repr(found.in_avals),
  ),
  "export": Target(
    "largest",
    lambda: _largest().read_bytes(),
    _read_export,
    "bytes",
    _arrays,
    examples=20,
  ),
  "card": Target(
    "model.json", _card, lambda path: card_lib.read_card(path.parent)
  ),
  "result": Target(
    "result.json",
    _json(_RESULT),
    lambda path: records.read_result(path.parent),
  ),
  "config": Target(
    "config.json",
    _json(_CONFIG),
    lambda path: records.read_config(path.parent),
  ),
  "teacher": Target(
    "teacher.json",
    _json(_TEACHER),
    lambda path: records.read_teachers(path.parent, 1),
  ),
  "environment": Target(
    "environment.json",
    _json({"command": ["launch.py"], "python": "3.12"}),
    lambda path: storage.read_json(path, records.Environment),
  ),
  "metrics": Target(
    "metrics.jsonl",
    lambda: b"".join(json.dumps(x).encode() + b"\n" for x in _LINES),
    storage.read_metrics,
  ),
  "cifar": Target(
    "test_batch", lambda: pickle.dumps(_BATCH, 3), _read_cifar, "pickle"
  ),
  "cifar-archive": Target(
    "cifar-10-python.tar.gz", _cifar_archive, _read_cifar, "bytes"
  ),
  "png": Target("x.png", _picture("PNG"), _read_picture, "bytes"),
  "jpeg": Target("x.jpg", _picture("JPEG"), _read_picture, "bytes"),
  "val-labels": Target(
    "val_labels.txt",
    lambda: b"a b.png n02\nc.png,n01\n",
    _read_folder,
    "bytes",
  ),
  "words": Target(
    "words.txt", lambda: b"n01\tcat, pet\nn02\tdog\n", _read_folder, "bytes"
  ),
  "class-index": Target(
    "imagenet_class_index.json",
    _json({"0": ["n01", "cat"], "1": ["n02", "dog"]}),
    _read_folder,
  ),
}


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
  """Changes a file of any kind: bits, a cut, a copy, a hole, a longer one."""
  at = rng.randrange(len(content))
  end = min(len(content), at + rng.choice((1, 2, 4, 64)))
  piece = content[at:end]
  flipped = bytes([piece[0] ^ 1 << rng.randrange(8)])
  return rng.choice(
    (
      content[:at],
      content[at:],
      content[:at] + flipped + content[at + 1 :],
      content[:at] + rng.randbytes(len(piece)) + content[end:],
      content[:at] + bytes(len(piece)) + content[end:],
      content[:at] + content[end:],
      content[:end] + content[at:],
      content + piece * 1000,
    )
  )


# What stands in the place of a value.
_ODD: tuple[str, ...] = (
  *("null", "true", "[]", "{}", '""', '"a"', '"\\ud800"', '"=1+1"', "NaN"),
  *("0", "-1", "0.5", "1e999", "-1e308", "1" + 400 * "0", "9" * 5000),
  *("[" * 100 + "]" * 100, '{"a":' * 200 + "1" + "}" * 200, "[" * 200_000),
  *('{"a": 1, "a": 2}', '"' + "x" * (17 << 20) + '"', "[0, 0, 0, 0]"),
)


def mutate_json(rng: random.Random, content: bytes) -> bytes:
  """Changes a value of a JSON file, or lines of one, or its bytes."""
  if rng.random() < 0.3:
    return mutate_bytes(rng, content)
  lines = content.splitlines(keepends=True)
  number = rng.randrange(len(lines))
  tree = [json.loads(lines[number])]
  places: list[tuple[Any, Any]] = []

  def visit(node):
    for key in node if isinstance(node, dict) else range(len(node)):
      places.append((node, key))
      if isinstance(node[key], dict | list):
        visit(node[key])

  visit(tree)
  node, key = rng.choice(places)
  what = rng.randrange(4)
  mark = "<odd>"
  if what == 0 and node is not tree:
    del node[key]
  elif what == 1 and isinstance(node, dict):
    node[rng.choice(("extra", "a\nb", "name"))] = mark
  elif what == 2 and isinstance(node, list) and node is not tree:
    node.append(node[key])
  else:
    node[key] = mark
  odd = rng.choice(_ODD)
  lines[number] = json.dumps(tree[0]).replace(f'"{mark}"', odd).encode() + b"\n"
  return b"".join(lines)


# Instructions that cost an unpickler much.
_PICKLES = (
  *(
    b"]" * 10_000,
    b"(" * 10_000,
    b"\x8a\xff" + b"\xff" * 255,
    b"r\xff\xff\xff\x0f",
  ),
  *(
    b"h\x00",
    b"h\x01\x86" * 60,
    b"a",
    b"u",
    b"R",
    b"b",
    b"0",
    b".",
    b"Q",
    b"2" * 99,
  ),
  *(b"cposix\nmkdir\n", b"cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R"),
  *(b"ctorch\nFloatTensor\nJ\x00\x00\x00\x70\x85R", b"X\xff\xff\xff\x7f"),
  *(b"c_codecs\nencode\n", b"I99999999999\n", b"K\x00K\x00\x86", b"M\xff\xff"),
)


def mutate_pickle(rng: random.Random, content: bytes) -> bytes:
  """Changes the bytes of a file with pickles, or its instructions."""
  if rng.random() < 0.5:
    return mutate_bytes(rng, content)
  at = rng.randrange(len(content))
  until = at + rng.choice((0, 0, 1, 2, 5))
  return content[:at] + rng.choice(_PICKLES) + content[until:]


def mutate_zip(rng: random.Random, content: bytes) -> bytes:
  """Changes an archive, or one of its parts with the right checksum."""
  if rng.random() < 0.3:
    return mutate_bytes(rng, content)
  file = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(content)) as old,
    zipfile.ZipFile(file, "w", rng.choice((0, zipfile.ZIP_DEFLATED))) as new,
  ):
    new.comment = old.comment  # which may have our digest
    names = old.namelist()
    pickles = [name for name in names if name.endswith(".pkl")]
    chosen = rng.choice(names + pickles * len(names))
    for name in names:
      part = old.read(name)
      if name == chosen and part:
        change = mutate_pickle if name in pickles else mutate_bytes
        part = bytes(2**27) if rng.randrange(50) == 7 else change(rng, part)
      if name != chosen or rng.random() < 0.9:
        new.writestr(name, part)
  return file.getvalue()


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
  """Changes the bytes of a file, or its header alone."""
  if rng.random() < 0.4:
    return mutate_bytes(rng, content)
  end = 8 + int.from_bytes(content[:8], "little")
  header = mutate_json(rng, content[8:end].rstrip())
  return len(header).to_bytes(8, "little") + header + content[end:]


MUTATIONS = {
  "json": mutate_json,
  "bytes": mutate_bytes,
  "pickle": mutate_pickle,
  "zip": mutate_zip,
  "safetensors": mutate_safetensors,
}


def outcome(
  target: Target, path: pathlib.Path, expected: Any
) -> tuple[str, str]:
  """Reads a file as a target.

  Args:
    target: the reader.
    path: of the file.
    expected: `Target.digest` of what the valid file holds.

  Returns:
    "same", "other" (read as something else), "refused" or "crash", and a
    description.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      got = target.read(path)
  except ValueError as error:
    text = str(error)
    fine = "\n" not in text and str(path.parent) in text
    return "refused" if fine else "crash", f"{type(error).__name__}: {text}"
  except Exception as error:
    return "crash", f"{type(error).__name__}: {error}"
  return ("same" if target.digest(got) == expected else "other"), ""


def expected(target: Target, folder: pathlib.Path) -> Any:
  """What a target reads from its valid file."""
  path = folder / target.file
  path.write_bytes(target.make())
  return target.digest(target.read(path))


def _serve(pipe: Any, name: str, seed: int, numbers: range, to: str) -> None:
  """Sends the outcome of each changed file, from a process of its own."""
  logging.disable()
  target, path = TARGETS[name], pathlib.Path(to) / TARGETS[name].file
  content, valid = target.make(), expected(target, path.parent)
  now = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = now * resource.getpagesize() + _MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  pipe.send(None)
  for number in numbers:
    rng = random.Random(f"{name} {seed} {number}")
    path.write_bytes(MUTATIONS[target.kind](rng, content))
    pipe.send(None)
    result, text = outcome(target, path, valid)
    kept = path.read_bytes() if result == "crash" else b""
    pipe.send((result, text, kept))


_MEMORY, _SECONDS, _START_SECONDS = 1 << 30, 10, 600


def run(name: str, seed: int, count: int, to: pathlib.Path) -> dict[str, int]:
  """Tries changed files of one target; counts the outcomes.

  Besides those of `outcome` they are "hang" and "death", of the process.
  """
  found: dict[str, int] = collections.Counter()
  context, number = multiprocessing.get_context("spawn"), 0
  while number < count:
    with tempfile.TemporaryDirectory() as folder:
      ours, theirs = context.Pipe()
      rest = range(number, count)
      child = context.Process(
        target=_serve, args=(theirs, name, seed, rest, folder)
      )
      child.start()
      theirs.close()
      if not ours.poll(_START_SECONDS):
        raise TimeoutError(f"{name}: the reader does not start")
      ours.recv()
      for number in rest:
        content = b""
        try:
          ours.recv()  # the file is written
          result, text = "hang", ""
          if ours.poll(_SECONDS):
            result, text, content = ours.recv()
        except EOFError:
          result, text = "death", f"exit code {child.exitcode}"
        found[result] += 1
        if result in ("hang", "death"):
          child.kill()
          changed = pathlib.Path(folder) / TARGETS[name].file
          content = changed.read_bytes()
        if result in ("crash", "hang", "death"):
          kept = to / f"{name}-{seed}-{number}"
          kept.parent.mkdir(parents=True, exist_ok=True)
          kept.write_bytes(content)
          print(f"{kept}: {result} {text[:300]}", flush=True)
        if result in ("hang", "death"):
          break
      child.join()
      number += 1
  return dict(found)


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("targets", nargs="*", metavar="reader", default=[])
  parser.add_argument("--count", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--to", default="fuzz", help="folder for faults")
  args = parser.parse_args()
  faults = 0
  for name in args.targets or TARGETS:
    found = run(name, args.seed, args.count, pathlib.Path(args.to))
    faults += sum(found.get(k, 0) for k in ("crash", "hang", "death"))
    print(name, found, flush=True)
  sys.exit(faults > 0)


if __name__ == "__main__":
  main()
