"""Compiles a config's train step for GPUs that are not there, and counts.

    python -m benchmarks.aot --config configs/simkd_cifar.py --devices 1 8
    python -m benchmarks.aot --config ... --budget benchmarks/budget.json

Needs a Linux machine with JAX's CUDA packages (`pip install -r
requirements.txt`), but no GPU and no driver: XLA compiles for the target text
in benchmarks/targets/. Without a GPU it cannot try which of cuDNN's algorithms
is fastest, so a real program may differ in a few kernels; counts and bytes are
close, the time is an estimate. Of each number of devices, a step and device:

  kernels       fusions, library calls, collectives and copies launched
  fusions, library calls, collectives
  collective bytes, bytes    results of the collectives; read and written by all
                kernels, as if no cache held anything
  flops         of convolutions and matrix products
  temporary     bytes of memory beside arguments and results
  estimated ms  sum over the kernels of the longest of: bytes at the memory's
                bandwidth, FLOPs at the peak, a launch

A budget is a file of such results; more than 5 % above one of its kernels,
bytes or temporary bytes is an error.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

TARGETS = pathlib.Path(__file__).resolve().parent / "targets"
# A kernel's launch from a CUDA graph, in seconds: an assumption.
LAUNCH = 2e-6
GUARDED = ("kernels", "bytes", "temporary")
TOLERANCE = 1.05
_SIZES = {
  **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
  **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
  **dict.fromkeys(("s32", "u32", "f32"), 4),
  **dict.fromkeys(("s64", "u64", "f64"), 8),
}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+)"
  r" (?P<op>[a-z][\w-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(r"^(all-reduce|all-gather|reduce-scatter|all-to-all)")
# What launches nothing.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "iota"),
}


class Instruction(NamedTuple):
  """A line of a compiled program.

  Attributes:
    op: its operation.
    shapes: of the result: (type, dimensions).
    operands: names of what it reads.
    text: the rest of the line, with its attributes.
  """

  op: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  operands: tuple[str, ...]
  text: str

  @property
  def size(self) -> int:
    """Bytes of the result."""
    return sum(
      _SIZES.get(kind, 4) * math.prod(dims) for kind, dims in self.shapes
    )


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """Reads a compiled program's text.

  Returns:
    ({computation: {name: instruction}}, name of the entry).
  """
  computations: dict[str, dict[str, Instruction]] = {}
  current, entry = "", ""
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = head[1]
      computations[current] = {}
      if line.startswith("ENTRY"):
        entry = current
    elif (found := _INSTRUCTION.match(line)) and current:
      arguments = found["rest"].split(")")[0]
      computations[current][found["name"]] = Instruction(
        found["op"],
        tuple(
          (kind, tuple(int(n) for n in dims.split(",") if n))
          for kind, dims in _ARRAY.findall(found["type"])
        ),
        tuple(re.findall(r"%([\w.-]+)", arguments)),
        found["rest"],
      )
  return computations, entry


def launches(
  computations: dict[str, dict[str, Instruction]], name: str, times: int = 1
) -> list[tuple[int, str, Instruction]]:
  """Lists what a computation launches: (how often, computation, instruction).

  Loops count as often as XLA knows that they turn, and once if it does not.
  """
  found: list[tuple[int, str, Instruction]] = []
  for each in computations[name].values():
    if each.op in _FREE or each.op.endswith("-done"):
      continue
    called = re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", each.text)
    if each.op == "while":
      count = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.text)
      turns = times * int(count[1]) if count else times
      found += launches(computations, called[-1], turns)
    elif each.op in ("call", "async-start") and called:
      found += launches(computations, called[-1], times)
    elif each.op == "conditional":
      branches = re.search(r"branch_computations=\{([^}]*)\}", each.text)
      names = re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
      found += max(
        (launches(computations, branch, times) for branch in names),
        key=len,
        default=[],
      )
    else:
      found.append((times, name, each))
  return found


def flops(each: Instruction, sizes: list[int]) -> float:
  """Of a library's convolution or matrix product.

  Args:
    each: the call.
    sizes: elements of its two operands and its result.
  """
  window = re.search(r"window=\{size=(\d+)x(\d+)(?: [^}]*)?\}", each.text)
  volume = float(math.prod(sizes)) ** 0.5
  if window is None:  # sqrt(MK KN MN) = MKN
    return 2 * volume
  strides = re.search(r"stride=(\d+)x(\d+)", each.text)
  stride = int(strides[1]) if strides else 1
  # sqrt(NHWI k^2 IO N(H/s)(W/s)O) = N(HW/s)IOk
  return 2 * volume * int(window[1]) / stride


def count(text: str, *, steps: int, bandwidth: float, peak: float) -> Any:
  """What a compiled program does in a step.

  Args:
    text: of the program.
    steps: taken by one dispatch of it.
    bandwidth: of the memory, in bytes a second.
    peak: of matrix products, in FLOP a second.
  """
  computations, entry = parse(text)
  totals = dict.fromkeys(
    (
      *("kernels", "fusions", "library calls", "collectives"),
      *("collective bytes", "bytes", "flops", "estimated ms"),
    ),
    0.0,
  )
  calls: dict[str, float] = {}
  for times, where, each in launches(computations, entry):
    sizes = [
      computations[where][name].size
      for name in each.operands
      if name in computations[where]
    ]
    moved, work = each.size + sum(sizes), 0.0
    totals["kernels"] += times
    if each.op == "fusion":
      totals["fusions"] += times
    elif each.op == "custom-call":
      totals["library calls"] += times
      target = re.search(r'custom_call_target="([^"]+)"', each.text)
      name = target[1] if target else "unknown"
      calls[name] = calls.get(name, 0) + times / steps
      if len(sizes) >= 2 and re.search("conv|gemm|cublas", name):
        operands = [computations[where][n] for n in each.operands[:2]]
        arrays = [x.shapes[0][1] for x in (*operands, each) if x.shapes]
        work = flops(each, [math.prod(dims) for dims in arrays])
    elif _COLLECTIVE.match(each.op):
      totals["collectives"] += times
      totals["collective bytes"] += times * each.size
    totals["bytes"] += times * moved
    totals["flops"] += times * work
    seconds = max(moved / bandwidth, work / peak, LAUNCH)
    totals["estimated ms"] += 1000 * times * seconds
  return {
    **{name: round(value / steps, 6) for name, value in totals.items()},
    "calls": dict(sorted(calls.items())),
  }


def compile_step(
  config: Any, target: str, topology: str, bank_rows: int = 0
) -> Any:
  """Compiles a config's train chunk for devices that are not there.

  Args:
    config: made by a file of `configs/`, unlocked.
    target: text of the GPU.
    topology: "SLICESxHOSTSxDEVICES".
    bank_rows: of CRD's memory banks; if 0, as many as the config has images.
      The images themselves stay as many as the config says.

  Returns:
    (compiled program, steps of a dispatch).
  """
  import jax
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  from kd_jax.distributed import collectives, devices
  from kd_jax.interop import model
  from kd_jax.models import fold
  from kd_jax.runs import components, programs
  from kd_jax.runs import config as config_lib
  from kd_jax.runs import teachers as teachers_lib
  from kd_jax.training import step as step_lib

  description = topologies.get_topology_desc(
    platform="cuda", target_config=target, topology=topology
  )
  number = math.prod(int(n) for n in topology.split("x"))
  mesh = topologies.make_mesh(description, (number,), (collectives.AXIS,))
  gpus = devices.Devices(mesh)
  source, test = config_lib.load_data(config)
  config = teachers_lib.resolve_teachers(config_lib.resolve_defaults(config))
  config.parallel.num_devices = 1
  teachers = teachers_lib.find(config, source)
  parts = components.build(config, source, test, teachers)
  labels = np.resize(source.labels, bank_rows or len(source))
  recipe = components.make_recipe(
    config, source, teachers, gpus, parts.pipeline
  )
  made = programs.make_programs(
    dataclasses.replace(recipe, train_labels=labels.tobytes())
  )
  variables = tuple(
    model.variable_shapes(t.network, source.image_shape) for t in teachers
  )
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
  frozen = tuple(
    fold.freeze(teacher.network, v, source.image_shape)
    for teacher, v in zip(teachers, zeros, strict=True)
  )
  steps = config.steps_per_dispatch or next(
    n
    for n in (22, 11, 10, 5, 4, 2, 1)
    if parts.pipeline.steps_per_epoch % n == 0
  )
  chunk = jax.eval_shape(lambda: parts.pipeline.next_chunk(steps))

  def struct(x: Any, spec: Any) -> Any:
    rows = -x.shape[0] % number if spec == P(collectives.AXIS) else 0
    shape = (x.shape[0] + rows, *x.shape[1:]) if rows else x.shape
    return jax.ShapeDtypeStruct(
      shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )

  def whole(tree: Any) -> Any:
    return jax.tree.map(lambda x: struct(x, P()), tree)

  arguments = (
    jax.tree.map(struct, made.shapes, made.specs),
    whole(step_lib.Constants(frozen, parts.seeds)),
    whole(parts.pipeline.resident),
    jax.tree.map(lambda x: struct(x, P(None, collectives.AXIS)), chunk),
  )
  traced = made.train_chunk.trace(*arguments)
  return traced.lower(lowering_platforms=("cuda",)).compile(), steps


def over_budget(found: Any, budget: Any) -> list[str]:
  """What exceeds a budget, in words."""
  return [
    f"{cell}: {name} {found[cell][name]:g}, allowed {TOLERANCE * most:g}"
    for cell, limits in budget.items()
    if cell in found
    for name, most in limits.items()
    if name in GUARDED and found[cell][name] > TOLERANCE * most
  ]


def main() -> None:
  """Compiles, prints and compares with a budget."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--config", nargs="+", required=True, help="FILE.py")
  parser.add_argument(
    "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of all configs"
  )
  parser.add_argument("--gpu", default="h200", help="a file of targets/")
  parser.add_argument("--devices", nargs="+", default=["1"], help="8, or 2x8")
  parser.add_argument(
    "--bank_rows", type=int, default=0, help="of CRD's memory banks"
  )
  parser.add_argument("--out", type=pathlib.Path, help="JSON, written to")
  parser.add_argument("--budget", type=pathlib.Path, help="JSON, compared with")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  flag = "--xla_gpu_autotune_level=0"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  from benchmarks import measure

  target = (TARGETS / f"{args.gpu}.txt").read_text()
  values = dict(re.findall(r"(\w+): ([\d.]+|\"[^\"]*\")", target))
  card = values["device_description_str"].strip('"')
  found: dict[str, Any] = {}
  if args.out and args.out.exists():
    found = json.loads(args.out.read_text())
  problems = []
  for file, devices in itertools.product(args.config, args.devices):
    more = [f"bank_rows={args.bank_rows}"] if args.bank_rows else []
    words = [pathlib.Path(file).stem, *args.set, *more, args.gpu, devices]
    cell = " ".join(words)
    config = _load(file, args.set)
    hosts, _, each = devices.rpartition("x")
    try:
      compiled, steps = compile_step(
        config, target, f"1x{hosts or 1}x{each}", args.bank_rows
      )
    except Exception as error:  # the others may compile
      problems.append(f"{cell}: {type(error).__name__}: {error}")
      print(problems[-1], file=sys.stderr, flush=True)
      continue
    found[cell] = {
      **count(
        compiled.as_text(),
        steps=steps,
        bandwidth=float(values["memory_bandwidth"]),
        peak=measure.peak(card, config.dtype) or float("inf"),
      ),
      "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    print(cell, json.dumps(found[cell]), flush=True)
    if args.out:
      args.out.write_text(json.dumps(found, indent=1) + "\n")
  if args.budget:
    problems += over_budget(found, json.loads(args.budget.read_text()))
  if problems:
    sys.exit("\n".join(["not compiled, or over the budget:", *problems]))


def _load(file: str, changes: list[str]) -> Any:
  spec = importlib.util.spec_from_file_location("config", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  made_up = {
    "data.name": "synthetic",
    "data.image_size": 224 if "imagenet" in file else 32,
    "data.num_classes": 1000 if "imagenet" in file else 100,
    "data.num_examples": 2048 if "imagenet" in file else 50_000,
    "data.pipeline": "device",
    "data.crop_padding": 0 if "imagenet" in file else 4,
    "dtype": "bfloat16",
  }
  config.update_from_flattened_dict(made_up)
  for change in changes:
    name, _, value = change.partition("=")
    config.update_from_flattened_dict({name: json.loads(value)})
  return config


if __name__ == "__main__":
  main()
