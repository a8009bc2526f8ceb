"""launch.py: flags, exit codes, and mistakes in words.

Every mistake is found before anything is trained or written.
"""

import importlib.metadata
import logging
import os
import pathlib
import signal
import subprocess
import sys

import filelock
import pytest

from configs import base
from kd_jax import reporting
from kd_jax.distributed import launcher, processes
from kd_jax.reporting import report, runs
from kd_jax.runs import errors, grid, train

REPO = pathlib.Path(__file__).resolve().parent.parent
KD = f"{REPO}/configs/kd_cifar.py"
SMOKE = ("--config", f"{KD}:smoke")
QUICKSTART = ("--config", f"{REPO}/configs/quickstart.py:smoke")
TINY = (
  "--config.student.name=_tiny",
  "--config.teacher.name=_tiny_wide",
  "--config.parallel.num_devices=1",
)


@pytest.fixture
def nothing_happens(tmp_path, monkeypatch):
  """In an empty current folder, in which nothing may be trained or written."""
  monkeypatch.chdir(tmp_path)

  def refuse(*_):
    raise AssertionError("a run was started")

  monkeypatch.setattr(train.processes, "require_shared", refuse)
  yield
  assert list(tmp_path.rglob("*")) == []


@pytest.fixture
def trained(monkeypatch):
  """The arguments of the calls that would train."""
  calls = []
  monkeypatch.setattr(train, "train_and_evaluate", lambda *a: calls.append(a))
  return calls


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((), "name a config, as in --config configs/quickstart.py"),
    (("--config",), "Missing value for flag --config"),
    (
      ("--config", "configs/kd_cifa.py", "--config.seed=1"),
      "--config configs/kd_cifa.py: no such file. Did you mean"
      " configs/kd_cifar.py or",
    ),
    (
      ("--workdir=a/b.py", "--config=kd"),
      "--config kd: no such file. The configs are: configs/ab_cifar.py, ",
    ),
    (("--config", f"{KD}:smok"), "ValueError: config argument: expected ''"),
    (
      (*SMOKE, "--config.seed=1", "--config.optim.learning_rat=1"),
      "--config.optim.learning_rat=1: no such field. Did you mean"
      " learning_rate? config.optim has decay_rate, ",
    ),
    (
      (*SMOKE, "--config.optum.momentum", "2"),
      "--config.optum.momentum: no such field. Did you mean optim? config has",
    ),
    (
      (*SMOKE, "--config.distiller.xyzzy=2"),
      "--config.distiller.xyzzy=2: no such field. config.distiller has name,"
      " temperature",
    ),
    (
      (*SMOKE, "--config.distiller.standardize"),
      "no such field. It is one of kd: set it in the config file. config.disti",
    ),
    ((*SMOKE, "--noconfig.data.mean"), "config.data has crop_area, crop_aspe"),
    (
      (*SMOKE, "--config.optim.momentum.x=2"),
      "momentum.x=2: no such field. config.optim.momentum has no fields, it is"
      " 0.9",
    ),
    (
      (*QUICKSTART, "--config.grid.simkd.distiller.facto=4"),
      "no such field. Did you mean factor? config.grid.simkd.distiller has fac",
    ),
    ((*SMOKE, "--wrkdir=x"), "flag 'wrkdir'. Did you mean: workdir ?"),
    ((*SMOKE, "--config.epochs=many"), "flag --config.epochs=many: invalid"),
    ((*SMOKE, "--num_processes=2"), "--num_processes without --coordinator_a"),
    ((*QUICKSTART, "--shard=4/4"), "--shard: expected I/N with I from 0 to"),
    ((*SMOKE, "x", "y"), "unexpected arguments: x y"),
  ],
)
@pytest.mark.usefixtures("nothing_happens")
def test_wrong_flags_are_one_clear_line(arguments, words, launch, capsys):
  assert launch(*arguments) == 2
  output = capsys.readouterr()
  assert output.out == ""
  assert len(output.err.splitlines()) == 1
  assert output.err.startswith("launch.py: ")
  assert words in output.err


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ("student.name=resnet8x44", "'resnet8x44'. Did you mean resnet8x4 or "),
    ("teacher.name=wrn_40_3", "'wrn_40_3'. Did you mean wrn_40_2 or "),
    ("distiller.name=smikd", "unknown method 'smikd'. Did you mean simkd"),
    ("data.name=cifar-100", "'cifar-100'. Did you mean cifar100 or"),
    (
      "data.name=cifar10 data.dir=/none",
      "cifar10 has no option image_size",
    ),
    ("data.pipeline=grian", "'grian'. Did you mean grain?"),
    (
      "batch_size=18 parallel.num_devices=0",
      "config.batch_size: expected a multiple of 4 (4 devices x 1"
      " accumulate_steps), got 18. Take 16, or fewer devices with"
      " config.parallel.num_devices",
    ),
    (
      "parallel.num_devices=9",
      "config.parallel.num_devices: expected 0 (all) to 4 (cpu devices seen),"
      " got 9",
    ),
    ("parallel.mapping=xmap", "expected 'shard_map' or 'pmap', got 'xmap'"),
    (
      "teacher.checkpoint=/no/such",
      "config.teacher.checkpoint: /no/such does not exist: expected the workdir"
      " of a finished run or an export. Leave it empty to train the teacher",
    ),
    (
      "steps_per_dispatch=3",
      "expected a divisor of the 4 steps of an epoch, got 3. Near it: 1, 2, 4;",
    ),
    (
      "optim.schedule=cosin",
      "expected one of 'step', 'cosine', 'constant', got 'cosin'",
    ),
    (
      "fitnet_cifar distiller.hint_layer=stage9",
      "the student has no feature 'stage9'; it has",
    ),
    (
      "semckd_cifar batch_size=6",
      "semckd: expected a batch size divisible by 4 (its embeddings are a"
      " quarter as wide as the batch), got 6; change the batch size",
    ),
    ("simkd_cifar distiller.factor=0", "factor: expected 1 to "),
  ],
)
@pytest.mark.usefixtures("nothing_happens")
def test_bad_input(arguments, words, launch, capsys):
  first, *more = arguments.split()
  config = first if first.endswith("_cifar") else "kd_cifar"
  fields = more if first == config else [first, *more]
  given = [f"--config.{field}" for field in fields]
  named = [flag.partition("=")[0] for flag in given]
  given += [flag for flag in TINY if flag.partition("=")[0] not in named]
  assert launch("--config", f"{REPO}/configs/{config}.py:smoke", *given) == 2
  assert words in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_happens")
