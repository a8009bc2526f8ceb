"""The shape of the package: which room imports which, what happens where."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

from kd_jax import distillers

REPO = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPO / "kd_jax"

# A room imports rooms of lower floors, and itself.
FLOORS = {
  **dict.fromkeys(("registry", "storage"), 0),
  "distributed": 1,
  **dict.fromkeys(("data", "losses", "models"), 2),
  "distillers": 3,
  **dict.fromkeys(("training", "interop"), 4),
  "runs": 5,
  "reporting": 6,
  "cli": 7,
  "__main__": 8,
}
# Rooms that need few packages besides kd_jax and the standard library.
EXTERNAL = {
  "registry": set(),
  "distributed": {"jax", "numpy"},
  "losses": {"jax", "numpy"},
  "models": {"jax", "numpy", "flax"},
  "distillers": {"jax", "numpy", "flax"},
  "training": {"jax", "numpy", "flax", "optax"},
}
# Heavy packages, each with the only modules that may import it.
HEAVY = {
  "grain": {"data"},
  "nvidia.dali": {"data"},
  "tensorflow": {"data"},
  "tensorflow_datasets": {"data"},
  "torch": {"interop"},
  "ml_collections": {"runs"},
}
COLLECTIVES = {
  *("pmean", "psum", "pmax", "pmin", "ppermute", "pshuffle", "pswapaxes"),
  *("pbroadcast", "psum_scatter", "all_gather", "all_to_all"),
  *("axis_index", "axis_size", "pcast", "pvary", "shard_map", "pmap"),
  *("ragged_all_to_all", "all_gather_invariant", "process_allgather"),
}


def read_modules() -> dict[str, ast.Module]:
  """Every module of the package, parsed, by its dotted name."""
  modules = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(REPO).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    modules[name] = ast.parse(path.read_text(), str(path))
  return modules


MODULES = read_modules()


def imports(tree: ast.Module) -> set[str]:
  """Dotted names of what a module imports, wherever in it that happens."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports are absolute"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        found.add(full if full in MODULES else node.module)
  return found


IMPORTS = {name: imports(tree) for name, tree in MODULES.items()}


def room(module: str) -> str:
  """The room of a module of the package; "" for the package itself."""
  return module.partition(".")[2].partition(".")[0]


def test_imports_sees_every_form():
  code = "import grain.python as g\nfrom kd_jax import losses\ndef f():\n"
  code += "  from jax.lax import psum\n"
  expected = {"grain.python", "kd_jax.losses", "jax.lax"}
  assert imports(ast.parse(code)) == expected


def test_rooms_import_only_lower_floors():
  assert {room(name) for name in MODULES} == {"", *FLOORS}
  wrong = [
    f"{name} imports {target}"
    for name, targets in IMPORTS.items()
    for target in sorted(targets)
    if target.partition(".")[0] == "kd_jax"
    and room(target) != room(name)
    and FLOORS[room(target)] >= FLOORS.get(room(name), 0)
  ]
  assert not wrong


def test_nothing_imports_configs_launch_or_tests():
  above = {"configs", "launch", "tests", "benchmarks", "scripts"}
  wrong = {
    name: targets & above
    for name, targets in IMPORTS.items()
    if targets & above
  }
  assert not wrong


def test_imports_have_no_cycle():
  done: set[str] = set()

  def visit(name: str, path: list[str]):
    assert name not in path, "cycle: " + " -> ".join([*path, name])
    if name not in done:
      for target in sorted(IMPORTS[name] & MODULES.keys()):
        visit(target, [*path, name])
      done.add(name)

  for name in MODULES:
    visit(name, [])


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_imports_are_few(name):
  allowed = {"kd_jax", *EXTERNAL[name], *sys.stdlib_module_names}
  wrong = [
    f"{module} imports {target}"
    for module, targets in IMPORTS.items()
    for target in sorted(targets)
    if room(module) == name and target.partition(".")[0] not in allowed
  ]
  assert not wrong


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_stay_in_their_rooms(package):
  users = {
    room(name)
    for name, targets in IMPORTS.items()
    if any(t == package or t.startswith(f"{package}.") for t in targets)
  }
  assert users <= HEAVY[package]


@pytest.mark.parametrize(
  ("module", "absent"),
  [
    ("kd_jax", ["jax"]),
    ("kd_jax.losses", ["flax", "optax", "orbax", "ml_collections"]),
    ("kd_jax.distillers", ["optax", "orbax", "ml_collections"]),
    ("kd_jax.runs.train", ["torch", "matplotlib", "pandas", "sklearn"]),
  ],
)
def test_importing_pulls_in_nothing_heavy(module, absent):
  # JAX itself looks for CUDA's packages, which lie beside DALI.
  heavy = [*absent, *(HEAVY.keys() - {"ml_collections"})]
  code = (
    f"import sys, {module}\nprint(*[m for m in {heavy!r} if m in sys.modules])"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=REPO,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.split() == []


def attributes_of_jax(tree: ast.Module) -> set[str]:
  """Last names of `jax.x`, `jax.a.x`, `lax.x`, `from jax.a import x`."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      root = node.value
      while isinstance(root, ast.Attribute):
        root = root.value
      if isinstance(root, ast.Name) and root.id in ("jax", "lax"):
        found.add(node.attr)
    elif isinstance(node, ast.ImportFrom) and node.module:
      names = {alias.name for alias in node.names}
      found |= names if node.module.partition(".")[0] == "jax" else set()
  return found


def test_devices_communicate_in_one_room():
  users = {
    room(name)
    for name, tree in MODULES.items()
    if attributes_of_jax(tree) & COLLECTIVES
  }
  assert users == {"distributed"}


def test_training_takes_gradients_in_one_file():
  users = [
    name
    for name, tree in MODULES.items()
    if "value_and_grad" in attributes_of_jax(tree)
  ]
  assert users == ["kd_jax.training.step"]


def compared_strings(tree: ast.AST) -> set[str]:
  """Strings that code branches on, in comparisons and in match cases."""
  found = set()
  for node in ast.walk(tree):
    parts = []
    if isinstance(node, ast.Compare):
      parts = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
      parts = [node]
    for part in parts:
      if not isinstance(part, ast.Call | ast.Subscript):
        found |= {
          n.value for n in ast.walk(part) if isinstance(n, ast.Constant)
        }
  return found


def test_no_branch_on_a_method_name():
  code = 'if a == "kd" or c in ("sp", "vid"):\n  pass\n'
  code += 'match e:\n  case "srrl" | "simkd":\n    pass\nx["at"] = f("crd")\n'
  assert compared_strings(ast.parse(code)) == {
    "kd",
    "sp",
    "vid",
    "srrl",
    "simkd",
  }
  trees = {**MODULES, "launch": ast.parse((REPO / "launch.py").read_text())}
  wrong = {
    name: compared_strings(tree) & set(distillers.names())
    for name, tree in trees.items()
  }
  assert not {name: found for name, found in wrong.items() if found}


@pytest.mark.parametrize(
  "method", [n for n in distillers.names() if n != "none"]
)
def test_one_method_is_four_files(method):
  for place in (
    f"kd_jax/losses/{method}.py",
    f"kd_jax/distillers/{method}.py",
    f"configs/{method}_cifar.py",
    f"tests/distillers/test_{method}.py",
  ):
    assert (REPO / place).is_file(), place
  module = importlib.import_module(f"kd_jax.distillers.{method}")
  assert distillers.DISTILLERS[method].__module__ == module.__name__
