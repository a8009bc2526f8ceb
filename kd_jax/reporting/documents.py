"""Tables of gathered results, and the documents that they stand in."""

import pathlib
import re
import shlex
import sys

import pandas as pd

from kd_jax import distillers
from kd_jax.reporting import gather, published, runs, statistics
from kd_jax.reporting import tables as tables_lib

BEGIN = "<!-- results: written by python -m kd_jax results -->"
END = "<!-- results: end -->"
# Networks of the README's table.
_PAIR = ("resnet32x4", "resnet8x4")
_NOT_RUN = "not run"
_EPOCHS = {"final": "last", "best": "best"}


def tables(folder: pathlib.Path) -> str:
  """Tables for a README, in Markdown.

  Args:
    folder: of folders of results; it may be missing.

  Returns:
    A list of the registry's methods; the values of ResNet-32x4 -> ResNet-8x4,
    published and ours; then a table for each folder that has runs of no
    published recipe.

  Raises:
    ValueError: see `runs.collect`.
  """
  groups = _groups(folder)
  parts = [_catalogue(), _short_table(groups)]
  by_folder: dict[str, list[runs.Group]] = {}
  for g in groups:
    config = g.first["config"]
    if not published.find(config) and not _is_of(g, *_PAIR):
      name = pathlib.Path(g.first["run"]).parts[0]
      by_folder.setdefault(name, []).append(g)
  for name, members in by_folder.items():
    parts.append(_own_table(folder, name, members))
  return "\n".join(parts)


def page(folder: pathlib.Path) -> str:
  """A table for each published recipe, with all its pairs, in Markdown.

  Args:
    folder: of folders of results; it may be missing.

  Raises:
    ValueError: see `runs.collect`.
  """
  followers: dict[published.Published, list[runs.Group]] = {}
  for g in _groups(folder):
    for value in published.find(g.first["config"]):
      followers.setdefault(value, []).append(g)
  by_recipe: dict[str, list[published.Published]] = {}
  for value in published.values():
    by_recipe.setdefault(value.recipe, []).append(value)
  return "\n".join(
    _recipe_table(recipe, values, followers)
    for recipe, values in by_recipe.items()
  )


def _groups(folder):
  found = folder.exists() and runs.find_runs(folder)
  return runs.group(runs.collect(folder)) if found else []


def _catalogue():
  """All methods, with the places and years of their papers."""
  by_need: dict[bool, list[str]] = {True: [], False: []}
  for method, cls in distillers.DISTILLERS.items():
    if not cls.needs_teacher:
      continue
    title, paper = _named(method)
    place = paper.rpartition(", ")[2]
    by_need[distillers.create(method).needs_logits_only].append(
      f"[{title}](kd_jax/distillers/{method}.py) ({place})"
    )
  return (
    "Methods that read the teacher's logits alone:"
    f" {', '.join(by_need[True])}.\n\n"
    "Methods that read more, such as features or a second view:"
    f" {', '.join(by_need[False])}.\n"
  )


def _named(method):
  """A method's name in the literature and its paper, from its docstring."""
  module = sys.modules[distillers.DISTILLERS[method].__module__]
  found = re.match(r"(\S+): .* \((.*)\)\.$", module.__doc__ or "", re.M)
  return found.groups() if found else (method, "")


def _short_table(groups):
  """The table of one pair of networks; methods without values are left out."""
  teacher, student = _PAIR
  lines = []
  for method, cls in distillers.DISTILLERS.items():
    pair = (teacher if cls.needs_teacher else "", student)
    values = _of_pair(published.values(), *pair, method)
    line = {
      "method": _named(method)[0] if cls.needs_teacher else "student alone",
      "config": f"`{_config(method)}.py`",
      "published": _join(_theirs(v) for v in values) or "-",
    }
    ours = [g for g in groups if _is_of(g, *pair, method)]
    line["kd_jax"] = _join(_ours(g) for g in ours) or _NOT_RUN
    if values or ours:
      lines.append(line)
  values = _of_pair(published.values(), "", teacher)
  ours = [g for g in groups if _is_of(g, "", teacher)]
  return (
    f"`{teacher}` teaches `{student}`:\n\n"
    f"{tables_lib.markdown(pd.DataFrame(lines))}"
    f"\nThe teacher, `{teacher}`: published"
    f" {_join(_theirs(v) for v in values)}; kd_jax"
    f" {_join(_ours(g) for g in ours) or _NOT_RUN}.\n"
  )


