"""Every command, path, field and example that the documents name is real."""

import argparse
import pathlib
import re
import shlex
import sys

import pytest
from ml_collections import ConfigDict

from kd_jax import __main__ as command_line

REPO = pathlib.Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
  str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
  for path in [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "launch.py")),
    *sorted((REPO / "configs").glob("*.py")),
    *sorted((REPO / "kd_jax").rglob("*.py")),
    *sorted((REPO / "docs").glob("*.md")),
  ]
}


def blocks(language: str, text: str = README) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[str]:
  """Commands of this repository in fenced blocks and in docstrings.

  A line that ends in a backslash continues.
  """
  fenced = "\n".join(blocks("bash", text))
  indented = re.findall(r"^(?: {4})?(python (?:.*\\\n)*.*)$", text, re.M)
  code = re.sub(r" *\\+\n\s*", " ", "\n".join([fenced, *indented]))
  parts = [part.split("#")[0].strip() for part in re.split(r"\n|&&", code)]
  return [p for p in parts if re.match(r"python (launch\.py|-m kd_jax) ", p)]


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


def test_readme_shows_every_command():
  shown = " ".join(commands(README))
  for command in command_line.COMMANDS:
    assert f"python -m kd_jax {command} " in shown, command


class ParsedError(Exception):
  """Stops a program when it has understood its arguments."""


def parse(command, parse_launch, monkeypatch, capsys):
  """Raises AssertionError with the program's own words if it fails."""
  _, *words = shlex.split(command)
  try:
    if words[0] == "launch.py":
      parse_launch(*words[1:])
      return
    real = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
      real(self, *args, **kwargs)
      raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(ParsedError):
      command_line.main()
  except SystemExit:
    raise AssertionError(capsys.readouterr().err) from None


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_parse(name, parse_launch, monkeypatch, capsys):
  monkeypatch.chdir(REPO)
  for command in commands(DOCUMENTS[name]):
    parse(command, parse_launch, monkeypatch, capsys)


@pytest.mark.parametrize(
  ("command", "words"),
  [
    ("python launch.py --config configs/no.py", "configs/no.py: no such file"),
    (
      "python launch.py --config configs/kd_cifar.py --config.sed=1",
      "Did you mean seed",
    ),
    ("python -m kd_jax predict --modle x y", "required: --model"),
    ("python -m kd_jax Export --workdir a --to b", "Did you mean export"),
  ],
)
def test_wrong_commands_are_refused(
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


def test_named_fields_exist(parse_launch):
  """`--config.x.y=z` everywhere, and `config.x.y` outside of configs/."""
  config = parse_launch("--config", f"{REPO}/configs/kd_cifar.py")
  for name, text in DOCUMENTS.items():
    fields = re.findall(r"\bconfig\.([a-z_]+(?:\.[a-z_]+)*)\b", text)
    if name.startswith("configs/"):
      fields = re.findall(r"--config\.([a-z_.]+)=", text)
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
  text = DOCUMENTS[name]
  code = re.findall(r"`([^`\n]+)`", text) + blocks("bash", text)
  paths = re.findall(
    r"(?:[\w.-]+/)*[\w-]+(?:\.(?:py|toml|txt|yaml|md)\b|/(?=`|$))",
    "\n".join(code),
  )
  paths = [path for path in paths if not PLACEHOLDERS.search(path)]
  assert paths
  missing = [
    path
    for path in paths
    if not any((REPO / folder / path).exists() for folder in ("", "configs"))
  ]
  assert missing == []


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_example_runs(number):
  code = blocks("python")[number]
  exec(compile(code, f"README.md, example {number}", "exec"), {})
