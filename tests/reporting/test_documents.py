"""The tables of gathered results in the README and in docs/."""

import pathlib
import re

import pytest

from configs import nkd_cifar, table_cifar
from kd_jax import distillers
from kd_jax.reporting import documents, published
from kd_jax.runs import grid, identity

REPO = pathlib.Path(__file__).resolve().parents[2]
NOT_RUN = "not run"


def cells_of(markdown):
  """(row, column) -> the text of the first table's cells, and the header."""
  lines = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in markdown.split("\n\n")[0].splitlines()
  ]
  header, _, *rows = lines
  return {
    (row[0], i): cell for row in rows for i, cell in enumerate(row)
  }, header


@pytest.mark.parametrize(
  ("name", "make", "option"),
  [
    ("README.md", documents.tables, "readme"),
    ("docs/results.md", documents.page, "page"),
  ],
)
def test_document_has_the_tables_of_the_results(name, make, option):
  text = (REPO / name).read_text(encoding="utf-8")
  made = documents.rewrite(text, make(REPO / "results" / "cifar100"))
  assert text == made, (
    f"{name} does not show what results/ holds: python -m kd_jax results"
    f" results/cifar100 --{option} {name}"
  )


def title_of(method):
  text = documents.tables(REPO / "nothing")
  (title,) = re.findall(rf"\[(\S+)\]\(kd_jax/distillers/{method}\.py\)", text)
  return title


@pytest.mark.parametrize("method", sorted({*distillers.names()} - {"none"}))
def test_every_method_is_listed_by_its_name_and_paper(method):
  line = rf"\]\(kd_jax/distillers/{method}\.py\) \(([A-Za-z]+ )?20\d\d\)"
  assert re.search(line, documents.tables(REPO / "nothing"))
  title = title_of(method).lower().replace("-", "")
  assert title == method.replace("_", "")


def test_nothing_has_been_run(tmp_path):
  text = documents.tables(tmp_path / "nothing")
  cells, header = cells_of(text.partition("`resnet8x4`:\n\n")[2])
  assert header == ["method", "config", "published", "kd_jax"]
  rows = list(dict.fromkeys(row for row, _ in cells))
  pairs = {"", "resnet32x4"}
  assert rows[0] == "student alone" and len(rows) == len(
    {
      v.method
      for v in published.values()
      if v.student == "resnet8x4" and v.teacher in pairs
    }
  )
  assert {cells[row, 3] for row in rows} == {NOT_RUN}
  assert cells["SemCKD", 1] == "`semckd_cifar.py`"
  assert cells["SemCKD", 2] == "76.23 (SimKD, best)"
  assert cells["AT", 2] == "75.07 (SimKD, best); 73.44 (RepDistiller, last)"
  assert "78.08 (SimKD, best, factor 2)" in cells["SimKD", 2]
  teacher = (
    "\nThe teacher, `resnet32x4`: published 79.42 (SimKD, best); 79.42"
    " (RepDistiller, last); kd_jax not run.\n"
  )
  assert teacher in text


def test_page_has_every_published_value(tmp_path):
  text = documents.page(tmp_path / "nothing")
  for value in published.values():
    part = text.partition(f"## {value.recipe}\n")[2].partition("\n## ")[0]
    head, _, table = part.partition("\n\n|")
    assert value.source in head
    if value.teacher:
      _, header = cells_of(f"|{table}")
      lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if f"| `{value.teacher}` " in line and f"| `{value.student}` " in line
      ]
      word = "last" if value.epoch == "final" else "best"
      name = title_of(value.method)
      assert f"{value.top1:.2f}" in [
        cell
        for [line] in [lines]
        for title, cell in zip(header, line, strict=True)
        if title.startswith(f"{name} (") and f"{word} epoch" in title
      ]
  assert "kd_jax" not in text


def keep_cells(folder, keep, config):
  """Keeps a run of each cell; the scores of the n-th are n, n + 1, n + 2."""
  scores = {}
  for name, cell in grid.cells(config).items():
    first = name.partition("_seed")[0]
    number = scores.setdefault(first, len(scores))
    keep(
      folder / name,
      number + cell.seed - 1.25,  # the best epoch's is 1.25 more
      changes=identity.as_json(cell),
      student=cell.student.name,
      method=cell.distiller.name,
      seed=cell.seed,
      teacher={"name": cell.teacher.name} if cell.teacher.name else {},
    )
  return scores


