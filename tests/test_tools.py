"""The linters, the type checker and the hooks, so that pytest proves them."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml

REPO = pathlib.Path(__file__).resolve().parent.parent


def run(*command: str, cwd: pathlib.Path = REPO) -> str:
  """Runs a Python module; what it printed, unless it failed."""
  result = subprocess.run(
    [sys.executable, "-m", *command],
    cwd=cwd,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
  return result.stdout


@pytest.mark.parametrize(
  "command", [("ruff", "check", "."), ("ruff", "format", "--check", ".")]
)
def test_ruff(command):
  run(*command)


def test_mypy():
  assert "Success: no issues found in" in run("mypy")


def hooks() -> dict[str, dict]:
  text = (REPO / ".pre-commit-config.yaml").read_text()
  repositories = yaml.safe_load(text)["repos"]
  assert [r["repo"] for r in repositories] == ["local"]
  return {hook["id"]: hook for hook in repositories[0]["hooks"]}


def test_hooks_run_pinned_tools():
  pins = (REPO / "requirements-test.txt").read_text().splitlines()
  tools = {pin.partition("==")[0].replace("-", "_") for pin in pins}
  assert "pre_commit" in tools
  for hook in hooks().values():
    python, flag, module, *_ = hook["entry"].split()
    assert (python, flag) == ("python", "-m"), hook
    assert module.partition(".")[0] in tools, hook
    assert hook["language"] == "system", hook


def copy_of_the_tree(to: pathlib.Path):
  """Copies what a commit may hold into a new git repository."""
  ignored = (REPO / ".gitignore").read_text().split()
  shutil.copytree(
    REPO,
    to,
    ignore=shutil.ignore_patterns(
      ".git", "golden", *(line.strip("/") for line in ignored)
    ),
  )
  subprocess.run(["git", "init", "--quiet"], cwd=to, check=True)
  subprocess.run(["git", "add", "--all"], cwd=to, check=True)


# The tests above have run these three.
SKIP = {"SKIP": "ruff-check,ruff-format,mypy"}


def test_hooks_pass_and_bite(tmp_path):
  tree = tmp_path / "tree"
  copy_of_the_tree(tree)
  environment = {
    **os.environ,
    **SKIP,
    "PRE_COMMIT_HOME": str(tmp_path / "cache"),
    # The hooks say "python": this one.
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
  }

  def pre_commit() -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, "-m", "pre_commit", "run", "--all-files"],
      cwd=tree,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      check=False,
    )

  result = pre_commit()
  assert result.returncode == 0, result.stdout
  assert result.stdout.count("Passed") == len(hooks()) - 3, result.stdout

  (tree / "CHANGELOG.md").write_text("trailing \n\n\n")
  (tree / "broken.toml").write_text("[half\n")
  (tree / "broken.yaml").write_text("a: [1\n")
  subprocess.run(["git", "add", "--all"], cwd=tree, check=True)
  result = pre_commit()
  assert result.returncode == 1, result.stdout
  assert result.stdout.count("Failed") == 4, result.stdout
