"""The requirements, pyproject.toml and .ci/run agree with each other."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import kd_jax

REPO = pathlib.Path(__file__).resolve().parent.parent
FILES = ("requirements.txt", "requirements-cpu.txt", "requirements-test.txt")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Modules of packages that the tests' environment does not hold.
NOT_INSTALLED = {"nvidia": "nvidia-dali-cuda120", "torch": "torch"}
# Prepares a TFDS data set where the user has it; nothing else needs it.
UNDECLARED = {"tensorflow"}


def lines(file: str) -> list[str]:
  """A requirements file's lines without comments, -r lines followed."""
  found = []
  for line in (REPO / file).read_text().splitlines():
    line = line.partition("#")[0].strip()
    if line.startswith("-r "):
      found += lines(line.removeprefix("-r "))
    elif line:
      found.append(line)
  return found


def pins(file: str) -> dict[str, Version]:
  """Package -> version of a requirements file."""
  found = {}
  for line in lines(file):
    requirement = Requirement(line)
    name = canonicalize_name(requirement.name)
    assert name not in found, f"{file} names {name} twice"
    found[name] = Version(str(requirement.specifier).removeprefix("=="))
  return found


def specifiers(requirements: list[str]) -> dict[str, Requirement]:
  parsed = map(Requirement, requirements)
  return {canonicalize_name(item.name): item for item in parsed}


CORE = specifiers(PROJECT["dependencies"])


@pytest.mark.parametrize("file", FILES)
def test_every_line_is_an_exact_pin(file):
  assert len(lines(file)) >= 10
  for line in lines(file):
    assert re.fullmatch(r"[A-Za-z0-9_-]+(\[\w+\])?==\d+(\.\d+)+", line), line


def test_files_agree():
  cpu, cluster, test = (
    pins(f"requirements{kind}.txt") for kind in ("-cpu", "", "-test")
  )
  assert cpu.items() <= test.items()
  assert cpu.items() <= cluster.items()
  for name in cluster.keys() & test.keys():
    assert cluster[name] == test[name], name


def test_pyproject_names_what_the_files_pin():
  def names(*extras):
    return {*CORE, *(n for e in extras for n in specifiers(EXTRAS[e]))}

  assert set(EXTRAS) == {"cuda12", "dali", "tfds", "torch", "test"}
  assert names() == set(pins("requirements-cpu.txt"))
  assert names("cuda12", "dali", "tfds") == set(pins("requirements.txt"))
  assert names("test") == set(pins("requirements-test.txt"))


@pytest.mark.parametrize("file", FILES)
def test_pyproject_admits_the_pins(file):
  bounds = [CORE, *(specifiers(extra) for extra in EXTRAS.values())]
  for name, version in pins(file).items():
    for bound in bounds:
      if name in bound:
        assert bound[name].specifier.contains(version), bound[name]


def imported_modules(folder: pathlib.Path) -> set[str]:
  """Top-level names that the files of a folder import, wherever they do."""
  found = set()
  paths = folder.rglob("*.py") if folder.is_dir() else [folder]
  for path in paths:
    if "golden" in path.parts:
      continue
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
      if isinstance(node, ast.Import):
        found.update(alias.name.partition(".")[0] for alias in node.names)
      elif isinstance(node, ast.ImportFrom) and not node.level:
        found.add(node.module.partition(".")[0])
  return found


@pytest.mark.parametrize(
  "folder", ["kd_jax", "configs", "launch.py", "benchmarks", "tests"]
)
def test_every_import_is_declared(folder):
  own = {path.stem for path in REPO.iterdir()} | set(sys.stdlib_module_names)
  modules = imported_modules(REPO / folder) - own - UNDECLARED
  if folder == "tests":
    declared = set(pins("requirements-test.txt"))
  else:
    runtime = (EXTRAS[e] for e in ("cuda12", "dali", "tfds", "torch"))
    declared = {*CORE, *(n for extra in runtime for n in specifiers(extra))}
  owners = importlib.metadata.packages_distributions()
  for module in modules:
    distributions = owners.get(module, [NOT_INSTALLED.get(module, module)])
    assert {canonicalize_name(name) for name in distributions} & declared, (
      f"{folder} imports {module}, of {distributions}: declare it in"
      " pyproject.toml and pin it in the requirements files"
    )


def test_every_folder_of_the_package_is_a_package():
  folders = {path.parent for path in (REPO / "kd_jax").rglob("*.py")}
  assert len(folders) >= 6
  for folder in folders:
    assert (folder / "__init__.py").exists(), folder


