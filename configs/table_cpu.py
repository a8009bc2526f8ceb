"""Student alone, KD and SimKD, three trials each, at the scale of a CPU.

    python launch.py --config configs/table_cpu.py --workdir runs/table_cpu

All of CIFAR-100: ResNet-20 teaches ResNet-8. The schedule of the table's
recipe, squeezed: batch 64, a cosine instead of the steps at 150, 180 and 210,
8 epochs for the teacher and 4 for each student.

Top-1 after the last epoch, mean and sample standard deviation of seeds 0 to 2
(results/cifar100/table_cpu; 2 cores of an AMD EPYC, 2026-11-27, 100 minutes
beside other work): teacher 51.98; alone 30.83 +- 1.15, KD 43.09 +- 0.41, SimKD
42.05 +- 0.41.
"""

from configs import base, table_cifar


def get_config(arg: str = ""):
  """The nine runs; `:smoke` makes each one of seconds."""
  config = base.get_config()
  config.trials = 3
  config.epochs = 4
  config.teacher.epochs = 8
  config.optim.schedule = "cosine"
  config.optim.milestones = ()
  config.optim.nesterov = True
  pair = {"teacher": "resnet20", "student": "resnet8"}
  config.grid = {
    "resnet8_alone": {"student": {"name": "resnet8"}},
    "resnet8_kd": table_cifar.cell("kd_cifar", **pair),
    "resnet8_simkd_f2": table_cifar.cell("simkd_cifar", **pair),
  }
  return base.finish(config, arg)
