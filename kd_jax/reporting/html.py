"""Tables as Markdown and HTML, and a page of them that needs no other file."""

import dataclasses
import html
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text.

  Attributes:
    header: names of the columns.
    cells: the lines.
    right: numbers of the columns that are aligned right.
  """

  header: Sequence[str]
  cells: Sequence[Sequence[str]]
  right: set[int]

  def markdown(self) -> str:
    """The table in Markdown."""
    numbers = range(len(self.header))
    rule = ["---:" if i in self.right else "---" for i in numbers]
    lines = [f"| {' | '.join(line)} |" for line in (self.header, *self.cells)]
    lines.insert(1, f"|{'|'.join(rule)}|")
    return "\n".join(lines) + "\n"

  def html(self) -> str:
    """The table in HTML; one that is too wide scrolls by itself."""

    kinds = [
      ' class="number"' if i in self.right else ""
      for i in range(len(self.header))
    ]

    def line(texts, tag):
      inner = "".join(
        f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
        for kind, cell in zip(kinds, texts)
      )
      return f"<tr>{inner}</tr>"

    body = "\n".join(line(texts, "td") for texts in self.cells)
    return (
      '<div class="wide" tabindex="0"><table><thead>'
      f"{line(self.header, 'th')}</thead>\n<tbody>{body}</tbody></table></div>"
    )


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a report.

  Attributes:
    title: its heading.
    content: a table, or the text of an SVG file.
    note: what the content means.
  """

  title: str
  content: Table | str
  note: str


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 90rem; padding: 0 1rem; color: #111; background: #fff; }
p { max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ccc;
  text-align: left; }
th { border-bottom: 2px solid #111; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td:first-child { white-space: normal; max-width: 11rem;
  overflow-wrap: break-word; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; min-width: 44rem; max-width: 66rem; height: auto; }
"""


def write(sections: Sequence[Section]) -> str:
  """One file of XHTML's syntax that needs no other."""
  parts = [
    "<!DOCTYPE html>",
    '<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head>',
    '<meta charset="utf-8"/><title>kd_jax: results</title>',
    '<meta name="viewport" content="width=device-width"/>',
    f"<style>{_STYLE}</style></head><body>",
    "<h1>Results</h1>",
  ]
  for number, section in enumerate(sections):
    content = section.content
    parts += [
      f"<h2>{html.escape(section.title)}</h2>",
      content.html()
      if isinstance(content, Table)
      else f'<div class="wide" tabindex="0">{_drawing(section, number)}</div>',
      f"<p>{html.escape(section.note)}</p>",
    ]
  parts.append("</body></html>")
  return "\n".join(parts) + "\n"


def _drawing(section, number):
  """An SVG as it stands in a page, without XML's declaration and type."""
  svg = section.content[section.content.index("<svg") :]
  # Names count for the whole page, and each drawing has a "figure_1".
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>d{number}-", svg)
  label = html.escape(section.title, quote=True)
  return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