def _recipe_table(recipe, values, followers):
  """All pairs and methods of a recipe."""
  columns: dict[str, list[published.Published]] = {}
  for value in values:
    if value.teacher:
      columns.setdefault(_title(value), []).append(value)
  alone = {v.student: v for v in values if not v.teacher}
  lines = []
  for teacher, student in dict.fromkeys(
    (v.teacher, v.student) for v in values if v.teacher
  ):
    line = {"teacher": f"`{teacher}`", "student": f"`{student}`"}
    for name, network in (("its teacher", teacher), ("alone", student)):
      if alone:
        own = [alone[network]] if network in alone else []
        line[name] = _cell(own, followers)
    for title, members in columns.items():
      line[title] = _cell(_of_pair(members, teacher, student), followers)
    lines.append(line)
  names = sorted({str.split(v.config)[0] for v in values})
  sources = dict.fromkeys(v.source for v in values)
  return (
    f"## {recipe}\n\nValues of {', '.join(sources)}. Configs:"
    f" {', '.join(f'`{_file(name)}`' for name in names)}.\n\n"
    f"{tables_lib.markdown(pd.DataFrame(lines))}"
  )


def _file(recipe):
  name, colon, preset = recipe.partition(":")
  return f"{name}.py{colon}{preset}"


def _of_pair(values, teacher, student, method=None):
  return [
    v
    for v in values
    if (v.teacher, v.student) == (teacher, student)
    and method in (None, v.method)
  ]


def _is_of(g, teacher, student, method=None):
  """Whether runs are of that pair, by a published recipe or the config's."""
  config = g.first["config"]
  run = (config["teacher"]["name"], g.first["student"])
  own = config["distiller"]["name"]
  if run != (teacher, student) or method not in (None, own):
    return False
  if published.find(config):
    return True
  return own in distillers.DISTILLERS and published.follows(
    config, _config(own)
  )


def _config(method):
  """The file of `configs/` of a method, or of a network alone."""
  alone = not distillers.DISTILLERS[method].needs_teacher
  return f"{'teacher' if alone else method}_cifar"


def _settings(value):
  """What a line's config changes, in words."""
  _, *fields = str.split(value.config)
  return [field.rpartition(".")[2].replace("=", " ") for field in fields]


def _title(value):
  name, _ = _named(value.method)
  n = [f"n = {value.n}"] if value.n else []
  words = [*_settings(value), f"{_EPOCHS[value.epoch]} epoch", *n]
  return f"{name} ({', '.join(words)})"


def _theirs(value):
  return f"{value.top1:.2f} ({', '.join([value.name, *_settings(value)])})"


def _recipes(g):
  """The recipes that runs follow."""
  found = published.find(g.first["config"])
  return dict.fromkeys(_join([v.recipe, *_settings(v)], " ") for v in found)


def _ours(g):
  score = statistics.mean_std(g.values("best", "top1"), 2)
  words = [*_recipes(g), "best", f"n = {len(g.rows)}"]
  return f"{score} ({', '.join(words)})"


def _cell(values, followers):
  """Published values and those of runs that follow them."""
  parts = []
  for value in values:
    parts.append(f"{value.top1:.2f}")
    for g in followers.get(value, ()):
      score = statistics.mean_std(g.values(value.epoch, "top1"), 2)
      parts.append(f"kd_jax {score} (n = {len(g.rows)})")
  return _join(parts) or "-"


def _join(parts, between="; "):
  return between.join(dict.fromkeys(parts))


_COLUMNS = [
  *("network", "teacher", "method", "n", "top-1, last epoch"),
  *("top-1, best epoch", "published", "difference"),
]


def _own_table(folder, name, groups):
  """The table of one folder, after a line about its runs."""
  commands, hardware, recipes = [], [], []
  for g in groups:
    for row in g.rows:
      command = shlex.join(gather.command_of(folder / row["run"]))
      commands.append(f"`python {command}`")
      hardware.append(row["hardware"])
    config = g.first["config"]
    if not g.is_teacher:
      recipes.append(
        f"{config['epochs']} epochs of batches of {config['batch_size']}"
      )
  about = [
    f"{word}{'; '.join(dict.fromkeys(found))}"
    for word, found in (("", recipes), ("on ", hardware), ("by ", commands))
    if found
  ]
  table = tables_lib.accuracy(groups)[_COLUMNS]
  table = table.loc[:, (table != "-").any()]
  return f"`{name}`: {', '.join(about)}.\n\n{tables_lib.markdown(table)}"


def rewrite(text: str, content: str) -> str:
  """Replaces the content between the lines `BEGIN` and `END` of a document.

  Raises:
    ValueError: unless the document has one of each, in this order.
  """
  before, begin, rest = text.partition(f"{BEGIN}\n")
  _, end, after = rest.partition(f"{END}\n")
  if not begin or not end or BEGIN in after or END in before + after:
    raise ValueError(
      f"expected one line {BEGIN!r} and after it one line {END!r}. Write them"
      " where the tables belong"
    )
  return f"{before}{begin}\n{content}\n{end}{after}"