def test_missing_data(launch, capsys):
  assert launch("--config", KD, "--config.data.dir=/no/such") == 2
  assert "No cifar100 data: expected the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("section", "value", "words"),
  [
    (
      "loss_weights",
      {"ce": 1.0, "kdd": 0.5},
      "loss_weights: 'kdd' is not a term of this method; its terms are ce, kd",
    ),
    ("loss_weights", {"ce": 0.0}, "expected a weight above 0 for some term"),
    ("loss_ramp_epochs", {"kdd": 1.0}, r"config\.loss_ramp_epochs: .* 'kdd'"),
    (
      "distiller",
      {"name": "kd", "temprature": 2.0},
      "kd has no field 'temprature'. Did you mean temperature",
    ),
  ],
)
@pytest.mark.usefixtures("nothing_happens")
def test_bad_free_form_sections(section, value, words):
  weights = {"ce": 1.0, "kd": 1.0}
  config = base.distillation("kd", weights=weights, student="_tiny")
  config = base.finish(config, "smoke")
  config.teacher.name = "_tiny_wide"
  config.data.image_size = 8
  config.parallel.num_devices = 1
  config[section] = value
  with pytest.raises(ValueError, match=words):
    train.train_and_evaluate(config.lock(), "run")


def test_a_teacher_for_other_images(smoke_run, launch, capsys):
  teacher = smoke_run("simkd_cifar")
  assert (
    launch(
      *SMOKE,
      f"--config.teacher.checkpoint={teacher}",
      *("--config.teacher.name=resnet8", "--config.data.image_size=8"),
    )
    == 2
  )
  assert (
    "config.teacher.checkpoint: expected a teacher for images of [8, 8, 3], as"
    " the data has, got a simkd student for [16, 16, 3]"
  ) in capsys.readouterr().err


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_workdir_that_is_taken_or_finished(smoke_run, launch, capsys, caplog):
  workdir = smoke_run("kd_cifar")
  before = contents(workdir)
  arguments = (*SMOKE, "--config.parallel.num_devices=1")
  assert launch(*arguments, "--config.seed=1", f"--workdir={workdir}") == 2
  assert "\n  seed: 0 there, 1 here\n" in capsys.readouterr().err
  caplog.set_level(logging.INFO, "kd_jax")
  assert launch(*arguments, f"--workdir={workdir}") == 0
  assert f"{workdir} is finished: nothing to do" in caplog.text
  assert contents(workdir) == before


