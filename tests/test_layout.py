"""The shape of the package: who imports whom, and what happens where."""

import ast
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPO / "kd_jax"

ISSUED = {
  *("none", "kd", "fitnet", "at", "sp", "vid", "crd", "srrl", "semckd"),
  *("simkd", "reviewkd"),
}
# Files beside the methods' own.
SHARED_LOSSES = {"__init__", "checks", "cross_entropy", "spatial"}
SHARED_DISTILLERS = {"__init__", "base", "connectors", "none", "several"}

# What a part may import of kd_jax; a name covers its submodules.
INTERNAL = {
  "kd_jax.parallel": set(),
  "kd_jax.losses": {"kd_jax.losses", "kd_jax.parallel"},
  "kd_jax.models": {"kd_jax.models", "kd_jax.parallel"},
  "kd_jax.distillers": {
    "kd_jax.distillers",
    "kd_jax.losses",
    "kd_jax.models.layers",
    "kd_jax.parallel",
  },
  "kd_jax.train_step": {
    "kd_jax.data.augment",
    "kd_jax.distillers.base",
    "kd_jax.metrics",
    "kd_jax.parallel",
    "kd_jax.state",
  },
}
# What a part may import besides kd_jax and the standard library.
EXTERNAL = {
  "kd_jax.parallel": {"jax", "numpy"},
  "kd_jax.losses": {"jax", "numpy"},
  "kd_jax.models": {"jax", "numpy", "flax"},
}
# The parts that train.py puts together: none knows it, nor the tools that
# stand on it, nor where its settings come from.
BELOW_TRAIN = (
  *("checkpoint", "data", "distillers", "interop", "losses", "metrics"),
  *("models", "optim", "parallel", "state", "train_step"),
)
ABOVE = {
  f"kd_jax.{name}"
  for name in (
    *("train", "setup", "export", "evaluate", "predict", "report", "convert"),
    *("grid", "teachers", "figures", "published", "results", "analysis"),
  )
}
# Heavy packages, each with the one file that may import it.
HEAVY = {
  "grain": {"kd_jax.data.grain_pipeline"},
  "nvidia.dali": {"kd_jax.data.dali_pipeline"},
  "tensorflow": {"kd_jax.data.sources"},
  "tensorflow_datasets": {"kd_jax.data.sources"},
  "torch": {"kd_jax.interop.torch_files"},
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
PACKAGES = {
  ".".join(path.parent.relative_to(REPO).parts)
  for path in PACKAGE.rglob("__init__.py")
}


def imports(name: str, tree: ast.Module) -> set[str]:
  """Dotted names of what a module imports, wherever in it that happens."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      source = node.module or ""
      if node.level:
        up = node.level - (name in PACKAGES)
        base = name.split(".")[: len(name.split(".")) - up]
        source = ".".join([*base, *filter(None, [source])])
      for alias in node.names:
        full = f"{source}.{alias.name}"
        found.add(full if full in MODULES else source)
  return found


IMPORTS = {name: imports(name, tree) for name, tree in MODULES.items()}


def test_imports_sees_every_form():
  code = """
import grain.python as g
from kd_jax import parallel
from kd_jax.parallel import axis_mean
from . import train_step
def f():
  from jax.lax import psum
"""
  assert imports("kd_jax.train", ast.parse(code)) == {
    *("grain.python", "kd_jax.parallel", "kd_jax.train_step", "jax.lax")
  }


def within(name: str, part: str) -> bool:
  """Whether a dotted name is a part or lies inside it."""
  return name == part or name.startswith(part + ".")


def members(part: str) -> list[str]:
  """The modules of a part; an absent part is a failure, not an empty list."""
  found = [name for name in MODULES if within(name, part)]
  assert found, f"{part} does not exist"
  return found


def top(name: str) -> str:
  return name.partition(".")[0]


@pytest.mark.parametrize("part", INTERNAL)
def test_internal_imports_follow_the_directions(part):
  wrong = [
    f"{name} imports {target}"
    for name in members(part)
    for target in sorted(IMPORTS[name])
    if top(target) == "kd_jax"
    and not any(within(target, allowed) for allowed in INTERNAL[part])
  ]
  assert not wrong, f"{part} may import only {sorted(INTERNAL[part])}: {wrong}"


@pytest.mark.parametrize("part", EXTERNAL)
def test_external_imports_are_few(part):
  allowed = {"kd_jax", *EXTERNAL[part], *sys.stdlib_module_names}
  wrong = [
    f"{name} imports {target}"
    for name in members(part)
    for target in sorted(IMPORTS[name])
    if top(target) not in allowed
  ]
  assert not wrong, f"{part} may import only {sorted(EXTERNAL[part])}: {wrong}"


@pytest.mark.parametrize("part", BELOW_TRAIN)
def test_parts_do_not_know_what_stands_on_them(part):
  wrong = [
    f"{name} imports {target}"
    for name in members(f"kd_jax.{part}")
    for target in sorted(IMPORTS[name])
    if target in ABOVE or top(target) == "ml_collections"
  ]
  assert not wrong, wrong


def test_nothing_imports_configs_or_launch():
  wrong = [
    f"{name} imports {target}"
    for name, targets in IMPORTS.items()
    for target in sorted(targets)
    if top(target) in {"configs", "launch", "tests", "benchmarks"}
  ]
  assert not wrong, wrong


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


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_stay_in_their_files(package):
  wrong = [
    name
    for name, targets in IMPORTS.items()
    if any(within(target, package) for target in targets)
    and name not in HEAVY[package]
  ]
  assert not wrong, f"{package} belongs to {HEAVY[package]}, found in {wrong}"


@pytest.mark.parametrize(
  "module", ["kd_jax", "kd_jax.losses", "kd_jax.models", "kd_jax.distillers"]
)
def test_importing_pulls_in_nothing_heavy(module):
  # JAX itself looks for CUDA's packages, which lie beside DALI.
  heavy = [*(HEAVY.keys() - {"nvidia"}), "nvidia.dali"]
  heavy += ["jax"] if module == "kd_jax" else []
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


def test_one_value_and_grad():
  uses = [
    name
    for name, tree in MODULES.items()
    for node in ast.walk(tree)
    if (isinstance(node, ast.Attribute) and node.attr == "value_and_grad")
    or (isinstance(node, ast.alias) and node.name == "value_and_grad")
  ]
  assert uses == ["kd_jax.train_step"]


def attributes_of_jax(tree: ast.Module) -> set[str]:
  """Last names of `jax.x`, `jax.a.x`, `lax.x`, `from jax.a import x`."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      root = node.value
      while isinstance(root, ast.Attribute):
        root = root.value
      if isinstance(root, ast.Name) and root.id in {
        *("jax", "lax", "multihost_utils")
      }:
        found.add(node.attr)
    elif isinstance(node, ast.ImportFrom) and top(node.module or "") == "jax":
      found.update(alias.name for alias in node.names)
  return found


def test_collectives_live_in_parallel():
  users = {
    name: sorted(attributes_of_jax(tree) & COLLECTIVES)
    for name, tree in MODULES.items()
  }
  assert users.pop("kd_jax.parallel"), "the scan found no collective at all"
  assert not {k: v for k, v in users.items() if v}


def registry(name: str) -> dict[str, ast.expr]:
  """A registry's literal dict, unevaluated, from a package's `__init__`."""
  package, _, variable = name.rpartition(".")
  for node in MODULES[package].body:
    targets = (
      node.targets
      if isinstance(node, ast.Assign)
      else [node.target]
      if isinstance(node, ast.AnnAssign)
      else []
    )
    if variable in [t.id for t in targets if isinstance(t, ast.Name)]:
      assert isinstance(node.value, ast.Dict), f"{name} is no literal dict"
      keys = [ast.literal_eval(key) for key in node.value.keys]
      assert len(keys) == len(set(keys)), f"{name} holds a name twice"
      return dict(zip(keys, node.value.values))
  raise AssertionError(f"{package} has no {variable} = {{...}}")


def methods() -> list[str]:
  return sorted(registry("kd_jax.distillers.DISTILLERS"))


def strings(node: ast.AST) -> set[str]:
  return {
    leaf.value
    for leaf in ast.walk(node)
    if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
  }


def compared_strings(tree: ast.AST) -> set[str]:
  """Strings that code branches on: in comparisons and in match cases."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Compare):
      for operand in (node.left, *node.comparators):
        if isinstance(
          operand, ast.Constant | ast.Tuple | ast.List | ast.Set | ast.Dict
        ):
          found |= strings(operand)
    elif isinstance(node, ast.MatchValue):
      found |= strings(node)
  return found


def test_no_branch_on_a_method_name():
  trees = {**MODULES, "launch": ast.parse((REPO / "launch.py").read_text())}
  wrong = {
    name: sorted(compared_strings(tree) & set(methods()))
    for name, tree in trees.items()
  }
  assert not {k: v for k, v in wrong.items() if v}


def test_compared_strings_sees_every_form():
  code = """
if a == "kd" or "at" != b or c in ("sp", "vid") or d in ["crd"]:
  pass
match e:
  case "srrl" | "simkd":
    pass
x["fitnet"] = f("ofd")
"""
  assert compared_strings(ast.parse(code)) == {
    *("kd", "at", "sp", "vid", "crd", "srrl", "simkd")
  }


def test_no_defaults_beside_the_config():
  wrong = [
    f"{name}:{node.lineno}"
    for name, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == "get"
    and isinstance(node.func.value, ast.Name | ast.Attribute)
    and "config" in ast.unparse(node.func.value).split(".")
  ]
  assert not wrong, f"config.get hides a default from configs/base.py: {wrong}"


def test_one_method_is_four_places():
  names = methods()
  assert set(names) >= ISSUED, sorted(ISSUED - set(names))
  missing = [
    place
    for name in names
    if name != "none"
    for place in (
      f"kd_jax/losses/{name}.py",
      f"kd_jax/distillers/{name}.py",
      f"configs/{name}_cifar.py",
      f"tests/distillers/test_{name}.py",
    )
    if not (REPO / place).is_file()
  ]
  assert not missing, missing


def test_registry_line_names_the_methods_own_file():
  package = MODULES["kd_jax.distillers"]
  home = {
    alias.asname or alias.name: f"{node.module}.{alias.name}"
    for node in package.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  for name, value in registry("kd_jax.distillers.DISTILLERS").items():
    source = ast.unparse(value)
    first, _, rest = source.partition(".")
    full = f"{home.get(first, first)}.{rest}"
    assert full.startswith(f"kd_jax.distillers.{name}."), (
      f"DISTILLERS[{name!r}] = {source} is not of distillers/{name}.py"
    )


def test_every_method_file_is_registered():
  for folder, shared in (
    ("losses", SHARED_LOSSES),
    ("distillers", SHARED_DISTILLERS),
  ):
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")}
    assert files - shared == set(methods()) - {"none"}, folder


def public_functions(tree: ast.Module):
  """(name, function) of public functions and of public classes' methods."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
      yield node.name, node
    elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      for item in node.body:
        if isinstance(item, ast.FunctionDef) and (
          item.name == "__call__" or not item.name.startswith("_")
        ):
          yield f"{node.name}.{item.name}", item


def unannotated(name: str, function: ast.FunctionDef) -> list[str]:
  arguments = function.args
  every = [
    *(arguments.posonlyargs + arguments.args + arguments.kwonlyargs),
    *filter(None, (arguments.vararg, arguments.kwarg)),
  ]
  found = [
    f"{name}({argument.arg})"
    for argument in every
    if argument.annotation is None and argument.arg not in {"self", "cls"}
  ]
  return found + ([f"{name} ->"] if function.returns is None else [])


def test_public_signatures_are_typed():
  wrong = [
    f"{module}.{item}"
    for module, tree in MODULES.items()
    for name, function in public_functions(tree)
    for item in unannotated(name, function)
  ]
  assert not wrong, wrong
