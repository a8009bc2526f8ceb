"""The test session: four CPU devices, fast compilation, golden values."""

import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs run for milliseconds: compiling them fast is what counts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # Compiles in half the time. XLA does not start with a flag unknown to it.
  flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_cpu_use_fusion_emitters=false",
  ]
  os.environ["XLA_FLAGS"] = " ".join(flags)

import filelock
import golden_models
import hypothesis
import jax
import pytest

# Tracing makes many objects, and little garbage: looking for it among all that
# JAX keeps takes a tenth of the time.
gc.set_threshold(50_000, 20, 50)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "allow")
# The same examples each time; scripts/fuzz.py tries others.
hypothesis.settings.register_profile(
  "suite", derandomize=True, deadline=None, max_examples=100
)
hypothesis.settings.load_profile("suite")

REPO = pathlib.Path(__file__).resolve().parent.parent


def _load_rebuild():
  path = golden_models.FOLDER / "rebuild.py"
  if not path.exists():  # the naming scheme is part of the layout
    path = golden_models.OWN / "rebuild.py"
  spec = importlib.util.spec_from_file_location("golden_rebuild", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """The folder of golden values (KD_JAX_GOLDEN, else tests/golden)."""
  return golden_models.FOLDER


@pytest.fixture(scope="session")
def rebuild():
  """`rebuild.py` of the golden folder: tensors from their names."""
  return _load_rebuild()


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
  """The repository's top level."""
  return REPO


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> pathlib.Path:
  """One folder for all of xdist's workers."""
  folder = tmp_path_factory.getbasetemp()
  return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture
def smoke_run(session_folder):
  """smoke_run("kd_cifar") -> workdir of the finished `:smoke` run.

  Each run is made once for all tests, and by one of xdist's workers for all.
  They lie beside each other, so that they share a teacher.
  """
  from kd_jax.runs import grid, train

  root = session_folder / "smoke"
  root.mkdir(exist_ok=True)

  def make(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config("smoke").lock()
    config.parallel.num_devices = 1
    if config.teacher.name and name != "kd_cifar":
      make("kd_cifar")  # and with it the teacher
    with filelock.FileLock(root / f"{name}.lock"):
      run = grid.run_grid if config.grid else train.train_and_evaluate
      if not (root / name / "done").exists():
        run(config, str(root / name))
        (root / name / "done").touch()
    return root / name

  return make


@pytest.fixture
def write():
  """write(folder, top1, **more): a finished run that nobody has trained."""
  from configs import kd_cifar, teacher_cifar
  from kd_jax.runs import identity

  def make(folder, top1, *, age=0, evals=2, changes=None, **fields):
    """A run of that many evaluations, `age` seconds old.

    `changes` are to its config, `fields` to its result.
    """
    final = {"top1": top1, "top5": 90.0, "ce": 1.5, "epoch": 3}
    result = {
      "final": final,
      "best": {**final, "top1": top1 + 1.25, "epoch": 2},
      "student": "resnet8x4",
      "teacher": {},
      "method": "none",
      "seed": 0,
      "parameters": 78042,
      "distiller_parameters": 0,
      "seconds": 12.34,
      "hardware": "1 x CPU",
      **fields,
    }
    teachers = result["teacher"] or []
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
      teacher.setdefault("checkpoint", "somewhere")
    module = teacher_cifar if result["method"] == "none" else kd_cifar
    config = {
      **identity.as_json(module.get_config()),
      "student": {"name": result["student"]},
      "seed": result["seed"],
      **(changes or {}),
    }
    lines = [
      {
        **{"step": 8 * e, "kind": "eval", "epoch": e},
        "ce": 2.0 / e + result["seed"],
        "top1": 10.0 * e + result["seed"],
      }
      for e in range(1, evals + 1)
    ]
    lines.insert(1, {"step": 4, "kind": "train", "loss": 5.0, "epoch": 0.5})
    folder.mkdir(parents=True)
    for name, content in (("config", config), ("result", result)):
      (folder / f"{name}.json").write_text(json.dumps(content))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    os.utime(folder / "result.json", (1e9 - age, 1e9 - age))

  return make


@pytest.fixture
def run_main(monkeypatch):
  """Runs a module's `main` with arguments, and returns its exit code."""

  def run(module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
      module.main()
    except SystemExit as stop:
      return stop.code
    return 0

  return run


def _load_launch():
  """launch.py as a module: its flags can be defined only once."""
  if "launch" not in sys.modules:
    spec = importlib.util.spec_from_file_location("launch", REPO / "launch.py")
    sys.modules["launch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["launch"])
  return sys.modules["launch"]


@pytest.fixture
def parse_launch(monkeypatch):
  """parse_launch("--config", ...) -> the config that launch.py would run."""
  from absl import flags

  module = _load_launch()

  def forget_overrides():
    for name in list(flags.FLAGS):
      if name.startswith("config."):
        delattr(flags.FLAGS, name)

  def parse(*arguments):
    argv = ["launch.py", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    forget_overrides()
    flags.FLAGS.unparse_flags()
    for name in (
      *("config", "workdir", "coordinator_address", "num_processes"),
      *("process_id", "local_processes", "shard"),
    ):
      flags.FLAGS[name].unparse()
    with warnings.catch_warnings():
      # How ml_collections loads a file.
      warnings.filterwarnings("ignore", r"the load_module\(\) method")
      assert module.parse(argv) == argv[:1]
    return flags.FLAGS.config

  yield parse
  forget_overrides()


@pytest.fixture
def launch(parse_launch):
  """launch("--config", ...) -> the exit code of launch.py, run in here."""

  def run(*arguments):
    try:
      parse_launch(*arguments)
      _load_launch().main([])
    except SystemExit as stop:
      return stop.code
    return 0

  return run
