"""Tables at the scale of a CPU: all of CIFAR-100, ResNet-20 teaches ResNet-8.

    python launch.py --config configs/table_cpu.py --workdir runs/table_cpu
    python launch.py --config configs/table_cpu.py:methods --workdir \
      runs/cpu_methods --config.teacher.checkpoint=TEACHER

The schedule of CIFAR-100's recipe, squeezed from 240 epochs to a few: batch 64,
and a cosine instead of the steps at 150, 180 and 210. Student alone, KD and
SimKD, three trials of 4 epochs each, with a teacher of 8; or, after the colon,
`methods`: one epoch of every method for CNNs, once, with the weights of its
config, and ramps and first stages squeezed alike. Methods that read the
teacher's logits alone share a cache of them, in float16.

Top-1 after the last epoch, mean and sample standard deviation of seeds 0 to 2
(results/cifar100/table_cpu; 2 cores of an AMD EPYC, 2026-11-27, 100 minutes
beside other work): teacher 51.98; alone 30.83 +- 1.15, KD 43.09 +- 0.41, SimKD
42.05 +- 0.41.
"""

from typing import Any

from configs import base, table_cifar
from kd_jax import distillers

PAIR = {"teacher": "resnet20", "student": "resnet8"}
# --config.teacher.checkpoint is of all cells; a student alone has no teacher.
ALONE = {"student": {"name": "resnet8"}, "teacher": {"checkpoint": ""}}


def all_methods(epochs: int) -> dict[str, dict[str, Any]]:
  """A cell for each method, and for KD with LSKD and with DOT."""
  # ViTKD is for two transformers.
  names = {*distillers.names()} - {"none", "vitkd"}
  squeeze = epochs / base.get_config().epochs
  cells = {"alone": ALONE}
  for name in sorted(names | {"lskd", "dot"}):
    cell = table_cifar.cell(f"{name}_cifar", **PAIR)
    ramps, method = cell["loss_ramp_epochs"], cell["distiller"]
    cell["loss_ramp_epochs"] = {k: v * squeeze for k, v in ramps.items()}
    for field in {"decay_start", "decay_end", "reversal_epochs"} & {*method}:
      least = 2 if field == "decay_end" else 1
      method[field] = max(least, round(method[field] * squeeze))
    for stage in cell.get("stages", {}).values():
      stage["epochs"] = max(1, round(stage["epochs"] * squeeze))
    mixed = cell.get("data", {}).get("mixup")
    if distillers.create(method["name"]).needs_logits_only and not mixed:
      cell["teacher"]["cache"] = "runs/cpu_methods_logits"
    cells[name] = cell
  return cells


def get_config(arg: str = ""):
  """The runs; `methods` one of each method, `:smoke` makes each of seconds."""
  words = arg.split(",")
  config = base.get_config()
  config.teacher.epochs = 8
  config.optim.schedule = "cosine"
  config.optim.milestones = ()
  config.optim.nesterov = True
  if "methods" in words:
    config.epochs = 1
    config.grid = all_methods(config.epochs)
  else:
    config.epochs = 4
    config.trials = 3
    config.grid = {
      "resnet8_alone": ALONE,
      "resnet8_kd": table_cifar.cell("kd_cifar", **PAIR),
      "resnet8_simkd_f2": table_cifar.cell("simkd_cifar", **PAIR),
    }
  rest = [word for word in words if word != "methods"]
  return base.finish(config, ",".join(rest))
