"""The requirements files, pyproject.toml and the README agree."""

import ast
import importlib.metadata
import pathlib
import re
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
# What each file pins: the core and these extras.
PINNED = {
  "requirements-cpu.txt": ("train", "report"),
  "requirements.txt": ("train", "report", "cuda12", "dali", "tfds"),
  "requirements-test.txt": ("train", "report", "test"),
}
# Prepares a TFDS data set where the user has it; nothing else needs it.
UNDECLARED = {"tensorflow"}


def pins(file: str) -> dict[str, Version]:
  """Package -> version of a requirements file, -r lines followed."""
  found = {}
  for line in (REPO / file).read_text().splitlines():
    line = line.partition("#")[0].strip()
    if line.startswith("-r "):
      found |= pins(line.removeprefix("-r "))
    elif line:
      exact = re.fullmatch(r"([\w-]+)(?:\[\w+\])?==(\d+(?:\.\d+)+)", line)
      assert exact, f"{file}: expected an exact pin, got {line}"
      name = canonicalize_name(exact[1])
      assert name not in found, f"{file} names {name} twice"
      found[name] = Version(exact[2])
  return found


def bounds(*extras: str) -> dict[str, Requirement]:
  """Package -> lower bound of the core and of extras."""
  lines = [*PROJECT["dependencies"], *(x for e in extras for x in EXTRAS[e])]
  parsed = map(Requirement, lines)
  return {
    canonicalize_name(requirement.name): requirement for requirement in parsed
  }


def test_the_core_is_what_losses_need():
  assert set(bounds()) == {"jax", "numpy"}
  assert {"train", "report", "torch", "tfds", "dali", "cuda12"} < set(EXTRAS)


@pytest.mark.parametrize("file", FILES)
def test_files_pin_what_pyproject_names(file):
  named, pinned = bounds(*PINNED[file]), pins(file)
  assert set(named) == set(pinned)
  for name, requirement in named.items():
    assert requirement.specifier.contains(pinned[name]), requirement


def test_files_agree():
  cluster, test = pins("requirements.txt"), pins("requirements-test.txt")
  for name in cluster.keys() & test.keys():
    assert cluster[name] == test[name], name


def imported_modules(path: pathlib.Path) -> set[str]:
  """Top-level names that Python files import, wherever they do."""
  found = set()
  for file in path.rglob("*.py") if path.is_dir() else [path]:
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
      if isinstance(node, ast.Import):
        found.update(alias.name.partition(".")[0] for alias in node.names)
      elif isinstance(node, ast.ImportFrom):
        found.add(node.module.partition(".")[0])
  return found


@pytest.mark.parametrize(
  ("path", "extras"),
  [
    *(
      (path, ("train", "report", "torch", "tfds", "dali"))
      for path in ("kd_jax", "configs", "launch.py", "scripts", "benchmarks")
    ),
    ("tests", ("train", "report", "test")),
  ],
)
def test_every_import_is_declared(path, extras):
  own = {path.stem for path in REPO.iterdir()} | set(sys.stdlib_module_names)
  for folder in ("scripts", "tests"):  # whose modules import each other
    own |= {file.stem for file in (REPO / folder).iterdir()}
  owners = importlib.metadata.packages_distributions()
  for module in imported_modules(REPO / path) - own - UNDECLARED:
    distributions = {canonicalize_name(d) for d in owners.get(module, [module])}
    assert distributions & set(bounds(*extras)), (
      f"{path} imports {module}, of {distributions}: declare it in"
      " pyproject.toml and pin it in the requirements files"
    )


def test_every_folder_of_the_package_is_a_package():
  for folder in {path.parent for path in (REPO / "kd_jax").rglob("*.py")}:
    assert (folder / "__init__.py").exists(), folder


def test_version_is_in_the_changelog_or_to_come():
  assert Version(kd_jax.__version__).release >= (0, 1)
  assert "\n## [Unreleased]\n" in (REPO / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
  "command",
  [
    "pip install -r requirements-cpu.txt"
    " && python launch.py --config configs/quickstart.py",
    "pip install -r requirements-test.txt && pytest",
  ],
)
def test_readme_holds_the_commands_that_ci_reads(command):
  text = (REPO / "README.md").read_text()
  blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
  lines = [line for block in blocks for line in block.splitlines()]
  assert lines.count(command) == 1
