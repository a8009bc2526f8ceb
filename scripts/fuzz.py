"""Feeds changed files to the readers: the same content, one line, or a fault.

    python scripts/fuzz.py                    all readers, 1,000 files of each
    python scripts/fuzz.py card --count 100000 --seed 7

A reader may give the content back, or refuse the file with a ValueError of one
line that names it. Anything else is a fault, whose file is kept.
tests/test_fuzz.py tries a few such files.
"""

import argparse
import collections
import dataclasses
import json
import logging
import pathlib
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from kd_jax import storage
from kd_jax.interop import card as card_lib
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

TARGETS = {
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


MUTATIONS = {"json": mutate_json, "bytes": mutate_bytes}


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


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("targets", nargs="*", metavar="reader", default=[])
  parser.add_argument("--count", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--to", default="fuzz", help="folder for faults")
  args = parser.parse_args()
  logging.disable()
  faults = 0
  for name in args.targets or TARGETS:
    target, found = TARGETS[name], collections.Counter()
    content = target.make()
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / target.file
      valid = expected(target, path.parent)
      for number in range(args.count):
        rng = random.Random(f"{name} {args.seed} {number}")
        changed = MUTATIONS[target.kind](rng, content)
        path.write_bytes(changed)
        result, text = outcome(target, path, valid)
        found[result] += 1
        if result == "crash":
          kept = pathlib.Path(args.to) / f"{name}-{args.seed}-{number}"
          kept.parent.mkdir(parents=True, exist_ok=True)
          kept.write_bytes(changed)
          print(f"{kept}: {text[:200]}")
    faults += found["crash"]
    print(name, dict(found))
  sys.exit(faults > 0)


if __name__ == "__main__":
  main()