def test_version_and_licence():
  assert Version(kd_jax.__version__).release >= (0, 1)
  assert PROJECT["dynamic"] == ["version"]
  changelog = (REPO / "CHANGELOG.md").read_text()
  assert "\n## [Unreleased]\n" in changelog
  licence = (REPO / "LICENSE").read_text()
  assert PROJECT["license"] == "Apache-2.0"
  assert "Apache License" in licence
  assert "Version 2.0, January 2004" in licence
  assert "END OF TERMS AND CONDITIONS" in licence


def test_readme_holds_the_two_commands():
  blocks = re.findall(
    r"^```bash\n(.*?)^```$", (REPO / "README.md").read_text(), re.M | re.S
  )
  commands = [line for block in blocks for line in block.splitlines()]
  for command in (
    "pip install -r requirements-cpu.txt"
    " && python launch.py --config configs/quickstart.py",
    "pip install -r requirements-test.txt && pytest",
  ):
    assert commands.count(command) == 1, command


FAKE_TOOL = """#!/bin/sh
venv=$(dirname "$(dirname "$0")")
echo "$(basename "$venv"): $(basename "$0") $*" >> "$CALLS"
if [ "$(basename "$0")" = uv ]; then echo "resolved==1.0"; fi
if [ "$(basename "$0")" = pytest ]; then
  echo "== $PYTEST_STATUS failed, 3 passed in 1 s =="
  exit "$PYTEST_STATUS"
fi
"""
FAKE_PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
for tool in pip python uv pytest; do cp "$FAKES/tool" "$3/bin/$tool"; done
echo "PATH=$3/bin:\\$PATH" > "$3/bin/activate"
"""
FAKE_GIT = """#!/bin/sh
tar -c -T /dev/null
"""


@pytest.fixture
def ci(tmp_path):
  """Runs .ci/run on a README, with tools that only note how they are called.

  Returns the process and the calls, each "<virtual environment>: <command>".
  """
  fakes = tmp_path / "fakes"
  fakes.mkdir()
  for name, text in (
    ("tool", FAKE_TOOL),
    ("python3", FAKE_PYTHON),
    ("git", FAKE_GIT),
  ):
    (fakes / name).write_text(text)
    (fakes / name).chmod(0o755)
  clone = tmp_path / "clone"
  (clone / ".ci").mkdir(parents=True)
  shutil.copy(REPO / ".ci" / "run", clone / ".ci" / "run")
  (clone / "requirements-test.txt").write_text("uv==1.0\n")
  calls = tmp_path / "calls"
  calls.touch()

  def run(readme: str, *, pytest_status: int = 0):
    (clone / "README.md").write_text(readme)
    process = subprocess.run(
      [clone / ".ci" / "run"],
      env={
        **os.environ,
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "FAKES": str(fakes),
        "CALLS": str(calls),
        "PYTEST_STATUS": str(pytest_status),
      },
      capture_output=True,
      text=True,
      check=False,
    )
    return process, calls.read_text().splitlines()

  return run


GOOD_README = """
pip install -r requirements-cpu.txt && python of no block
```bash
pip install -r requirements-cpu.txt && python first.py
```
```bash
pip install -r requirements-test.txt && pytest --word
```
"""


@pytest.mark.parametrize("status", [0, 1, 5])
def test_ci_runs_the_commands_of_the_readme(ci, status):
  process, calls = ci(GOOD_README, pytest_status=status)
  assert process.returncode == status, process.stderr
  assert calls[:2] == [
    "quickstart: pip install -r requirements-cpu.txt",
    "quickstart: python first.py",
  ]
  assert calls[-2:] == [
    "tests: pip install -r requirements-test.txt",
    "tests: pytest --word",
  ]
  resolved = " ".join(call for call in calls if ": uv pip compile" in call)
  for wanted in (" requirements.txt", *(f"--extra {e}" for e in EXTRAS)):
    assert wanted in resolved
  closing = process.stdout.rstrip("\n").splitlines()[-1]
  assert closing == f"== {status} failed, 3 passed in 1 s =="


@pytest.mark.parametrize(
  ("old", "new", "got"),
  [
    (
      "pip install -r requirements-cpu.txt && python first.py\n",
      "",
      "got: none",
    ),
    ("-test.txt", "-tests.txt", "got: none"),
    ("```bash", "```", "got: none"),
    ("pip install", "X=1 pip install", "got: X=1 pip"),
    (
      "python first.py",
      "a\npip install -r requirements-cpu.txt && b",
      "got: pip install -r requirements-cpu.txt && a\npip",
    ),
  ],
)
def test_ci_wants_each_command_once(ci, old, new, got):
  process, calls = ci(GOOD_README.replace(old, new))
  assert process.returncode == 1
  assert 'expected one line starting with "pip install' in process.stderr
  assert got in process.stderr
  assert not calls


def test_ci_is_executable_and_repeats_no_command():
  script = REPO / ".ci" / "run"
  assert os.access(script, os.X_OK)
  assert "launch.py" not in script.read_text()
