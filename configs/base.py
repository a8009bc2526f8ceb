"""The whole schema of a run. Every other config is a delta of this file.

Durations are in epochs unless a name says otherwise. A field whose default is
a placeholder (None) is settled when the run starts, logged, and written to
`config.json` as settled.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from kd_jax import registry
from kd_jax.runs import presets

# Sections whose fields depend on the method, or are the user's names.
_FREE_FORM = {"distiller", "loss_weights", "loss_ramp_epochs", "stages", "grid"}


def get_config(arg: str = "") -> ConfigDict:
  """Plain supervised training of a CIFAR-100 network, with every field."""
  return finish(_all_fields(), arg)


def _all_fields() -> ConfigDict:
  config = ConfigDict()
  # Of everything random: initial weights, order, augmentation, negatives.
  config.seed = 0
  # Length of the run.
  config.epochs = 240
  # Images per optimiser update, over all devices.
  config.batch_size = 64
  # Parts into which a batch is cut to save memory; gradients are averaged.
  config.accumulate_steps = 1
  # Optimiser updates in one dispatch to the device; it has to divide those of
  # an epoch. 0 settles it: 1 on a CPU, else the most that divides an epoch.
  config.steps_per_dispatch = 0
  # Arithmetic of the networks: "float32" or "bfloat16". Parameters,
  # statistics, logits and losses are float32 always.
  config.dtype = "float32"
  # BatchNorm, batch-relational losses and memory banks see the whole batch,
  # so that a run does not depend on the number of devices. False: each device
  # sees its share, as in the PyTorch toolboxes.
  config.sync_batch_stats = True

  config.student = ConfigDict()
  # A name of kd_jax.models.names(), or your own as "package.module:attribute".
  config.student.name = "resnet8x4"

  # Initial weights of the student: a finished run's workdir (its last
  # checkpoint; of the same method also that method's modules), an export, or a
  # file of weights. A classifier of other classes is made anew.
  config.init_from = ""

  config.teacher = ConfigDict()
  # A network as above; "": that of the checkpoint, or no teacher.
  config.teacher.name = ""
  # A finished run's workdir (of any method), an export, or a file of weights
  # (.pth, .safetensors, .npz). "": train the teacher of this config first, and
  # keep it beside the workdir for the next run.
  config.teacher.checkpoint = ""
  # Used when it has to be trained. None: the run's own epochs and milestones,
  # and the rate that optim.learning_rate's None stands for.
  config.teacher.epochs = placeholder(int)
  config.teacher.learning_rate = placeholder(float)
  config.teacher.milestones = placeholder(tuple)
  config.teacher.seed = 0
  # A folder that keeps the teacher's logits for later runs of the same teacher,
  # data, data.seed and batch_size, which then need not run the teacher; for
  # methods that read nothing but its logits. "": none.
  config.teacher.cache = ""
  # "float16" or "float32" (None: float16).
  config.teacher.cache_dtype = placeholder(str)
  # How many of the largest logits are kept; the other classes share what is
  # left of the probability evenly. 0: all of them are kept.
  config.teacher.cache_top_k = 0

  # Several teachers instead, for the methods that take them (kd, srrl, simkd):
  # checkpoints, or dicts of name, checkpoint and weight. A term of the loss is
  # the mean over them, weighted. With them config.teacher.name is not used.
  config.teachers = ()

  # Set it after the config file's colon (dkd_cifar.py:mdistiller): the settings
  # of a toolbox, see kd_jax/runs/presets.toml. "": those of the file.
  config.preset = ""
  # The method: a name of kd_jax.distillers.names() and that module's fields.
  # Several at once: "crd+dkd". All take the fields that every method has, such
  # as temperature; one takes what it alone has. Fields that several have, and
  # fields for one alone, go into a section of its name: distiller.dkd.beta.
  config.distiller = ConfigDict({"name": "none"})
  # Weight of each term of the loss; a term of weight 0 is not computed.
  config.loss_weights = ConfigDict({"ce": 1.0})
  # Epochs over which a term's weight grows linearly to full size.
  config.loss_ramp_epochs = ConfigDict()

  # Share of the target that goes to all classes alike, in the term "ce".
  config.label_smoothing = 0.0

  config.optim = ConfigDict()
  # None: 0.05, or 0.01 for MobileNet and ShuffleNet students.
  config.optim.learning_rate = placeholder(float)
  # Above 0, the rate is one for batches of this size, and is multiplied by
  # batch_size / reference_batch_size; warmup_epochs goes with it.
  config.optim.reference_batch_size = 0
  # "step", "cosine" or "constant".
  config.optim.schedule = "step"
  # The rate is multiplied by decay_rate after each of these epochs.
  config.optim.milestones = (150, 180, 210)
  config.optim.decay_rate = 0.1
  # Epochs over which the rate grows linearly from 0.
  config.optim.warmup_epochs = 0.0
  config.optim.momentum = 0.9
  config.optim.nesterov = False
  # Coupled, on all parameters that the loss reaches.
  config.optim.weight_decay = 5e-4
  # Largest global norm of the gradient; 0 does not clip.
  config.optim.gradient_clip = 0.0
  # DOT: the momentum of the term "ce" is this much lower, that of all other
  # terms as much higher. CIFAR: 0.075; 0: off.
  config.optim.dot_delta = 0.0

  config.data = ConfigDict()
  # In memory: "cifar10", "cifar100", "tfds:cifar10", "tfds:cifar100", "digits",
  # "synthetic". Image files: "imagenet", "tfds:imagenet2012", "tiny-imagenet",
  # "folder" (any folder of class folders). Your own: "package.module:function".
  config.data.name = "cifar100"
  # Folder of the publisher's files, of train and val, or of TFDS's data.
  config.data.dir = "../data"
  # "device": the data set stays on the device. "grain": the host reads it.
  # "dali": NVIDIA DALI reads image files, in an order of its own.
  config.data.pipeline = "device"
  # Pixels of zero padding around an image before its random crop; 0: no crop.
  config.data.crop_padding = 4
  # Whether half of the images are mirrored.
  config.data.flip = True
  # Seed of the order, augmentation and mixing; None: config.seed.
  config.data.seed = placeholder(int)
  # Alpha of mixup and of CutMix, which mix neighbours in a batch; teacher and
  # student see the same images. 0: off. With both, each takes half the batches.
  config.data.mixup = 0.0
  config.data.cutmix = 0.0
  # Height and width in pixels (None: 32; image files: 224; Tiny ImageNet: 64).
  # CIFAR has no choice.
  config.data.image_size = placeholder(int)
  # Image files: pixels of the shorter side before evaluation's centre crop
  # (None: 256/224 of image_size; Tiny ImageNet: 64).
  config.data.resize = placeholder(int)
  # Image files that cannot be decoded: "error", or "skip" to leave them out,
  # count and list them (None: "error"; "dali" has no "skip"). A missing file or
  # 100 bad files in a row always end the run.
  config.data.on_bad_image = placeholder(str)
  # Image files: a random crop's share of the area, and its width / height, from
  # least to largest. SimKD's DALI pipeline: (0.1, 1.0) and (0.8, 1.25).
  config.data.crop_area = (0.08, 1.0)
  config.data.crop_aspect = (3 / 4, 4 / 3)
  # Image files with "grain": processes that decode ahead; 0: a thread per core
  # (None: 0 on up to 4 cores, else a process per core).
  config.data.num_workers = placeholder(int)
  # Image files with "dali": "cpu", or "gpu" to decode on the GPUs. On GPUs, set
  # XLA_FLAGS=--xla_gpu_enable_command_buffer= as DALI's examples do.
  config.data.decoder = "cpu"
  # "synthetic" only: images of a split, and classes (None: 1024 and 10).
  config.data.num_examples = placeholder(int)
  config.data.num_classes = placeholder(int)

  config.eval = ConfigDict()
  config.eval.every_epochs = 1
  # Images per step, over all devices.
  config.eval.batch_size = 500

  config.checkpoint = ConfigDict()
  # Minutes between checkpoints; one is written at the end in any case.
  config.checkpoint.every_minutes = 5.0
  # Optimiser updates between checkpoints; 0: only by the clock.
  config.checkpoint.every_steps = 0
  # How many of the newest are kept.
  config.checkpoint.keep = 2

  # At the end, load the export in a fresh process and let it predict.
  config.verify_export = False

  config.log = ConfigDict()
  # Optimiser updates between lines of training metrics.
  config.log.every_steps = 100

  config.parallel = ConfigDict()
  # Devices of this run, over all processes; 0: all. A CPU has as many as it has
  # cores (8 at most) if the batch divides by them, or JAX_NUM_CPU_DEVICES.
  config.parallel.num_devices = 0
  # "shard_map" or "pmap".
  config.parallel.mapping = "shard_map"
  # Seconds after which a process that is not heard of counts as dead, and ends
  # the others.
  config.parallel.heartbeat_seconds = 30
  # Folder for compiled programs; "auto": beside the workdir on accelerators
  # and none on a CPU, "": none.
  config.parallel.compilation_cache = "auto"

  # Runs before this one, in the order of their names: name -> {section: {field:
  # value}}, each a delta of this config in a sub-folder of its workdir. Each
  # starts from the last checkpoint of the one before, with a fresh optimiser;
  # config.init_from is for the first. "main" is a delta for the run itself.
  config.stages = ConfigDict()

  # Several runs in one: name -> {section: {field: value}}, each a delta of
  # this config in a workdir of its own below this one; a table and a figure of
  # all of them at the end.
  config.grid = ConfigDict()
  # How often the run, or every run of the grid, is made: NAME has the seed of
  # the config, NAME_seed1 the next one, and so on.
  config.trials = 1
  return config


def distillation(
  method: str,
  *,
  student: str = "resnet8x4",
  teacher: str = "resnet32x4",
  weights: dict[str, float],
  ramp_epochs: dict[str, float] | None = None,
  **fields,
) -> ConfigDict:
  """The base config with a method, its pair and the weights of its loss.

  Several methods: distillation("crd+dkd", weights={"ce": 1.0, "crd": 0.8,
  "dkd": 1.0}, k=4096, dkd={"beta": 2.0}).
  """
  config = get_config()
  config.student.name = student
  config.teacher.name = teacher
  config.distiller = ConfigDict({"name": method, **fields})
  config.loss_weights = ConfigDict(weights)
  config.loss_ramp_epochs = ConfigDict(ramp_epochs or {})
  return config


def imagenet(config: ConfigDict) -> ConfigDict:
  """Changes a config to ImageNet and SimKD's recipe for it.

  120 epochs at batch 256, rate 0.1 divided by ten after 30, 60 and 90, weight
  decay 1e-4; crops of 8 to 100 % of the area (torchvision's; SimKD's DALI
  pipeline takes 10 to 100 %).
  """
  config.data.name = "imagenet"
  config.data.dir = "../imagenet"
  config.data.pipeline = "grain"
  config.data.crop_padding = 0
  config.epochs = 120
  config.batch_size = 256
  config.optim.learning_rate = 0.1
  config.optim.milestones = (30, 60, 90)
  config.optim.weight_decay = 1e-4
  config.teacher.learning_rate = 0.1
  config.eval.batch_size = 256
  return config


def digits(config: ConfigDict, *, epochs: int) -> ConfigDict:
  """Changes a config to handwritten digits, at the scale of a CPU.

  scikit-learn's 1,797 digits, of which 1,437 train and 360 test; no download.
  """
  config.data.name = "digits"
  config.data.image_size = 16
  config.data.crop_padding = 2
  config.data.flip = False
  config.epochs = epochs
  config.optim.schedule = "cosine"
  config.optim.milestones = ()
  config.eval.batch_size = 360
  config.log.every_steps = 22
  config.teacher.epochs = 12
  return config


def finish(config: ConfigDict, arg: str) -> ConfigDict:
  """Applies the argument that follows a config file's colon.

  Args:
    config: the config.
    arg: words between commas: "smoke", which makes a run of seconds (small
      networks, small made-up images, two epochs), and on CIFAR-100 a preset of
      the method, see `kd_jax.runs.presets`.

  Returns:
    The config.

  Raises:
    ValueError: for any other argument, or a field that this file lacks.
  """
  _check_names(config)
  words = arg.split(",") if arg else []
  cifar = config.data.name == "cifar100" and not config.grid
  known = presets.of_method(config.distiller.name) if cifar else []
  chosen = [word for word in words if word != "smoke"]
  if len(chosen) > 1 or {*chosen} - {*known}:
    choice = f", or a preset ({', '.join(known)})" if known else ""
    raise ValueError(
      f"config argument: expected '' or 'smoke' (CONFIG.py:smoke){choice}, got"
      f" {arg!r}; fields are set with --config.FIELD=VALUE"
    )
  for name in chosen:
    presets.apply(config, name)
  if "smoke" in words:
    config.student.name = "resnet8"
    for run in (config, *config.grid.values()):
      if run.get("teacher", {}).get("name"):
        run.teacher.name = "resnet8x2"
      for stage in run.get("stages", {}).values():
        if "epochs" in stage:
          stage.epochs = 1
    config.data.name = "synthetic"
    config.data.resize = None
    config.data.image_size = 16
    config.data.num_examples = 64
    config.epochs = 2
    config.teacher.epochs = 2
    config.batch_size = 16
    config.optim.milestones = (1,)
    config.eval.batch_size = 64
    config.log.every_steps = 4
  return config


def _check_names(config: ConfigDict) -> None:
  """Finds misspelt fields; a method's own are checked by the method."""
  known = _all_fields()
  places = {"config": (config, known)}
  for name, section in known.items():
    if isinstance(section, ConfigDict) and name not in _FREE_FORM:
      places[f"config.{name}"] = (config[name], section)
  for place, (found, fields) in places.items():
    for name in found:
      if name not in fields:
        hint = registry.did_you_mean(name, fields)
        raise ValueError(
          f"{place}.{name}: no such field.{hint} The fields are:"
          f" {', '.join(fields)}"
        )
