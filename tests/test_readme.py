"""Every command, path, field and example that the documents name is real."""

import argparse
import importlib
import pathlib
import re
import shlex
import sys

import pytest
from ml_collections import ConfigDict

from kd_jax import distillers

REPO = pathlib.Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
  "README.md": README,
  "CONTRIBUTING.md": (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"),
  "launch.py": (REPO / "launch.py").read_text(encoding="utf-8"),
  **{
    str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
    for path in [
      *sorted((REPO / "configs").glob("*.py")),
      *sorted((REPO / "kd_jax").glob("*.py")),
      *sorted((REPO / "docs").glob("*.md")),
    ]
  },
}


def blocks(language: str, text: str = README) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[str]:
  """The lines that start programs of this repository.

  Those of fenced blocks, and those of a module's docstring; a line that ends
  in a backslash goes on.
  """
  fenced = "\n".join(blocks("bash", text))
  indented = re.findall(r"^(?: {4})?(python (?:.*\\\n)*.*)$", text, re.M)
  code = "\n".join([fenced, *indented])
  code = re.sub(r" *\\+\n\s*", " ", code)
  found = []
  for line in code.splitlines():
    for part in line.split("#")[0].split("&&"):
      words = part.strip()
      if re.match(r"python (launch\.py|-m kd_jax\.)", words):
        found.append(words)
  return found


COMMANDS = [
  pytest.param(command, id=f"{name}: {command}")
  for name, text in DOCUMENTS.items()
  for command in commands(text)
]


def test_commands_sees_every_form():
  text = """
    python launch.py --config a.py \\\\
        --config.x=1
```bash
pip install x && python launch.py --config b.py  # a comment
python -m kd_jax predict --model c
echo python launch.py
```
"""
  assert set(commands(text)) == {
    "python launch.py --config b.py",
    "python -m kd_jax predict --model c",
    "python launch.py --config a.py --config.x=1",
  }


def test_readme_shows_every_program():
  shown = " ".join(commands(README))
  for program in (
    *("launch.py", "kd_jax.export", "kd_jax.evaluate"),
    *("kd_jax.predict", "kd_jax.report"),
  ):
    assert f"python -m {program} " in shown or f"python {program} " in shown


class ParsedError(Exception):
  """Stops a program when it has understood its arguments."""


def parse(command, parse_launch, monkeypatch, capsys):
  """Raises AssertionError with the program's own words if it does not."""
  _, *words = shlex.split(command)
  try:
    if words[0] == "launch.py":
      parse_launch(*words[1:])
      return
    module = importlib.import_module(words[1])
    real = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
      real(self, *args, **kwargs)
      raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(ParsedError):
      module.main()
  except SystemExit:
    raise AssertionError(capsys.readouterr().err) from None


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, parse_launch, monkeypatch, capsys):
  monkeypatch.chdir(REPO)
  parse(command, parse_launch, monkeypatch, capsys)


@pytest.mark.parametrize(
  ("command", "words"),
  [
    ("python launch.py --config configs/no.py", "configs/no.py: no such file"),
    (
      "python launch.py --config configs/kd_cifar.py --config.sed=1",
      'Did you mean "seed"',
    ),
    ("python -m kd_jax predict --modle x y", "required: --model"),
    ("python -m kd_jax export --workdir a --to b --x c", "unrecognized"),
  ],
)
def test_wrong_commands_would_be_seen(
  command, words, parse_launch, monkeypatch, capsys
):
  monkeypatch.chdir(REPO)
  with pytest.raises(AssertionError, match=words):
    parse(command, parse_launch, monkeypatch, capsys)


def test_pip_commands_name_files_and_extras():
  code = "\n".join([*blocks("bash"), *re.findall(r"`([^`\n]+)`", README)])
  files = re.findall(r"pip install -r (\S+)", code)
  assert {"requirements.txt", "requirements-cpu.txt"} <= set(files)
  assert [name for name in files if not (REPO / name).is_file()] == []
  project = (REPO / "pyproject.toml").read_text()
  for extras in re.findall(r"pip install \"?\.\[([\w,]+)\]", code):
    for extra in extras.split(","):
      assert re.search(rf"^{extra} = \[", project, re.M), extra


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_fields_exist(name, parse_launch):
  """`--config.x.y=z` and `config.x.y`, wherever they are named."""
  fields = re.findall(r"\bconfig\.([a-z_]+(?:\.[a-z_]+)*)\b", DOCUMENTS[name])
  if name.startswith("configs/"):  # its code has been tried by loading it
    fields = re.findall(r"--config\.([a-z_.]+)=", DOCUMENTS[name])
  config = parse_launch("--config", f"{REPO}/configs/kd_cifar.py")
  for field in {*fields} - {"json"}:
    place = config
    for part in field.split("."):
      if hasattr(ConfigDict, part):  # a method of it, in code
        break
      assert part in place, f"{name} names config.{field}"
      place = place[part]


# Words of the documents that stand for a name of the reader's choice.
PLACEHOLDERS = re.compile(r"(/|_|\b)(x|FAMILY|X|NAME)(_cifar)?\.py$")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_named_files_exist(name):
  code = re.findall(r"`([^`\n]+)`", DOCUMENTS[name])
  code += [
    word for block in blocks("bash", DOCUMENTS[name]) for word in block.split()
  ]
  paths = {
    path
    for text in code
    for path in re.findall(
      r"(?:[\w.-]+/)*[\w-]+\.(?:py|toml|txt|yaml|md)\b", text
    )
    if not PLACEHOLDERS.search(path)
  }
  assert paths
  missing = [
    path
    for path in sorted(paths)
    if not any((REPO / folder / path).exists() for folder in ("", "configs"))
  ]
  assert missing == []


def test_every_method_is_in_the_table():
  methods = {*distillers.names(), "teacher"} - {"none"}
  assert [m for m in methods if f"| `{m}_cifar.py`" not in README] == []


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_example_runs(number):
  code = blocks("python")[number]
  exec(compile(code, f"README.md, example {number}", "exec"), {})


def test_there_is_an_example_of_a_loss_in_foreign_code():
  examples = [code for code in blocks("python") if "kd_jax.losses" in code]
  assert any("equinox" in code or "nnx" in code for code in examples)
  assert any("assert " in code for code in examples)