@pytest.mark.parametrize(
  ("config", "arguments", "workdir"),
  [
    ("kd_cifar.py", (), "runs/kd_cifar"),
    ("kd_cifar.py:smoke", (), "runs/kd_cifar_smoke"),
    ("kd_cifar.py:smoke", ("--workdir=x/y",), "x/y"),
  ],
)
def test_workdir(config, arguments, workdir, launch, trained):
  assert launch("--config", f"{REPO}/configs/{config}", *arguments) == 0
  ((settled, folder),) = trained
  assert folder == workdir
  assert settled.distiller.name == "kd"


def test_overrides_arrive(launch, trained):
  assert not launch(
    *SMOKE,
    *("--config.optim.learning_rate=0.25", "--config.optim.milestones=(1,2)"),
    *("--config.teacher.checkpoint=x", "--noconfig.data.flip"),
    "--config.distiller.temperature=2",
  )
  ((config, _),) = trained
  assert config.optim.learning_rate == 0.25
  assert config.optim.milestones == (1, 2)
  assert config.teacher.checkpoint == "x"
  assert config.data.flip is False
  assert config.distiller.temperature == 2.0
  assert config.is_locked


ARRAY = {"COUNT": "3", "ID": "7", "MIN": "3", "STEP": "2"}


@pytest.mark.parametrize(
  ("text", "array", "expected"),
  [
    (None, {}, (0, 1)),
    ("1/4", ARRAY, (1, 4)),
    (None, ARRAY, (2, 3)),
    (None, {**ARRAY, "ID": "6"}, None),
    (None, {**ARRAY, "ID": "9"}, None),
    ("4/4", {}, None),
    ("1", {}, None),
    ("-1/4", {}, None),
  ],
)
def test_parse_shard(text, array, expected):
  environ = {f"SLURM_ARRAY_TASK_{k}": v for k, v in array.items()}
  if expected is not None:
    assert launcher.parse_shard(text, environ) == expected
    return
  with pytest.raises(ValueError, match="--shard"):
    launcher.parse_shard(text, environ)


@pytest.mark.parametrize("fails", [False, True])
def test_a_grid_is_run_by_shards_and_reported(
  fails, launch, monkeypatch, write, tmp_path, capsys
):
  write(tmp_path / "kd", 50.0)
  calls = []

  def run(config, workdir, *, shard):
    del config
    calls.append((workdir, shard))
    if fails:
      raise errors.CellsFailedError("1 of 2 cells failed")

  monkeypatch.setattr(grid, "run_grid", run)
  monkeypatch.setattr(
    report, "write_report", lambda *_: ("table", ["report.html"])
  )
  monkeypatch.setattr(runs, "find_runs", lambda _: [tmp_path / "kd"])
  code = launch(*QUICKSTART, f"--workdir={tmp_path}", "--shard=1/2")
  assert calls == [(str(tmp_path), (1, 2))]
  output = capsys.readouterr()
  assert "shard 1/2" in output.out and "\ntable\nreport.html" in output.out
  assert code == fails
  assert ("1 of 2 cells failed" in output.err) == fails


