"""launch.py: flags, exit codes, and every bad input that the issue names.

Whatever is wrong is said in words, before anything is trained or written.
"""

import importlib.metadata
import logging
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import filelock
import numpy as np
import pytest

from configs import base
from kd_jax.distributed import launcher, processes
from kd_jax.runs import errors, grid, train

REPO = pathlib.Path(__file__).resolve().parent.parent
KD = f"{REPO}/configs/kd_cifar.py"
SMOKE = ("--config", f"{KD}:smoke")
TINY = ("--config.student.name=_tiny", "--config.teacher.name=_tiny_wide")


@pytest.fixture
def nothing_happens(tmp_path, monkeypatch):
  """In an empty current folder, in which nothing may be trained or written."""
  monkeypatch.chdir(tmp_path)

  def refuse(self):
    raise AssertionError("a run was started")

  monkeypatch.setattr(train.Run, "train", refuse)
  yield
  assert list(tmp_path.rglob("*")) == []


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FLAGS = {
  "no config": ((), "name a config, as in --config configs/quickstart.py"),
  "no value": (("--config",), "Missing value for flag --config"),
  "no such config": (
    ("--config", "configs/kd_cifa.py", "--config.seed=1"),
    "--config configs/kd_cifa.py: no such file. Did you mean"
    " configs/kd_cifar.py or",
  ),
  "not a file": (
    ("--workdir=a/b.py", "--config=kd"),
    "--config kd: no such file. The configs are: configs/at_cifar.py, ",
  ),
  "argument": (
    ("--config", f"{KD}:smok"),
    "ValueError: config argument: expected '' or 'smoke' (CONFIG.py:smoke), got"
    " 'smok'; fields are set with --config.FIELD=VALUE",
  ),
  "field": (
    (*SMOKE, "--config.optim.learning_rat=1"),
    "--config.optim.learning_rat=1: no such field. Did you mean"
    ' "learning_rate" instead of "learning_rat"?',
  ),
  "field of the method": (
    (*SMOKE, "--config.distiller.temprature=2"),
    "--config.distiller.temprature=2: no such field. Did you mean"
    ' "temperature" instead of "temprature"?',
  ),
  "section": (
    (*SMOKE, "--config.optum.momentum=2"),
    '--config.optum.momentum=2: no such field. Did you mean "optim" instead of',
  ),
  "field like no other": (
    (*SMOKE, "--config.distiller.xyzzy=2"),
    "--config.distiller.xyzzy=2: no such field. Fields are those of"
    " configs/base.py and of the config file",
  ),
  "below a field": (
    (*SMOKE, "--config.optim.momentum.x=2"),
    "--config.optim.momentum.x=2: no such field.",
  ),
  "field of a cell": (
    (
      *("--config", f"{REPO}/configs/quickstart.py"),
      "--config.grid.simkd.distiller.facto=4",
    ),
    'no such field. Did you mean "factor" instead of "facto"?',
  ),
  "flag": (
    (*SMOKE, "--wrkdir=x"),
    "Unknown command line flag 'wrkdir'. Did you mean: workdir ?",
  ),
  "type": (
    (*SMOKE, "--config.epochs=many"),
    "flag --config.epochs=many: invalid literal for int() with base 10: 'many'",
  ),
  "some of three": (
    (*SMOKE, "--num_processes=2"),
    "--num_processes without --coordinator_address, --process_id: expected all",
  ),
  "both kinds": (
    (*SMOKE, "--local_processes=2", "--process_id=0"),
    "--local_processes starts all processes itself: leave out --process_id",
  ),
  "positional": ((*SMOKE, "x", "y"), "unexpected arguments: x y"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flags_are_one_clear_line(case, launch, nothing_happens, capsys):
  arguments, words = FLAGS[case]
  assert launch(*arguments) == 2
  output = capsys.readouterr()
  assert output.out == ""
  assert len(output.err.splitlines()) == 1
  assert output.err.startswith("launch.py: ")
  assert words in output.err


BAD = {
  "model": (
    ["--config.student.name=resnet8x44"],
    "unknown model 'resnet8x44'. Did you mean resnet8x4 or ",
  ),
  "teacher": (
    ["--config.teacher.name=wrn_40_3"],
    "unknown model 'wrn_40_3'. Did you mean wrn_40_2 or ",
  ),
  "method": (
    ["--config.distiller.name=smikd"],
    "unknown method 'smikd'. Did you mean simkd",
  ),
  "data set": (
    ["--config.data.name=cifar-100"],
    "unknown data set 'cifar-100'. Did you mean cifar100 or",
  ),
  "pipeline": (
    ["--config.data.pipeline=grian"],
    "unknown pipeline 'grian'. Did you mean grain?",
  ),
  "devices": (
    ["--config.batch_size=18", "--config.parallel.num_devices=0"],
    "config.batch_size: expected a multiple of 4 (4 devices x 1"
    " accumulate_steps), got 18. Take 16, or fewer devices with"
    " config.parallel.num_devices",
  ),
  "number of devices": (
    ["--config.parallel.num_devices=9"],
    "config.parallel.num_devices: expected 0 (all) to 4 (cpu devices seen), got"
    " 9",
  ),
  "mapping": (
    ["--config.parallel.mapping=xmap"],
    "config.parallel.mapping: expected 'shard_map' or 'pmap', got 'xmap'",
  ),
  "no such checkpoint": (
    ["--config.teacher.checkpoint=/no/such"],
    "config.teacher.checkpoint: /no/such does not exist: expected the workdir"
    " of a finished run or an export. Leave it empty to train the teacher"
    " first",
  ),
  "dispatch": (
    ["--config.steps_per_dispatch=3"],
    "config.steps_per_dispatch: expected a divisor of the 4 steps of an epoch,"
    " got 3. Near it: 1, 2, 4; 0 settles it",
  ),
  "schedule": (
    ["--config.optim.schedule=cosin"],
    "config.optim.schedule: expected one of 'step', 'cosine', 'constant', got"
    " 'cosin'",
  ),
  "hint layer": (
    [
      *("--config", f"{REPO}/configs/fitnet_cifar.py:smoke"),
      "--config.distiller.hint_layer=stage9",
    ],
    "the student has no feature 'stage9'; it has stem_preact, stem, stage1",
  ),
  "semckd": (
    [
      *("--config", f"{REPO}/configs/semckd_cifar.py:smoke"),
      *("--config.batch_size=6", "--config.parallel.num_devices=1"),
    ],
    "semckd: expected a batch size divisible by 4 (its embeddings are a quarter"
    " as wide as the batch), got 6; change the batch size",
  ),
  "factor": (
    [
      *("--config", f"{REPO}/configs/simkd_cifar.py:smoke"),
      "--config.distiller.factor=0",
    ],
    "factor: expected 1 to ",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, launch, nothing_happens, capsys):
  arguments, words = BAD[case]
  if "--config" not in arguments:
    arguments = [*SMOKE, *arguments]
  named = [a.partition("=")[0] for a in arguments]
  tiny = [a for a in TINY if a.partition("=")[0] not in named]
  if "--config.parallel.num_devices" not in named:
    tiny.append("--config.parallel.num_devices=1")
  assert launch(*arguments, *tiny) == 2
  assert words in capsys.readouterr().err


def tiny_config():
  weights = {"ce": 1.0, "kd": 1.0}
  config = base.distillation("kd", weights=weights, student="_tiny")
  config = base.finish(config, "smoke")
  config.student.name, config.teacher.name = "_tiny", "_tiny_wide"
  config.data.image_size = 8
  config.parallel.num_devices = 1
  return config


@pytest.mark.parametrize(
  ("section", "value", "words"),
  [
    (
      "loss_weights",
      {"ce": 1.0, "kdd": 0.5},
      "loss_weights: 'kdd' is not a term of this method; its terms are ce, kd",
    ),
    ("loss_weights", {"ce": 0.0}, "at least one weight other than 0"),
    ("loss_ramp_epochs", {"kdd": 1.0}, r"config\.loss_ramp_epochs: .* 'kdd'"),
    (
      "distiller",
      {"name": "kd", "temprature": 2.0},
      "kd has no field 'temprature'. Did you mean temperature",
    ),
  ],
)
def test_bad_free_form_sections(section, value, words, nothing_happens):
  config = tiny_config()
  config[section] = value
  with pytest.raises(ValueError, match=words):
    train.train_and_evaluate(config.lock(), "run")


def cifar(folder, *, labels=None, cut=None):
  """CIFAR-10 in the publisher's layout, of 20 images a file."""
  folder = folder / "cifar-10-batches-py"
  folder.mkdir()
  names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
  rng = np.random.default_rng(0)
  for name in names:
    content = {
      "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
      "labels": labels or [i % 10 for i in range(20)],
    }
    (folder / name).write_bytes(pickle.dumps(content, protocol=2))
  meta = {"label_names": [f"class {i}" for i in range(10)]}
  (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
  if cut:
    path = folder / cut
    path.write_bytes(path.read_bytes()[:-3000])


DATA = {
  "missing": (
    None,
    [
      "No cifar10 data: expected the folder cifar-10-batches-py or the file"
      " cifar-10-python.tar.gz in ",
      "Either download cifar-10-python.tar.gz",
      "or name the folder that has it with --config.data.dir=FOLDER",
      "or use the source tfds:cifar10",
    ],
  ),
  "cut short": ({"cut": "data_batch_3"}, ["data_batch_3", "cut short"]),
  "labels": (
    {"labels": [0] * 19 + [10]},
    ["must be in 0..9 (10 classes), got 10 at position 19"],
  ),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case, launch, nothing_happens, capsys, tmp_path_factory):
  given, words = DATA[case]
  folder = tmp_path_factory.mktemp("data")
  if given is not None:
    cifar(folder, **given)
  code = launch(
    *("--config", KD, "--config.data.name=cifar10"),
    f"--config.data.dir={folder}",
  )
  assert code == 2
  error = capsys.readouterr().err
  assert [word for word in words if word not in error] == []


def test_good_data_gets_as_far_as_training(tmp_path, monkeypatch, launch):
  """The data of `test_bad_data` fails for its fault alone."""
  cifar(tmp_path)
  monkeypatch.setattr(train.Run, "train", lambda self: {"steps": 0})
  assert not launch(
    *("--config", KD, "--config.data.name=cifar10", *TINY),
    *(f"--config.data.dir={tmp_path}", f"--workdir={tmp_path / 'run'}"),
    "--config.parallel.num_devices=1",
  )
  assert (tmp_path / "run" / "config.json").exists()


# Before `nothing_happens` in a test's arguments: they may have to be trained.


@pytest.fixture
def kd_run(smoke_run):
  return smoke_run("kd_cifar")


@pytest.fixture
def simkd_run(smoke_run):
  return smoke_run("simkd_cifar")


@pytest.fixture
def plain_run(smoke_run):
  return smoke_run("teacher_cifar")


def teacher_arguments(checkpoint, *extra):
  return (*SMOKE, f"--config.teacher.checkpoint={checkpoint}", *extra)


def test_teacher_of_another_class_count(
  plain_run, launch, nothing_happens, capsys
):
  arguments = teacher_arguments(
    plain_run, "--config.teacher.name=resnet8", "--config.data.num_classes=5"
  )
  assert launch(*arguments) == 2
  assert (
    "config.teacher.checkpoint: expected a teacher of 5 classes, as the data"
    f" has, got 10 in {plain_run}, trained on synthetic. Name a teacher of this"
    " data set, or set config.data.name"
  ) in capsys.readouterr().err


def test_weights_of_another_model(plain_run, launch, nothing_happens, capsys):
  assert launch(*teacher_arguments(plain_run)) == 2
  assert (
    "config.teacher.checkpoint: expected weights of resnet8x2"
    f" (config.teacher.name), got resnet8 in {plain_run}. Set"
    " --config.teacher.name=resnet8, or leave the name empty"
  ) in capsys.readouterr().err


def test_simkd_student_teaches_at_its_own_image_size_only(
  simkd_run, launch, nothing_happens, capsys
):
  arguments = teacher_arguments(
    simkd_run, "--config.teacher.name=resnet8", "--config.data.image_size=8"
  )
  assert launch(*arguments) == 2
  assert (
    "config.teacher.checkpoint: expected a teacher for images of [8, 8, 3], as"
    " the data has, got a simkd student for [16, 16, 3]"
  ) in capsys.readouterr().err


def test_unfinished_run_is_no_teacher(
  tmp_path_factory, launch, nothing_happens, capsys
):
  unfinished = tmp_path_factory.mktemp("unfinished")
  (unfinished / "config.json").write_text("{}")
  assert launch(*teacher_arguments(unfinished)) == 2
  error = capsys.readouterr().err
  assert f"{unfinished} holds a run that is not finished" in error
  assert f"python -m kd_jax export --workdir {unfinished} --to DIR" in error


def test_folder_of_nothing_is_no_teacher(
  tmp_path_factory, launch, nothing_happens, capsys
):
  empty = tmp_path_factory.mktemp("empty")
  assert launch(*teacher_arguments(empty)) == 2
  assert (
    f"{empty}: expected the workdir of a finished run (config.json) or an"
    " export (model.json), got a folder with neither"
  ) in capsys.readouterr().err


def test_workdir_of_another_config(kd_run, launch, nothing_happens, capsys):
  before = contents(kd_run)
  assert launch(*SMOKE, "--config.seed=1", f"--workdir={kd_run}") == 2
  error = capsys.readouterr().err
  assert f"{kd_run} holds a run of another config:\n" in error
  assert "\n  seed: 0 there, 1 here\n" in error
  assert "\nNothing was changed. Give another --workdir, or" in error
  assert contents(kd_run) == before


def test_finished_run_is_left_alone(kd_run, launch, nothing_happens, caplog):
  before = contents(kd_run)
  caplog.set_level(logging.INFO, "kd_jax")
  assert launch(*SMOKE, f"--workdir={kd_run}") == 0
  assert f"{kd_run} is finished: nothing to do" in caplog.text
  assert contents(kd_run) == before


@pytest.mark.parametrize(
  ("config", "flags", "workdir"),
  [
    ("kd_cifar.py", (), "runs/kd_cifar"),
    ("kd_cifar.py:smoke", (), "runs/kd_cifar_smoke"),
    ("kd_cifar.py:smoke", ("--workdir=x/y",), "x/y"),
  ],
)
def test_workdir(config, flags, workdir, launch, monkeypatch):
  calls = []
  monkeypatch.setattr(train, "train_and_evaluate", lambda *a: calls.append(a))
  assert launch("--config", f"{REPO}/configs/{config}", *flags) == 0
  ((settled, folder),) = calls
  assert folder == workdir
  assert settled.distiller.name == "kd"


def test_overrides_arrive(launch, monkeypatch):
  calls = []
  monkeypatch.setattr(train, "train_and_evaluate", lambda *a: calls.append(a))
  assert not launch(
    *SMOKE,
    *("--config.optim.learning_rate=0.25", "--config.optim.milestones=(1,2)"),
    *("--config.teacher.checkpoint=x", "--noconfig.data.flip"),
    "--config.distiller.temperature=2",
  )
  ((config, _),) = calls
  assert config.optim.learning_rate == 0.25
  assert config.optim.milestones == (1, 2)
  assert config.teacher.checkpoint == "x"
  assert config.data.flip is False
  assert config.distiller.temperature == 2.0
  assert config.is_locked


def test_a_grid_goes_to_the_grid(launch, monkeypatch):
  calls = []
  monkeypatch.setattr(grid, "run_grid", lambda *a: calls.append(a))
  assert not launch("--config", f"{REPO}/configs/quickstart.py:smoke")
  assert calls[0][1] == "runs/quickstart_smoke"


def test_a_stopped_run_may_be_requeued(launch, monkeypatch, capsys):
  def stop(*_):
    raise errors.PreemptedError("stopped by SIGTERM at step 3")

  monkeypatch.setattr(train, "train_and_evaluate", stop)
  assert launch(*SMOKE) == 75
  assert "stopped by SIGTERM at step 3" in capsys.readouterr().err


def test_a_run_that_could_not_save_has_failed(launch, monkeypatch, capsys):
  def stop(*_):
    raise errors.UnsavedError("step 3 could not be saved")

  monkeypatch.setattr(train, "train_and_evaluate", stop)
  assert launch(*SMOKE) == 1
  assert capsys.readouterr().err == "UnsavedError: step 3 could not be saved\n"


def test_stopped_while_another_trains_the_teacher(
  launch, monkeypatch, tmp_path, capsys
):
  """There is nothing to save, and the rest is done again."""
  before = signal.getsignal(signal.SIGTERM)

  def held(*_, **__):
    raise filelock.Timeout("held")

  monkeypatch.setattr(filelock.FileLock, "acquire", held)
  monkeypatch.setattr(
    processes.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM)
  )
  arguments = (*SMOKE, *TINY, "--config.parallel.num_devices=1")
  assert launch(*arguments, f"--workdir={tmp_path / 'run'}") == 75
  said = "launch.py: stopped by SIGTERM: the same command goes on\n"
  assert capsys.readouterr().err.endswith(said)
  assert not (tmp_path / "run" / "checkpoints").exists()
  assert signal.getsignal(signal.SIGTERM) == before


def test_local_processes_get_the_other_flags(launch, monkeypatch):
  calls = []
  monkeypatch.setattr(launcher, "start_local", lambda *a: calls.append(a) or 75)
  assert launch(*SMOKE, "--local_processes", "2", "--workdir=x") == 75
  ((count, command),) = calls
  assert count == 2
  assert command[0] == sys.executable and command[1].endswith("launch.py")
  assert command[2:] == [*SMOKE, "--workdir=x"]


def test_devices_that_cannot_be_shared_out(launch, monkeypatch, capsys):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
  assert launch(*SMOKE, "--local_processes=2") == 2
  error = capsys.readouterr().err
  assert error.startswith("launch.py: --local_processes: expected a divisor of")


def test_real_process(tmp_path):
  process = subprocess.run(
    [
      *(sys.executable, str(REPO / "launch.py"), "--config", f"{KD}:smoke"),
      *(f"--workdir={tmp_path / 'run'}", "--config.student.name=resnet88"),
    ],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 2, process.stderr
  assert "Traceback" not in process.stderr
  assert "unknown model 'resnet88'. Did you mean resnet8" in process.stderr
  assert list(tmp_path.iterdir()) == []


ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"


@pytest.mark.parametrize(
  ("platforms", "jaxlib", "before", "after"),
  [
    ("cpu", "0.10.2", "", f"{ORDER}=false"),
    ("cpu", "0.12.0", "--xla_dump_to=d", f"--xla_dump_to=d {ORDER}=false"),
    ("cpu", "0.10.2", f"{ORDER}=true", f"{ORDER}=true"),
    ("cpu", "0.9.2", "", ""),
    ("cpu", "0.13.0", "", ""),
    ("cuda", "0.10.2", "", ""),
  ],
)
def test_a_cpus_operations_are_ordered(
  platforms, jaxlib, before, after, monkeypatch, launch
):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  monkeypatch.setenv("XLA_FLAGS", before)
  version = importlib.metadata.version
  monkeypatch.setattr(
    importlib.metadata,
    "version",
    lambda name: jaxlib if name == "jaxlib" else version(name),
  )
  monkeypatch.setattr(pathlib.Path, "exists", lambda self: True)  # a GPU
  launch()  # loads the module
  sys.modules["launch"].order_cpu_operations()
  assert os.environ["XLA_FLAGS"] == after