@pytest.mark.parametrize(
  ("arg", "recipe", "row", "name"),
  [
    ("", "SimKD", "KD", "kd"),
    ("", "SimKD factor 2", "SimKD", "simkd_factor2"),
    ("repdistiller", "RepDistiller, mdistiller", "KD", "kd"),
    ("repdistiller", "RepDistiller", "CRD", "crd"),
  ],
)
def test_cells_of_the_grid_have_their_places(
  arg, recipe, row, name, tmp_path, keep
):
  config = table_cifar.get_config(arg).lock()
  pair = "resnet32x4_resnet8x4_"
  names = [n for n in config.grid if n.startswith(pair) or "alone" in n]
  with config.unlocked():
    config.grid = {name: config.grid[name] for name in names}
  scores = keep_cells(tmp_path / "table", keep, config)
  text = documents.tables(tmp_path)
  cells, _ = cells_of(text.partition("`resnet8x4`:\n\n")[2])
  best = scores[pair + name] + 1
  assert f"{best:.2f} ± 1.00 ({recipe}, best, n = 3)" in cells[row, 3]
  assert text.count("\n|:--") == 1  # no other table
  # Beside the published value, at the epoch of its source.
  shown = best - 1.25 if arg else best
  assert f"; kd_jax {shown:.2f} ± 1.00 (n = 3) |" in documents.page(tmp_path)


def test_the_teacher_and_what_is_not_of_the_table(tmp_path, keep):
  keep(tmp_path / "table" / "teachers" / "t", 78.0, student="resnet32x4")
  command = ["launch.py", "--config", "configs/cpu.py"]
  cpu = tmp_path / "cpu"
  kd = {"method": "kd", "student": "resnet8", "teacher": {"name": "resnet20"}}
  for seed in range(2):
    more = {"changes": {"epochs": 30}, "seed": seed, "command": command}
    keep(cpu / f"kd_seed{seed}", 50.0 + seed, **kd, **more)
  more = {"changes": {"epochs": 40}, "student": "resnet20", "command": command}
  keep(cpu / "teachers" / "t", 60.0, **more)
  text = documents.tables(tmp_path)
  assert "kd_jax 79.25 (SimKD, RepDistiller, best, n = 1).\n" in text
  *_, about, table = text.rstrip("\n").split("\n\n")
  assert about == (
    "`cpu`: 30 epochs of batches of 64, on 1 x CPU, by `python launch.py"
    " --config configs/cpu.py`."
  )
  header, _, *lines = [" ".join(line.split()) for line in table.splitlines()]
  # Without the columns of which nothing is known.
  assert header == (
    "| network | teacher | method | n | top-1, last epoch | top-1, best epoch |"
  )
  assert lines == [
    "| resnet20 | - | none | 1 | 60.00 | 61.25 (2) |",
    "| resnet8 | resnet20 | kd | 2 | 50.50 ± 0.71 | 51.75 ± 0.71 (2) |",
  ]


def test_a_method_without_published_values_has_its_place(tmp_path, keep):
  config = identity.as_json(nkd_cifar.get_config())
  run = {"method": "nkd", "teacher": {"name": "resnet32x4"}}
  keep(tmp_path / "nkd" / "run", 75.0, changes=config, **run)
  text = documents.tables(tmp_path)
  cells, _ = cells_of(text.partition("`resnet8x4`:\n\n")[2])
  assert cells["NKD", 3] == "76.25 (best, n = 1)"
  assert text.count("\n|:--") == 1


DOCUMENT = f"before\n{documents.BEGIN}\nold\n{documents.END}\nafter\n"


def test_rewrite_leaves_the_rest():
  once = documents.rewrite(DOCUMENT, "| new |\n")
  assert once == (
    f"before\n{documents.BEGIN}\n\n| new |\n\n{documents.END}\nafter\n"
  )
  assert documents.rewrite(once, "| new |\n") == once


@pytest.mark.parametrize(
  "text",
  [
    *("no markers\n", f"{documents.BEGIN}\n", DOCUMENT + DOCUMENT),
    f"{documents.END}\n{documents.BEGIN}\n",
  ],
)
def test_rewrite_wants_its_markers(text):
  with pytest.raises(ValueError, match="expected one line '<!-- results: writ"):
    documents.rewrite(text, "")