def test_a_grid_without_the_extra_report_ends_well(
  launch, monkeypatch, write, tmp_path, capsys
):
  write(tmp_path / "kd", 50.0)
  monkeypatch.setattr(reporting, "_PACKAGES", ("no_such_package",))
  monkeypatch.setattr(grid, "run_grid", lambda *_, **__: print("training"))
  assert launch(*QUICKSTART, f"--workdir={tmp_path}") == 0
  first, second = capsys.readouterr().out.splitlines()
  assert "no_such_package: pip install 'kd_jax[report]', then" in first
  assert second == "training"


@pytest.mark.usefixtures("nothing_happens")
def test_one_run_has_no_shards(launch, capsys):
  assert launch(*SMOKE, "--shard=0/2") == 2
  assert "--shard: expected a config with several runs" in (
    capsys.readouterr().err
  )


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (errors.PreemptedError("stopped by SIGTERM at step 3"), 75),
    (errors.UnsavedError("step 3 could not be saved"), 1),
    (errors.NonFiniteLossError("step 3: the loss is not finite"), 1),
    (ImportError("tfds needs tensorflow"), 2),
  ],
)
def test_the_end_of_a_run_in_words(error, code, launch, monkeypatch, capsys):
  def stop(*_):
    raise error

  monkeypatch.setattr(train, "train_and_evaluate", stop)
  assert launch(*SMOKE) == code
  (line,) = capsys.readouterr().err.splitlines()
  assert line.endswith(str(error))


def test_a_fault_keeps_its_traceback(launch, monkeypatch):
  def fail(*_):
    raise KeyError("fault")

  monkeypatch.setattr(train, "train_and_evaluate", fail)
  with pytest.raises(KeyError, match="fault"):
    launch(*SMOKE)


def test_stopped_while_another_trains_the_teacher(
  launch, monkeypatch, tmp_path, capfd
):
  """There is nothing to save."""
  before = signal.getsignal(signal.SIGTERM)

  acquire = filelock.FileLock.acquire

  def held(self, *args, **options):
    if "teachers" in self.lock_file:
      raise filelock.Timeout("held")
    return acquire(self, *args, **options)

  monkeypatch.setattr(filelock.FileLock, "acquire", held)
  monkeypatch.setattr(
    processes.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM)
  )
  monkeypatch.setattr(os, "_exit", sys.exit)
  assert launch(*SMOKE, *TINY, f"--workdir={tmp_path / 'run'}") == 75
  assert "launch.py: stopped by SIGTERM." in capfd.readouterr().err
  assert not (tmp_path / "run" / "checkpoints").exists()
  assert signal.getsignal(signal.SIGTERM) == before


def test_local_processes_get_the_other_flags(launch, monkeypatch):
  commands = []
  monkeypatch.setattr(
    launcher.subprocess, "Popen", lambda command, **_: commands.append(command)
  )
  monkeypatch.setattr(launcher, "_wait", lambda _: 75)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  with pytest.raises(AttributeError):  # there is no process to look after
    launch(*SMOKE, "--local_processes", "1", "--workdir=x")
  (command,) = commands
  assert command[0] == sys.executable and command[1].endswith("launch.py")
  assert command[2:5] == [*SMOKE, "--workdir=x"]
  assert command[6:] == ["--num_processes=1", "--process_id=0"]


def test_devices_that_cannot_be_shared_out(launch, monkeypatch, capsys):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
  assert launch(*SMOKE, "--local_processes=2") == 2
  assert "--local_processes: expected a divisor of" in capsys.readouterr().err


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
  platforms, jaxlib, before, after, monkeypatch
):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  monkeypatch.setenv("XLA_FLAGS", before)
  monkeypatch.setattr(importlib.metadata, "version", lambda _: jaxlib)
  monkeypatch.setattr(launcher.glob, "glob", lambda _: ["/dev/nvidia0"])
  launcher.set_xla_flags()
  assert os.environ["XLA_FLAGS"] == after
