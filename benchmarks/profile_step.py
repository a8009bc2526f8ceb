"""Where a train step's time goes: a profile, by the kinds of its operations.

    python -m benchmarks.profile_step [--pair TEACHER:STUDENT] [--method simkd]

Traces a few steps of kd_jax's train chunk, as `benchmarks.step` runs it, and
adds up the operations of the compiled program, in ms a step and device:

  convolution            forward passes, teacher's and student's
  input gradient         of a convolution
  kernel gradient        of a convolution
  matrix product         forward and backward, 1x1 convolutions on a CPU too
  transpose, copy        of whole arrays
  collective             between devices, waiting for each other included
  other                  BatchNorm, activations, losses, augmentation, optimiser

On a GPU it also says for which share of the time between the first kernel and
the last one no kernel ran. What overlaps is counted each for itself. Prints
two tables, kinds and the longest operations, and writes a JSON file.
"""

import argparse
import collections
import pathlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import measure
from benchmarks import work as work_lib
from benchmarks.step import make_work
from kd_jax.distributed import devices as devices_lib

KINDS = (
  *("convolution", "input gradient", "kernel gradient", "matrix product"),
  *("transpose, copy", "collective", "other"),
)
# Their events span those of what they hold.
_CONTAINERS = {"while", "call", "conditional"}
_COLLECTIVES = re.compile(r"all-reduce|all-gather|reduce-scatter|all-to-all")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(")
# Of a library's call or of a kernel, the first that its name has.
_NAMES = (
  ("kernel gradient", r"convBackwardFilter|wgrad"),
  ("input gradient", r"convBackwardInput|dgrad"),
  ("convolution", r"fprop|conv(?!ert)"),
  ("matrix product", r"gemm|cublas|matmul|nvjet"),
  ("collective", r"nccl|" + _COLLECTIVES.pattern),
  ("transpose, copy", r"^(wrapped_|loop_)?(transpose|copy)|[Mm]emcpy"),
)


class Event(NamedTuple):
  """A piece of work that a device did."""

  operation: str
  name: str
  start_ns: float
  duration_ns: float


def kind_of_name(name: str) -> str:
  """The kind of a kernel or a library's call, as far as its name tells."""
  for kind, pattern in _NAMES:
    if re.search(pattern, name):
      return kind
  return "other"


def _kind_of_convolution(line: str, operation: str) -> str:
  # A kernel's gradient slides the output's gradient over the input: its window
  # is a map, where kernels have 1, 3 or 7 pixels and maps are even (but for
  # ImageNet's last, of 7).
  size = re.search(r"window=\{[^}]*size=(\d+)", line)
  width = int(size[1]) if size else 1
  backward = "transpose(" in operation
  if width % 2 == 0 or (width > 5 and backward):
    return "kernel gradient"
  return "input gradient" if backward else "convolution"


def kinds_of(text: str) -> dict[str, str | None]:
  """The kind of each instruction of a compiled program.

  Args:
    text: `compiled.as_text()`.

  Returns:
    By the instruction's name: one of KINDS, or None for loops and calls.
  """
  inside: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
  found = {}
  current = ""
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      current = start[1]
    elif instruction := _INSTRUCTION.match(line):
      name, opcode = instruction.groups()
      inside[current].append((opcode, line))
      found[name] = (opcode, line)
  return {
    name: _kind(name, opcode, line, inside)
    for name, (opcode, line) in found.items()
  }


def _kind(
  name: str,
  opcode: str,
  line: str,
  inside: dict[str, list[tuple[str, str]]],
) -> str | None:
  if opcode in _CONTAINERS:
    return None
  if _COLLECTIVES.match(opcode):
    return "collective"
  called = re.search(r"calls=%?([\w.-]+)", line)
  parts = [(opcode, line), *inside[called[1] if called else ""]]
  # A fusion of many convolutions may hold a product as well, and first.
  for inner, text in sorted(parts, key=lambda part: part[0] != "convolution"):
    if inner == "convolution":
      return _kind_of_convolution(text, _operation(line) or _operation(text))
    if inner == "dot":
      return "matrix product"
    target = re.search(r'custom_call_target="([^"]*)"', text)
    if target and (kind := kind_of_name(target[1])) != "other":
      return kind
  if opcode in ("transpose", "copy"):
    return "transpose, copy"
  return kind_of_name(name) if opcode == "fusion" else "other"


def _operation(line: str) -> str:
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ""


def events_of(trace: pathlib.Path) -> tuple[list[Event], bool]:
  """What the devices did, and whether they are GPUs.

  Args:
    trace: the folder that `jax.profiler.trace` wrote.
  """
  (path,) = trace.rglob("*.xplane.pb")
  planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  cards = [plane for plane in planes if "/device:GPU" in plane.name]
  found = []
  for plane in cards or planes:
    for line in plane.lines:
      if cards and not line.name.startswith("Stream"):
        continue
      for event in line.events:
        operation = str(dict(event.stats).get("hlo_op", ""))
        if operation or cards:
          found.append(
            Event(operation, event.name, event.start_ns, event.duration_ns)
          )
  return found, bool(cards)


def idle_share(events: Iterable[Event]) -> float:
  """Of the time from the first to the last event, that in which none was."""
  spans = sorted((e.start_ns, e.start_ns + e.duration_ns) for e in events)
  first = end = spans[0][0]
  idle = 0.0
  for start, stop in spans:
    idle += max(start - end, 0.0)
    end = max(end, stop)
  return idle / (end - first) if end > first else 0.0


def add_up(
  events: Sequence[Event], kinds: dict[str, str | None], *, times: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Adds up events, by kind and by operation.

  Args:
    events: what the devices did.
    kinds: of the program's instructions; others are told by their names.
    times: steps times devices, by which all is divided.

  Returns:
    For JSON: of each kind, and of each operation, the longest first: "ms",
    "count" and "share", a step and device.
  """
  sums: dict[tuple[str, str], list[float]] = collections.defaultdict(
    lambda: [0.0, 0]
  )
  for event in events:
    name = event.operation if event.operation in kinds else event.name
    kind = kinds.get(event.operation, kind_of_name(name))
    if kind is not None:
      sums[kind, name][0] += event.duration_ns / 1e6 / times
      sums[kind, name][1] += 1 / times
  total = sum(ms for ms, _ in sums.values())
  operations = [
    {
      "operation": name,
      "kind": kind,
      "ms": ms,
      "count": count,
      "share": ms / total,
    }
    for (kind, name), (ms, count) in sums.items()
  ]
  operations.sort(key=lambda row: -row["ms"])
  by_kind = []
  for kind in KINDS:
    mine = [row for row in operations if row["kind"] == kind]
    keys = ("ms", "count", "share")
    by_kind.append({"kind": kind, **{k: sum(r[k] for r in mine) for k in keys}})
  return by_kind, operations


def profile(
  work: work_lib.Work,
  weights: pathlib.Path,
  *,
  dtype: str,
  devices: int,
  steps: int,
) -> dict[str, Any]:
  """Traces steps of a work.

  Args:
    work: what is trained.
    weights: folder of the initial weights.
    dtype: "float32" or "bfloat16".
    devices: over which the batch is spread.
    steps: that are traced, at least: whole dispatches are.

  Returns:
    For JSON: "kinds" and "operations" of `add_up`, and what they are of.
  """
  from benchmarks import jax_side

  work_lib.prepare([work], weights)
  program = jax_side.Program(work, weights, dtype=dtype, devices=devices)
  for _ in range(3):
    program.run(program.steps)
  steps = -(-steps // program.steps) * program.steps
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      (ms,) = measure.take_turns(program.run, steps=steps, turns=1)
    events, on_gpu = events_of(pathlib.Path(folder))
  kinds = kinds_of(program.compiled_text())
  if not on_gpu:  # those of other programs, which make the batch's order
    events = [event for event in events if event.operation in kinds]
  if not events:
    raise SystemExit(
      "expected operations in the trace, got none: this JAX's profiler does not"
      " record what these devices do"
    )
  by_kind, operations = add_up(events, kinds, times=steps * devices)
  return {
    "ms_per_step": ms,
    "steps": steps,
    "devices": devices,
    "idle_share": idle_share(events) if on_gpu and devices == 1 else None,
    "kinds": by_kind,
    "operations": operations,
  }


def report(found: dict[str, Any]) -> str:
  """The tables of what `profile` has found."""

  def cells(row):
    return f"{row['ms']:.2f}", f"{row['share']:.1%}", f"{row['count']:.0f}"

  columns = ("ms", "share", "count")
  kinds = [(row["kind"], *cells(row)) for row in found["kinds"]]
  operations = [
    (row["operation"][:40], row["kind"], *cells(row))
    for row in found["operations"]
  ]
  idle = found["idle_share"]
  of_idle = "" if idle is None else f", of which {idle:.1%} idle"
  return "\n".join(
    [
      f"{found['ms_per_step']:.2f} ms a step under the profiler{of_idle};"
      " of a step and device:",
      measure.table(("kind", *columns), kinds),
      measure.table(("operation", "kind", *columns), operations),
    ]
  )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The arguments."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--pair", default=work_lib.PAIRS[0])
  add("--method", choices=work_lib.methods(), default="simkd")
  add("--batch", type=int, default=64)
  add("--dtype", choices=("float32", "bfloat16"), default="float32")
  add("--devices", type=int, help="default: all; of a CPU, each core")
  add("--steps", type=int, default=4, help="that are traced, at least")
  add("--longest", type=int, default=10, help="operations that are kept")
  add("--examples", type=int, help="in the training set (50,000)")
  add("--image_size", type=int, help="in pixels (32; of ResNets 224)")
  add("--negatives", type=int, default=16384, help="of crd")
  add("--weights", default="runs/benchmarks/weights")
  add("--out", default="runs/benchmarks/profile.json")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures, prints and writes."""
  args = parse(arguments)
  devices_lib.split_cpu(args.batch)
  result = measure.head()
  work = make_work(args.pair, args.method, args.batch, args)
  result["hardware"]["device"] = jax.devices()[0].device_kind
  result["work"] = f"{args.pair} {args.method} {args.batch} {args.dtype}"
  result |= profile(
    work,
    pathlib.Path(args.weights),
    dtype=args.dtype,
    devices=args.devices or jax.device_count(),
    steps=args.steps,
  )
  result["operations"] = result["operations"][: args.longest]
  out = pathlib.Path(args.out)
  measure.write(out, result)
  print(report(result))
  print(f"written: {out}")


if __name__ == "__main__":
  main()
