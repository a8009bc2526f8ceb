"""A page of tables and drawings that needs no other file."""

import dataclasses
import html
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from kd_jax.reporting import tables


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a report.

  Attributes:
    title: its heading.
    content: a table of text, or the text of an SVG file.
    note: what the content means.
  """

  title: str
  content: pd.DataFrame | str
  note: str


def write(sections: Sequence[Section]) -> str:
  """Renders the page; it is well-formed XML too."""
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
  )
  parts = []
  for number, section in enumerate(sections):
    part: dict[str, Any] = {"title": section.title, "note": section.note}
    if isinstance(section.content, str):
      part["svg"] = _inline(section.content, section.title, number)
    else:
      part["table"] = section.content
      part["alignments"] = tables.alignments(section.content)
    parts.append(part)
  return environment.get_template("report.html.jinja").render(parts=parts)


def _inline(svg: str, title: str, number: int) -> str:
  """An SVG file for use inside a page, with ids of its own."""
  svg = svg[svg.index("<svg") :]
  # Ids count for the whole page, and each drawing has a "figure_1".
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>d{number}-", svg)
  label = f'<svg role="img" aria-label="{html.escape(title)}" '
  return svg.replace("<svg ", label, 1)
